"""espeak-ng as a separate program: words to IPA, rewritten into the symbols of Kokoro.

espeak-ng is licensed under the GPL. Nothing of it is imported or linked; it is called as a program
where it is installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence

from kimia_infer.utils.errors import RequestError

ESPEAK_LANGUAGES = ("en-us", "en-gb", "es", "fr-fr", "hi", "it", "pt-br")
TIMEOUT = 60.0  # seconds
LONGEST_LINE = 240
"""Characters that espeak-ng is given at a time; it breaks longer clauses by itself."""

_TIES = re.compile("[\u0361\u200d]")
# Of the language, for a foreign word; ties stand between its letters as between others.
_SWITCHES = re.compile("\\((?:[\u0361\u200d]?[a-z-])+\\)")
# espeak-ng 1.51 crashes on a hundred of them.
_DOTTED = re.compile(r"(?:\w\.){30,}")
_SYLLABIC = re.compile("(\\S)\u0329")

_JOINED = {
    "a^ɪ": "I",
    "a^ʊ": "W",
    "e^ɪ": "A",
    "o^ʊ": "O",
    "ə^ʊ": "Q",
    "ɔ^ɪ": "Y",
    "d^ʒ": "ʤ",
    "t^ʃ": "ʧ",
    "d^z": "ʣ",
    "t^s": "ʦ",
    "s^s": "S",
}
_ENGLISH_FIRST = {
    "ʔˌn\u0329": "ʔn",
    "ʔn\u0329": "ʔn",
    "ə^l": "ᵊl",
    "ʲo": "jo",
    "ʲə": "jə",
    "ʲ": "",
    "e": "A",
    "ɚ": "əɹ",
    "r": "ɹ",
    "x": "k",
    "ç": "k",
    "ɐ": "ə",
    "ɬ": "l",
    "\u0303": "",
}
_AMERICAN = {"ɜːɹ": "ɜɹ", "ɜː": "ɜɹ", "ɪə": "iə", "ː": ""}
_BRITISH = {"e^ə": "ɛː", "iə": "ɪə"}
_ENGLISH_LAST = {"o": "ɔ", "ɾ": "T", "ʔ": "t"}


def to_phonemes(lines: Sequence[str], language: str) -> list[str]:
    """The phonemes of each line of words, which has no punctuation; spaces between words.

    One process speaks all lines.

    Raises:
        RequestError: espeak-ng is not installed, or fails.
    """
    cut = [piece for line in lines for piece in _pieces(line)]
    spoken = _run(cut, language)
    if len(spoken) != len(cut):  # a line that espeak-ng broke or left out: one by one
        spoken = [" ".join(_run([piece], language)) for piece in cut]
    found = iter(spoken)
    return [rewritten(" ".join(next(found) for _ in _pieces(line)), language) for line in lines]


def rewritten(ipa: str, language: str) -> str:
    """IPA of espeak-ng in the symbols that the voices were trained on."""
    text = _TIES.sub("^", _SWITCHES.sub("", ipa)).replace("g", "ɡ")
    if language == "en-gb":
        text = _replaced(text, {"e^ə": "ɛː"})
    text = _replaced(text, _JOINED)
    if language.startswith("en"):
        text = _SYLLABIC.sub("ᵊ\\1", _replaced(text, _ENGLISH_FIRST))
        text = _replaced(text.replace("^", ""), _AMERICAN if language == "en-us" else _BRITISH)
        text = _replaced(text, _ENGLISH_LAST)
    text = text.replace("^", "").replace("-", "")
    return " ".join(text.split())


def _replaced(text: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        text = text.replace(old, new)
    return text


def _pieces(line: str) -> list[str]:
    """A line in pieces that espeak-ng takes whole."""
    pieces, current = [], ""
    for word in _DOTTED.sub(lambda found: found[0].replace(".", " "), line).split():
        for start in range(0, len(word), LONGEST_LINE):
            part = word[start : start + LONGEST_LINE]
            if current and len(current) + 1 + len(part) > LONGEST_LINE:
                pieces.append(current)
                current = ""
            current = f"{current} {part}".strip()
    return [*pieces, current] if current else pieces


def _run(lines: Sequence[str], language: str) -> list[str]:
    """What espeak-ng prints for each line, without empty lines."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise RequestError(
            "text: espeak-ng is not installed, which reads text; install it (apt-get install "
            "espeak-ng), or send phonemes"
        )
    command = [program, "-q", "--ipa=3", "-v", language]
    try:
        done = subprocess.run(
            command,
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RequestError(f"text: espeak-ng does not answer ({error})") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise RequestError(f"text: espeak-ng failed: {reason}")
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
