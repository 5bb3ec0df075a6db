"""Measure a model on your data: word and character error rates, accuracy and speed.

    kimi-audio evaluate test.jsonl --language en --weights weights/mini --output runs/evaluation
    kimi-audio evaluate --recipe librispeech --data /data/LibriSpeech
        --weights moonshotai/Kimi-Audio-7B-Instruct --output runs/published

A manifest (JSONL, CSV, TSV) has an audio file and a reference per line. A recipe makes a manifest
of your copy of a published data set. DIR gets report.md, report.json and answers.jsonl, which has
every answer with its score. After an interruption the same command continues.
docs/evaluation.md describes manifests, scores, speed and recipes.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from kimia_infer.commands.parser import (
    WEIGHTS_HELP,
    Parser,
    add_model,
    check_adapter,
    check_positive,
    model_arguments,
)

if TYPE_CHECKING:
    from kimia_infer.api.kimia import KimiAudio
    from kimia_infer.evaluation.items import Manifest
    from kimia_infer.evaluation.results import EvaluationConfig

AFTER_INTERRUPTION = "the same command continues"
FAILED = 2

METRICS = ("wer", "cer", "accuracy", "match", "none")
RECIPES = (
    *("librispeech", "aishell-1", "aishell-2", "wenetspeech", "fleurs", "mmau", "clotho-aqa"),
    *("vocalsound", "nonspeech7k", "meld", "tut2017", "cochlscene"),
)
SAMPLING = {
    "text_temperature": (float, 0.0),
    "text_top_k": (int, 5),
    "text_repetition_penalty": (float, 1.0),
    "text_repetition_window_size": (int, 16),
    "max_new_tokens": (int, -1),
    "seed": (int, 0),
}

EPILOG = f"""\
recipes: {", ".join(RECIPES[:8])},
         {", ".join(RECIPES[8:])}
exit status: 0 done, 1 errors or lines left out, 2 cannot be run, 130 interrupted"""


def add_arguments(parser: Parser) -> None:
    parser.usage = (
        "%(prog)s [MANIFEST ...] [--recipe NAME --data DIR ...] --weights DIR --output DIR [...]"
    )
    parser.epilog = EPILOG
    add = parser.add_argument
    add("manifests", nargs="*", metavar="MANIFEST", type=Path)
    add("--recipe", action="append", default=[], choices=RECIPES, metavar="NAME",
        help="a data set; may be repeated, each with a --data")  # fmt: skip
    add("--data", action="append", default=[], metavar="DIR", type=Path, help="its directory")
    add("--output", type=Path, required=True, metavar="DIR", help="directory for the results")
    add("--batch-size", type=int, default=1, metavar="N",
        help="items to answer together; 16 is good on a large GPU [1]")  # fmt: skip
    add("--limit", type=int, metavar="N", help="only the first N items of each manifest")
    add("--retry-errors", action="store_true", help="repeat items that failed")
    model = parser.add_argument_group("the model")
    model.add_argument("--weights", default=os.environ.get("KIMI_AUDIO_WEIGHTS"),
        help=f"{WEIGHTS_HELP} [KIMI_AUDIO_WEIGHTS]")  # fmt: skip
    add_model(model)
    rows = parser.add_argument_group("defaults for lines of manifests")
    rows.add_argument("--metric", choices=METRICS, help="how to score [depends on the line]")
    rows.add_argument("--language", metavar="CODE", help="such as en or zh")
    rows.add_argument("--question", metavar="TEXT", help="to transcribe [the published one]")
    rows.add_argument(
        "--audio-root", type=Path, metavar="DIR", help="base of relative paths [the manifest's]"
    )
    how = parser.add_argument_group("sampling, the same for every item")
    for name, (kind, default) in SAMPLING.items():
        option = "--" + name.replace("_", "-")
        metavar = "N" if kind is int else "X"
        how.add_argument(option, type=kind, metavar=metavar, default=default, help=f"[{default}]")
    how.add_argument("--stop-repetition", action="store_true", help="end texts that repeat")
    how.add_argument("--timeout-seconds", type=float, metavar="X", help="per item [no limit]")


def check(parser: Parser, arguments: Namespace) -> None:
    if not arguments.manifests and not arguments.recipe:
        parser.error("nothing to evaluate: give a manifest or --recipe")
    if len(arguments.recipe) != len(arguments.data):
        parser.error("every --recipe needs its own --data")
    if not arguments.weights:
        parser.error("--weights is missing, and KIMI_AUDIO_WEIGHTS is not set")
    check_positive(parser, arguments, "limit", "batch_size")
    check_adapter(parser, arguments)


def run(arguments: Namespace) -> int:
    from kimia_infer.api.parameters import MAX_SLOTS
    from kimia_infer.evaluation.results import EvaluationConfig
    from kimia_infer.evaluation.run import evaluate

    names = (*SAMPLING, "stop_repetition", "timeout_seconds")
    weights, kept = arguments.weights, ("adapter", "device", "dtype", "limit", "quantization")
    if arguments.slots is None:
        arguments.slots = min(arguments.batch_size, MAX_SLOTS)
    config = EvaluationConfig(
        weights=str(Path(weights).resolve()) if Path(weights).is_dir() else weights,
        sampling={name: getattr(arguments, name) for name in names},
        **{name: getattr(arguments, name) for name in kept},
    )
    outcome = evaluate(
        read_manifests(arguments),
        config,
        arguments.output,
        lambda config: load_model(config, arguments),
        arguments.retry_errors,
        arguments.batch_size,
    )
    print(outcome.report.read_text(encoding="utf-8"))
    print(
        f"{outcome.report}: {outcome.answered} answered, {outcome.errors} errors, "
        f"{outcome.faults} lines left out",
        file=sys.stderr,
    )
    return 1 if outcome.errors or outcome.faults else 0


def read_manifests(arguments: Namespace) -> list[Manifest]:
    """The given manifests, and those of the recipes."""
    from kimia_infer.data.recipes import write_manifest
    from kimia_infer.evaluation.items import Defaults, read_manifest

    given = (arguments.metric, arguments.language, arguments.question)
    manifests = [
        read_manifest(path, Defaults(arguments.audio_root or path.parent, *given))
        for path in arguments.manifests
    ]
    folder = arguments.output / "manifests"
    for name, data in zip(arguments.recipe, arguments.data, strict=True):
        manifests.append(read_manifest(write_manifest(name, data, folder), Defaults(folder)))
    return manifests


def load_model(config: EvaluationConfig, arguments: Namespace) -> KimiAudio:
    """The model as the predictors load it, for text alone."""
    from kimia_infer.api.kimia import KimiAudio

    return KimiAudio(config.weights, **model_arguments(arguments) | {"load_detokenizer": False})
