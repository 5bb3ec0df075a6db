"""Transcribe, answer, speak or encode what a file or a directory has, here or on a cluster.

    kimi-audio batch transcribe recordings transcripts --weights weights/mini
    kimi-audio batch answer questions.jsonl answers --speech --input seed=0
    kimi-audio batch codes s3://bucket/data.parquet s3://bucket/codes --format parquet --ray
    kimi-audio batch speak stories spoken --input speaker=kokoro:af_heart --kokoro auto

INPUT is FILE.jsonl or FILE.parquet, whose rows have a path in "audio" or a text in "text" and other
inputs of the task (docs/cluster.md), or a directory: of recordings, or of *.txt to speak. OUTPUT is
a directory of parts with a row for each of INPUT, which has a "result", or else the reason as its
"error". Both may be URLs, such as s3://. The same command continues after an interruption.
Exit status: 0 done, 1 rows have errors, 2 cannot be run, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from kimia_infer.commands.parser import (
    WEIGHTS_HELP,
    Parser,
    UsageError,
    add_kokoro,
    add_model,
    check_adapter,
    check_kokoro,
    check_positive,
    model_variables,
)
from kimia_infer.commands.transcribe import SUFFIXES

TASKS = ("transcribe", "answer", "codes", "speak")
AFTER_INTERRUPTION = "the same command continues"
FAILED = 2


def add_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("task", metavar="TASK", choices=TASKS, help=", ".join(TASKS))
    add("source", metavar="INPUT", help="FILE.jsonl, FILE.parquet or a directory")
    add("output", metavar="OUTPUT", help="directory of the parts")
    add(
        "--input",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an input of every row that has none, such as seed=0",
    )
    add("--speech", action="store_true", help="speak the answers, too")
    add("--format", choices=("jsonl", "parquet"), default="jsonl", help="of parts [%(default)s]")
    add("--retry", action="store_true", help="do rows again that have an error")
    ray = parser.add_argument_group("on a cluster")
    ray.add_argument(
        "--ray", action="store_true", help="with Ray, here or on the cluster of RAY_ADDRESS"
    )
    ray.add_argument("--workers", type=int, metavar="N", help="models at a time [1]")
    model = parser.add_argument_group("the model")
    model.add_argument("--weights", help=f"{WEIGHTS_HELP} [KIMI_AUDIO_WEIGHTS]")
    add_model(model)
    add_kokoro(model)


def check(parser: Parser, arguments: Namespace) -> None:
    check_positive(parser, arguments, "workers")
    if arguments.workers is not None and not arguments.ray:
        parser.error("--workers goes with --ray")
    if arguments.speech and arguments.task != "answer":
        parser.error(f"--speech goes with answer, not with {arguments.task}")
    check_adapter(parser, arguments)
    check_kokoro(parser, arguments)
    arguments.weights = arguments.weights or os.environ.get("KIMI_AUDIO_WEIGHTS")
    # Workers of a cluster run in directories of their own.
    for name in ("source", "output", "weights"):
        value = getattr(arguments, name)
        if value and "://" not in value and (name != "weights" or Path(value).is_dir()):
            setattr(arguments, name, str(Path(value).expanduser().absolute()))


def given_inputs(assignments: list[str]) -> dict[str, Any]:
    """The values of ``NAME=VALUE``; of inputs that are no texts, numbers and true and false are
    read as such. Raises UsageError.
    """
    from kimia_infer.serving.cog.inputs import CogInputs

    fields = CogInputs.model_fields.items()
    texts = {name for name, field in fields if field.annotation in (str, str | None)}
    inputs = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"--input: expected NAME=VALUE, found {assignment!r}")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = None
        number = isinstance(parsed, bool | int | float) and name not in texts
        inputs[name] = parsed if number else value
    return inputs


def run(arguments: Namespace) -> int:
    from kimia_infer.cluster.batch import run_batch, run_here
    from kimia_infer.cluster.rows import TEXTS, read_source
    from kimia_infer.cluster.work import Work
    from kimia_infer.models.kimi_audio.checkpoint import weights_from_environment
    from kimia_infer.serving.settings import Settings

    texts = arguments.task == "speak"
    source = read_source(
        arguments.source, "text" if texts else "audio", TEXTS if texts else sorted(SUFFIXES)
    )
    variables = model_variables(arguments)
    names = [f"KIMI_AUDIO_{name.upper()}" for name in Settings.model_fields]
    work = Work(
        arguments.task,
        arguments.weights or weights_from_environment(),
        given_inputs(arguments.input),
        {name: variables[name] for name in names if name in variables},
        source.folder,
        arguments.output,
        arguments.speech or texts,
    )
    runner = on_ray(arguments) if arguments.ray else run_here
    summary = run_batch(work, source, arguments.format, arguments.retry, runner)
    print(f"{arguments.output}: {summary.rows} rows, {summary.errors} with errors")
    if summary.errors:
        print("batch: --retry does rows again that have an error", file=sys.stderr)
    return 1 if summary.errors else 0


def on_ray(arguments: Namespace) -> Any:
    """What gives the rows to workers, with Ray started."""
    from kimia_infer.commands.serve_ray import cores, package_path, start_ray

    start_ray({"PYTHONPATH": package_path(os.environ)})
    import ray

    from kimia_infer.cluster.ray_data import RayRunner

    workers = arguments.workers or 1
    on_cpu = model_variables(arguments).get("KIMI_AUDIO_DEVICE") == "cpu"
    gpus = 1 if ray.cluster_resources().get("GPU") and not on_cpu else 0
    return RayRunner(workers, cores(workers), gpus)
