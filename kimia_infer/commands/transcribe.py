"""Write down what is said in recordings of any length, as text or subtitles.

    kimi-audio transcribe talk.m4a --weights weights/mini --format srt
    kimi-audio transcribe lectures 'podcasts/**/*.mp3' --format vtt --output subtitles

A directory stands for all recordings below it. What is written stands beside each recording, or
below --output, under its name with another suffix. The same command continues after an
interruption: a recording whose text is there is left out.
"""

from __future__ import annotations

import glob
import json
import math
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimia_infer.commands.main import explain
from kimia_infer.commands.parser import (
    WEIGHTS_HELP,
    Parser,
    add_model,
    check_adapter,
    model_arguments,
)
from kimia_infer.utils.files import no_file, write_text

if TYPE_CHECKING:
    from kimia_infer.api.kimia import KimiAudio
    from kimia_infer.api.request import Deadline
    from kimia_infer.api.transcription import Transcript

FORMATS = ("txt", "srt", "vtt", "json")

SUFFIXES = {
    *(".3gp", ".aac", ".aif", ".aiff", ".amr", ".au", ".avi", ".caf", ".flac", ".m4a", ".m4b"),
    *(".mka", ".mkv", ".mov", ".mp2", ".mp3", ".mp4", ".mpeg", ".mpg", ".oga", ".ogg", ".opus"),
    *(".wav", ".webm", ".wma", ".wmv"),
}
"""Files that are recordings in a directory; one that is named may have any suffix."""

AFTER_INTERRUPTION = "the same command continues"

EPILOG = "Exit status: 0 done, 1 some recordings failed, 2 usage, 130 interrupted."


def add_arguments(parser: Parser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("recordings", nargs="+", metavar="RECORDING", help="a file, a directory, or a pattern")
    add("--format", choices=FORMATS, default="txt", help="of what is written [%(default)s]")
    add("--output", type=Path, metavar="DIR", help="directory to write to [beside the recordings]")
    add("--overwrite", action="store_true", help="also write what is there")
    add("--language", choices=("en", "zh"), help="what is spoken [left to the model]")
    add("--prompt", default="", metavar="TEXT", help="words about the recordings, such as names")
    add("--weights", help=f"{WEIGHTS_HELP} [KIMI_AUDIO_WEIGHTS]")
    add_model(parser.add_argument_group("the model"))


def check(parser: Parser, arguments: Namespace) -> None:
    """Find the recordings, and refuse what would be written to one file."""
    check_adapter(parser, arguments)
    if arguments.output is not None and arguments.output.exists() and not arguments.output.is_dir():
        parser.error(f"--output: {arguments.output} is no directory")
    targets: dict[Path, Path] = {}
    for given in arguments.recordings:
        found = list(find_recordings(given))
        if not found:
            missing = "no recordings in it" if Path(given).is_dir() else no_file(given)
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
    from kimia_infer.models.kimi_audio.checkpoint import weights_from_environment

    weights = arguments.weights or weights_from_environment()

    from kimia_infer.api.kimia import KimiAudio  # imports PyTorch: seconds
    from kimia_infer.api.request import Deadline
    from kimia_infer.engine.scheduler import LONGEST_QUEUE
    from kimia_infer.utils.errors import RequestError

    model = KimiAudio(weights, **model_arguments(arguments) | {"load_detokenizer": False})
    slots, deadline, failures = model.scheduler.slots, Deadline(None), dict[Path, str]()
    # A recording asks for as many slots as there are; no more may wait than the queue takes.
    pool = ThreadPoolExecutor(min(slots, LONGEST_QUEUE // slots, len(targets)))
    try:
        with Progress(len(targets)) as bar:
            written = {
                pool.submit(transcribe, model, path, target, arguments, deadline, bar): path
                for path, target in targets.items()
            }
            for done in as_completed(written):
                path = written[done]
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


def transcribe(
    model: KimiAudio,
    path: Path,
    target: Path,
    arguments: Namespace,
    deadline: Deadline,
    bar: Progress,
) -> list[str]:
    """Write the transcript of a recording, whole or not at all; notes about it."""
    from kimia_infer.api.subtitles import SUBTITLE_SECONDS
    from kimia_infer.api.transcription import INSTRUCTION, INSTRUCTIONS, prompted

    timed = arguments.format != "txt"
    transcript = model.transcribe(
        str(path),
        instruction=prompted(arguments.prompt, INSTRUCTIONS.get(arguments.language, INSTRUCTION)),
        max_seconds=math.inf,
        longest_segment=SUBTITLE_SECONDS if timed else None,
        on_progress=bar.advance,
        deadline=deadline,
    )
    write_text(target, written(transcript, arguments.format))
    return transcript.notes


def written(transcript: Transcript, form: str) -> str:
    """The content of the file."""
    from kimia_infer.api.subtitles import srt, vtt

    writers: dict[str, Callable[[], str]] = {
        "txt": lambda: f"{transcript.text}\n",
        "srt": lambda: srt(transcript.segments),
        "vtt": lambda: vtt(transcript.segments),
        "json": lambda: json.dumps(described(transcript), ensure_ascii=False, indent=2) + "\n",
    }
    return writers[form]()


def described(transcript: Transcript) -> dict[str, Any]:
    spoken = [segment for segment in transcript.segments if segment.text]
    return {
        "text": transcript.text,
        "duration": transcript.metrics["input_audio_seconds"],
        "segments": [{"start": s.shown[0], "end": s.shown[1], "text": s.text} for s in spoken],
        "notes": transcript.notes,
    }


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

    def advance(self, done: float, total: float) -> None:
        if self._alone:
            self._bar.total = round(total)
            self._bar.update(round(done) - self._bar.n)

    def finished(self) -> None:
        if not self._alone:
            self._bar.update()


def log(message: str) -> None:
    print(f"transcribe: {message}", file=sys.stderr, flush=True)
