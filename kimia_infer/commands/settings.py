"""Settings of the training commands as arguments, and the last lines of a run."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kimia_infer.commands.parser import Parser, UsageError

if TYPE_CHECKING:
    from kimia_infer.training.config import Config
    from kimia_infer.training.trainer import TrainingResult

Kind = TypeVar("Kind", bound="Config")

STOPPED = 130


def describe(module: str, name: str) -> str:
    """The settings class ``name`` for a help text, a line per setting."""
    try:
        settings = getattr(importlib.import_module(module), name)
        lines = importlib.import_module("kimia_infer.training.config").describe(settings)
    except ImportError:  # pydantic is not installed yet
        lines = ["docs/training.md lists them; they are shown here once the environment is set up"]
    return "settings [default]:\n  " + "\n  ".join(lines)


def add_settings(parser: Parser, epilog: str) -> None:
    parser.epilog = epilog
    parser.add_argument(
        "settings", nargs="+", metavar="FILE.yaml|name=value", help="at most one file"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint of output"
    )


def settings_files(arguments: Namespace) -> list[str]:
    return [text for text in arguments.settings if "=" not in text]


def check_settings(parser: Parser, arguments: Namespace) -> None:
    if len(files := settings_files(arguments)) > 1:
        parser.error(f"more than one settings file: {', '.join(files)}")


def read(kind: type[Kind], arguments: Namespace) -> Kind:
    """The settings, checked together with the paths in them."""
    from kimia_infer.training.config import read_config
    from kimia_infer.training.run_directory import path_faults

    file = next(map(Path, settings_files(arguments)), None)
    assignments = [text for text in arguments.settings if "=" in text]
    try:
        return read_config(kind, file, assignments, partial(path_faults, resume=arguments.resume))
    except ValueError as error:
        raise UsageError(str(error)) from error


def report(result: TrainingResult, output: str) -> int:
    """Print the result's directory and last losses; the exit status."""
    from kimia_infer.training.report import last_losses
    from kimia_infer.training.run_directory import FINAL

    if not result.complete:
        print(f"stopped; --resume continues from {result.checkpoint}", file=sys.stderr)
        return STOPPED
    if result.metrics:  # only the main process has them
        print(f"{Path(output) / FINAL}: {result.step} steps, {last_losses(result.metrics)}")
    return 0
