"""Make training data from long recordings: who speaks when, what is said, and what of it is good.

    kimi-audio make-data interviews 'podcasts/**/*.mp3' --output data --weights weights/mini
    kimi-audio make-data talks --output data --weights DIR --whisper large-v3 --limit score=2.5
    kimi-audio make-data talks --output data --whisper large-v3

A directory stands for all recordings below it. What Kimi-Audio hears is the text; with Whisper
besides, both have to agree, and Whisper tells which language is spoken. DIR gets conversations for
finetune, documents for pre-training, the sound of all segments, and report.html with counts,
histograms and sounds. The same command continues after an interruption, also with more recordings.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimia_infer.commands.parser import (
    WEIGHTS_HELP,
    Parser,
    UsageError,
    add_model,
    check_adapter,
    model_arguments,
)
from kimia_infer.commands.transcribe import find_recordings

if TYPE_CHECKING:
    from kimia_infer.data.pipeline.filters import Limits
    from kimia_infer.data.pipeline.make import Made
    from kimia_infer.data.pipeline.recognition import Heard, Recognizer

AFTER_INTERRUPTION = "the same command continues"
FAILED = 2

EPILOG = """\
Exit status: 0 done, 1 some recordings could not be read, 2 cannot be run, 130 interrupted."""


def add_arguments(parser: Parser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("recordings", nargs="+", metavar="RECORDING", help="a file, a directory, or a pattern")
    add("--output", type=Path, required=True, metavar="DIR", help="directory to write to")
    add("--weights", help=f"Kimi-Audio: {WEIGHTS_HELP}")
    add(
        "--whisper",
        metavar="MODEL",
        help="of faster-whisper, a directory or a name such as large-v3; a second opinion, or, "
        "without --weights, the only one",
    )
    add(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what a segment needs, see docs/data.md; languages are en,zh",
    )
    add("--question", metavar="TEXT", help="of conversations [the published one to transcribe]")
    add_model(parser.add_argument_group("the model, with --weights"))


def check(parser: Parser, arguments: Namespace) -> None:
    if arguments.weights is None and arguments.whisper is None:
        parser.error("somebody has to write down what is said: give --weights, --whisper or both")
    if arguments.output.exists() and not arguments.output.is_dir():
        parser.error(f"--output: {arguments.output} is no directory")
    check_adapter(parser, arguments)
    paths = dict[Path, None]()
    for name in arguments.recordings:
        found = [path for path, _ in find_recordings(name)]
        if not found:
            parser.error(f"{name}: no recordings there")
        paths |= dict.fromkeys(found)
    arguments.paths = list(paths)


def run(arguments: Namespace) -> int:
    limits = read_limits(arguments.limit)

    from kimia_infer.data.manifests import QUESTION
    from kimia_infer.data.pipeline.diarization import Diarizer
    from kimia_infer.data.pipeline.make import Tools, make_data
    from kimia_infer.data.pipeline.models import obtain_models
    from kimia_infer.data.pipeline.quality import QualityMeter
    from kimia_infer.data.pipeline.report import write_report
    from kimia_infer.data.pipeline.speech import SpeechDetector

    models = obtain_models()
    recognizers = list(recognizers_of(arguments))
    tools = Tools(
        SpeechDetector(),
        Diarizer(models),
        QualityMeter(models),
        recognizers[0],
        recognizers[1] if len(recognizers) > 1 else None,
        error_rate_between,
    )
    question = arguments.question or QUESTION
    made = make_data(arguments.paths, arguments.output, tools, limits, question)
    show(made)
    print(write_report(made, arguments.output, limits))
    return 1 if made.unreadable else 0


def read_limits(assignments: list[str]) -> Limits:
    """The limits with the changes ``name=value``. Raises UsageError naming the limit."""
    from pydantic import ValidationError

    from kimia_infer.data.pipeline.filters import Limits
    from kimia_infer.utils.errors import explain

    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--limit: expected NAME=VALUE, found {assignment!r}")
        try:
            values[name] = text.split(",") if name == "languages" else float(text)
        except ValueError as error:
            raise UsageError(f"--limit: {name}: expected a number, found {text!r}") from error
    try:
        return Limits.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"--limit: {'; '.join(explain(error, Limits))}") from error


def recognizers_of(arguments: Namespace) -> Any:
    """Who writes down what is said; the first one's text is kept."""
    if arguments.weights is not None:
        yield kimi_recognizer(arguments)
    if arguments.whisper is not None:
        from kimia_infer.data.pipeline.recognition import WhisperRecognizer

        yield WhisperRecognizer(arguments.whisper)


def kimi_recognizer(arguments: Namespace) -> Recognizer:
    from kimia_infer.api.kimia import KimiAudio
    from kimia_infer.audio.files import SAMPLE_RATE
    from kimia_infer.data.pipeline.recognition import Heard

    loading = model_arguments(arguments)
    loading |= {"load_detokenizer": False, "kokoro": None, "kokoro_adapter": None}
    model = KimiAudio(arguments.weights, **loading)

    change = "" if model.quantization == "none" else f" in {model.quantization}"
    change += f" with {arguments.adapter}" if arguments.adapter else ""

    class Kimi:
        name = f"kimi-audio {arguments.weights}{change}"
        together = model.scheduler.slots

        def hear(self, wave: Any) -> Heard:
            return Heard(model.transcribe((wave, SAMPLE_RATE)).text)

    return Kimi()


def error_rate_between(text: str, other: str, language: str | None) -> float:
    """The error rate of ``text`` against ``other`` by the rules of evaluation."""
    from kimia_infer.data.manifests import error_rate
    from kimia_infer.evaluation.items import Item
    from kimia_infer.evaluation.score import Errors, score

    found = score(Item("", "", "", error_rate(language), [], other, language), text)
    assert isinstance(found, Errors)
    wrong = found.substitutions + found.deletions + found.insertions
    return wrong / found.reference_length if found.reference_length else float(bool(found.answer))


def show(made: Made) -> None:
    """Print what was kept, and what was dropped and why."""
    for row in made.unreadable:
        print(f"left out: {row['error']}", file=sys.stderr)
    minutes = sum(row["end"] - row["start"] for row in made.kept) / 60
    print(f"{len(made.kept)} of {len(made.segments)} segments kept, {minutes:.1f} min; dropped:")
    for name, (count, seconds) in made.faults().items():
        print(f"  {name:11} {count:6}  {seconds / 60:.1f} min")
