"""Write down what is said in recordings of any length, as text or subtitles.

    kimi-audio transcribe talk.m4a --weights weights/mini --format srt
    kimi-audio transcribe lectures 'podcasts/**/*.mp3' --format vtt --output subtitles
    kimi-audio transcribe interviews --url http://127.0.0.1:8000

A directory stands for all recordings below it. What is written stands beside each recording, or
below --output, under its name with another suffix. The same command continues after an
interruption: a recording whose text is there is left out.
"""

from __future__ import annotations

import glob
import json
import math
import os
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

from kimia_infer.commands.main import explain
from kimia_infer.commands.parser import (
    MODEL_ARGUMENTS,
    WEIGHTS_HELP,
    Parser,
    add_model,
    check_adapter,
    model_arguments,
)
from kimia_infer.utils.files import no_file, write_text

if TYPE_CHECKING:
    from kimia_infer.api.request import Deadline
    from kimia_infer.api.transcription import Transcript

    Transcriber = Callable[[Path, Deadline, "Progress"], Transcript]

FORMATS = ("txt", "srt", "vtt", "json")

SUFFIXES = {
    *(".3gp", ".aac", ".aif", ".aiff", ".amr", ".au", ".avi", ".caf", ".flac", ".m4a", ".m4b"),
    *(".mka", ".mkv", ".mov", ".mp2", ".mp3", ".mp4", ".mpeg", ".mpg", ".oga", ".ogg", ".opus"),
    *(".wav", ".webm", ".wma", ".wmv"),
}
"""Recordings in directories and by patterns; a file that is named may have any suffix."""

AT_A_TIME = 4
"""Recordings that a server is sent at a time."""

AFTER_INTERRUPTION = "the same command continues"

EPILOG = """\
With --url, KIMI_AUDIO_TOKEN is sent as the key.
Exit status: 0 done, 1 some recordings failed, 2 usage, 130 interrupted."""


def add_arguments(parser: Parser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("recordings", nargs="+", metavar="RECORDING", help="a file, a directory, or a pattern")
    add("--format", choices=FORMATS, default="txt", help="of what is written [%(default)s]")
    add("--output", type=Path, metavar="DIR", help="directory to write to [beside the recordings]")
    add("--overwrite", action="store_true", help="also write what is there")
    add("--language", choices=("en", "zh"), help="what is spoken [left to the model]")
    add("--prompt", default="", metavar="TEXT", help="words about the recordings, such as names")
    source = parser.add_argument_group("who transcribes").add_mutually_exclusive_group()
    source.add_argument("--weights", help=f"{WEIGHTS_HELP} [KIMI_AUDIO_WEIGHTS]")
    source.add_argument("--url", help="a server for OpenAI's clients, instead of loading weights")
    add_model(parser.add_argument_group("the model, with --weights"))


def check(parser: Parser, arguments: Namespace) -> None:
    """Find the recordings, and refuse what would be written to one file."""
    if arguments.url is None:
        check_adapter(parser, arguments)
    else:
        check_url(parser, arguments)
    if arguments.output is not None and arguments.output.exists() and not arguments.output.is_dir():
        parser.error(f"--output: {arguments.output} is no directory")
    targets: dict[Path, Path] = {}
    for given in arguments.recordings:
        found = list(find_recordings(given))
        if not found:
            pattern = Path(given).is_dir() or glob.has_magic(given)
            missing = "no recordings there" if pattern else no_file(given)
            parser.error(f"{given}: {missing}")
        for path, below in found:
            place = path if arguments.output is None else arguments.output / below
            known = place.suffix.lower() in SUFFIXES
            name = place.stem if known else place.name
            targets[path] = place.with_name(f"{name}.{arguments.format}")
    same = defaultdict(list)
    for path, target in targets.items():
        same[target.resolve()].append(path)
    for target, paths in same.items():
        if len(paths) > 1:
            names = " and ".join(map(str, paths))
            parser.error(f"{names} would both be written to {target.name}; give one of them")
    arguments.targets = targets


def check_url(parser: Parser, arguments: Namespace) -> None:
    """Refuse what only a model that is loaded here can do."""
    for name in MODEL_ARGUMENTS:
        if getattr(arguments, name, None) is not None:
            parser.error(f"--{name.replace('_', '-')} has no effect with --url")
    if not arguments.url.lower().startswith(("http://", "https://")):
        parser.error(f"--url: expected http://HOST:PORT or https://..., found {arguments.url!r}")


def find_recordings(name: str) -> Iterator[tuple[Path, Path]]:
    """The recordings that an argument stands for, and their places below an output directory."""
    path = Path(name)
    if path.is_file():
        yield path, Path(path.name)
    elif path.is_dir():
        for found in sorted(path.rglob("*")):
            if found.suffix.lower() in SUFFIXES and found.is_file():
                yield found, found.relative_to(path)
    else:
        for match in sorted(glob.glob(name, recursive=True)):
            if Path(match).is_dir() or Path(match).suffix.lower() in SUFFIXES:
                yield from find_recordings(match)


def run(arguments: Namespace) -> int:
    targets: dict[Path, Path] = arguments.targets
    left = {
        path: target
        for path, target in targets.items()
        if arguments.overwrite or not target.exists()
    }
    complete = len(targets) - len(left)
    if complete:
        log(f"{complete} of {len(targets)} are complete already (--overwrite writes them again)")
    failures = transcribe_all(left, arguments) if left else {}
    log(f"{len(left) - len(failures)} written" + (f", {len(failures)} failed:" if failures else ""))
    for path, reason in sorted(failures.items()):
        log(f"  {path}: {reason}")
    return 1 if failures else 0


def transcribe_all(targets: dict[Path, Path], arguments: Namespace) -> dict[Path, str]:
    """Write the transcripts, several at a time; why some could not be, by recording."""
    from kimia_infer.api.request import Deadline
    from kimia_infer.utils.errors import RequestError

    transcriber, together = (
        from_model(arguments) if arguments.url is None else from_server(arguments)
    )
    deadline, failures = Deadline(None), dict[Path, str]()
    pool = ThreadPoolExecutor(min(together, len(targets)))

    def transcribe(path: Path, target: Path, bar: Progress) -> list[str]:
        """Write a transcript, whole or not at all; notes about it."""
        transcript = transcriber(path, deadline, bar)
        write_text(target, written(transcript, arguments.format))
        return transcript.notes

    try:
        with Progress(len(targets)) as bar:
            under_way = {
                pool.submit(transcribe, path, target, bar): path for path, target in targets.items()
            }
            for done in as_completed(under_way):
                path = under_way[done]
                try:
                    for note in done.result():
                        log(f"{path}: {note}")
                    print(targets[path], flush=True)
                except (RequestError, OSError) as error:
                    failures[path] = explain(error).removeprefix(f"audio: {path}: ")
                bar.finished()
    finally:
        deadline.cancel()
        pool.shutdown(cancel_futures=True)
    return failures


def from_model(arguments: Namespace) -> tuple[Transcriber, int]:
    """What transcribes a recording with a model that is loaded here, and how many at a time."""
    from kimia_infer.models.kimi_audio.checkpoint import weights_from_environment

    weights = arguments.weights or weights_from_environment()

    from kimia_infer.api.kimia import KimiAudio  # imports PyTorch: seconds
    from kimia_infer.api.subtitles import SUBTITLE_SECONDS
    from kimia_infer.api.transcription import INSTRUCTION, INSTRUCTIONS, prompted
    from kimia_infer.engine.scheduler import LONGEST_QUEUE

    loading = model_arguments(arguments)
    loading |= {"load_detokenizer": False, "kokoro": None, "kokoro_adapter": None}
    model = KimiAudio(weights, **loading)
    instruction = INSTRUCTIONS.get(arguments.language, INSTRUCTION)

    def transcribe(path: Path, deadline: Deadline, bar: Progress) -> Transcript:
        return model.transcribe(
            str(path),
            instruction=prompted(arguments.prompt, instruction),
            max_seconds=math.inf,
            longest_segment=None if arguments.format == "txt" else SUBTITLE_SECONDS,
            on_progress=bar.advance,
            deadline=deadline,
        )

    # A recording asks for as many slots as there are; no more may wait than the queue takes.
    slots = model.scheduler.slots
    return transcribe, min(slots, LONGEST_QUEUE // slots)


def from_server(arguments: Namespace) -> tuple[Transcriber, int]:
    """What has a recording transcribed by a server, and how many at a time."""
    from kimia_infer.serving.transcripts import TranscriptServer

    server = TranscriptServer(arguments.url, os.environ.get("KIMI_AUDIO_TOKEN"))
    given = {"language": arguments.language, "prompt": arguments.prompt}
    fields = {name: value for name, value in given.items() if value}
    if arguments.format == "txt":
        fields["response_format"] = "json"

    def transcribe(path: Path, deadline: Deadline, bar: Progress) -> Transcript:
        return server.transcribe(path, fields, deadline, lambda done: bar.advance(done, None))

    return transcribe, AT_A_TIME


def written(transcript: Transcript, form: str) -> str:
    """The content of the file."""
    from kimia_infer.api.subtitles import described, srt, vtt

    writers: dict[str, Callable[[], str]] = {
        "txt": lambda: f"{transcript.text}\n",
        "srt": lambda: srt(transcript.segments),
        "vtt": lambda: vtt(transcript.segments),
        "json": lambda: json.dumps(described(transcript), ensure_ascii=False, indent=2) + "\n",
    }
    return writers[form]()


class Progress:
    """A bar of recordings; where there is one alone, of its seconds."""

    def __init__(self, files: int):
        from kimia_infer.utils.progress import progress

        self._alone = files == 1
        unit = "seconds of sound" if self._alone else "recordings"
        self._bar = progress("Transcribing", None if self._alone else files, unit)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, done: float, total: float | None) -> None:
        """Show seconds of one recording; ``total`` is None where it is not known."""
        if self._alone:
            self._bar.total = None if total is None else round(total)
            self._bar.update(round(done) - self._bar.n)

    def finished(self) -> None:
        if not self._alone:
            self._bar.update()


def log(message: str) -> None:
    print(f"transcribe: {message}", file=sys.stderr, flush=True)
