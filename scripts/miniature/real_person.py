"""Questions of a real person, joined of the prompts of a telephone system, to judge with only.

They are Debian's ``asterisk-core-sounds-en-g722``: 16 kHz, in G.722, by one speaker, licensed
CC BY-SA 3.0. The package is fetched when something is measured; its sounds are never trained on.
"""

from __future__ import annotations

import random
import subprocess
from itertools import product
from pathlib import Path

import av
import numpy as np

from kimia_infer.audio.files import SAMPLE_RATE, write_wav
from kimia_infer.utils.errors import ConfigurationError
from kimia_infer.weights.manifest import sha256_of
from scripts.miniature.scoring import Case
from scripts.miniature.spoken_world import TRANSCRIBE, sound_message, text_message
from scripts.miniature.world.calendar import DAYS, MONTHS
from scripts.miniature.world.core import NUMBERS
from scripts.miniature.world.numbers import TEENS, TENS
from scripts.miniature.world.splits import split_of

PACKAGE, VERSION = "asterisk-core-sounds-en-g722", "1.6.1-1"
ARCHIVE = f"{PACKAGE}_{VERSION}_all.deb"
SHA256 = "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806"
SOUNDS = Path("usr/share/asterisk/sounds/en_US_f_Allison")

WORDS = {"plus": "letters/plus", "minus": "digits/minus"} | {
    word: f"digits/{number}" for number, word in enumerate(NUMBERS + TEENS)
}
WORDS |= {word: f"digits/{10 * number}" for number, word in enumerate(TENS, 2)}
WORDS |= {word: f"digits/day-{(place + 1) % 7}" for place, word in enumerate(DAYS)}
WORDS |= {word: f"digits/mon-{place}" for place, word in enumerate(MONTHS)}
"""Prompts of words, by these."""

QUESTIONS, STRINGS, SEED = 40, 20, 1
PAUSES = 0.1, 0.3
"""Shortest and longest pause between two prompts, in seconds."""

AROUND = 0.2
"""Seconds of silence before and after a question."""


def fetch_prompts(folder: Path) -> Path:
    """The folder of the prompts, fetched to ``folder`` with Debian's tools.

    Raises ConfigurationError if they cannot be had or are others.
    """
    archive = folder / ARCHIVE
    if not archive.is_file():
        _run(["apt-get", "download", f"{PACKAGE}={VERSION}"], folder)
    if (found := sha256_of(archive)) != SHA256:
        raise ConfigurationError(
            f"{archive}: SHA-256 {found}, expected {SHA256}; remove the file to have it fetched "
            "again, or check which archive apt-get uses"
        )
    _run(["dpkg-deb", "--extract", str(archive), str(folder)], folder)
    return folder / SOUNDS


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        raise ConfigurationError(f"{PACKAGE} {VERSION}: {error.stderr.strip()}") from error
    except FileNotFoundError as error:
        if error.filename != command[0]:
            raise
        raise ConfigurationError(f"{PACKAGE}: needs Debian's {command[0]}") from error


def trained(case: Case) -> bool:
    """Whether training has the text of a question of :func:`person_cases`, said by others."""
    return split_of(Path(case.chats[-1]["content"]).stem.replace("_", " ")) == "train"


def person_cases(prompts: Path, folder: Path) -> list[Case]:
    """Sums, asked with ``prompts`` in recordings that are written to ``folder``.

    The first QUESTIONS are drawn from all sums, most of which training has in other voices; behind
    them are all others that it does not have.
    """
    chance = random.Random(SEED)
    sums = [
        (f"{a} {sign} {b}", result)
        for (x, a), (y, b) in product(enumerate(NUMBERS), repeat=2)
        for sign, result in (("plus", x + y), ("minus", x - y))
        if y > 0 and 0 <= result < len(NUMBERS) and (x > 0 or sign == "minus")
    ]
    asked = chance.sample(sums, QUESTIONS)
    asked += [item for item in sums if split_of(item[0]) != "train" and item not in asked]
    cases = []
    for text, result in asked:
        path = folder / f"{text.replace(' ', '_')}.wav"
        write_wav(path, _joined(prompts, text, chance), SAMPLE_RATE)
        cases.append(Case("question", [sound_message(str(path))], NUMBERS[result], True))
    return cases


def person_words(prompts: Path, folder: Path) -> list[Case]:
    """Numbers, days and months alone, and STRINGS of digits, to be written down."""
    chance = random.Random(SEED)
    texts = [*NUMBERS, *TEENS, *TENS, *DAYS, *MONTHS]
    texts += [
        " ".join(chance.choices(NUMBERS[:10], k=chance.choice((3, 4)))) for _ in range(STRINGS)
    ]
    cases = []
    for text in texts:
        path = folder / f"written_{text.replace(' ', '_')}.wav"
        write_wav(path, _joined(prompts, text, chance), SAMPLE_RATE)
        chats = [text_message("user", TRANSCRIBE[0]), sound_message(str(path))]
        cases.append(Case("transcription", chats, text, False))
    return cases


def _joined(prompts: Path, text: str, chance: random.Random) -> np.ndarray:
    parts = [_silence(AROUND)]
    for word in text.split():
        parts += [decoded(prompts / f"{WORDS[word]}.g722"), _silence(chance.uniform(*PAUSES))]
    return np.concatenate([*parts[:-1], _silence(AROUND)])


def _silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def decoded(path: Path) -> np.ndarray:
    """G.722 as float32 [samples] at 16 kHz."""
    with av.open(str(path), format="g722") as container:
        frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return np.concatenate(frames).astype(np.float32) / 32_768
