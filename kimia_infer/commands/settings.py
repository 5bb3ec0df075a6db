"""What the training commands share: settings as arguments, and the report of a run."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kimia_infer.commands.parser import Parser, UsageError

if TYPE_CHECKING:
    from kimia_infer.training.trainer import Outcome

Settings = TypeVar("Settings")

STOPPED = 130


def describe(module: str, name: str) -> str:
    """The settings class ``name`` for a help text, a line per setting.

    Where the package that checks settings is not installed yet, where to find it instead.
    """
    try:
        settings = getattr(importlib.import_module(module), name)
        lines = importlib.import_module("kimia_infer.training.config").describe(settings)
    except ImportError:
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


def check_settings(parser: Parser, arguments: Namespace) -> None:
    files = [text for text in arguments.settings if "=" not in text]
    if len(files) > 1:
        parser.error(f"more than one settings file: {', '.join(files)}")


def read(kind: type[Settings], arguments: Namespace) -> Settings:
    from kimia_infer.training.config import read_settings

    files = [Path(text) for text in arguments.settings if "=" not in text]
    assignments = [text for text in arguments.settings if "=" in text]
    try:
        return read_settings(kind, files[0] if files else None, assignments)
    except ValueError as error:
        raise UsageError(str(error)) from error


def report(outcome: Outcome, output: Any) -> int:
    """Print where the result is and its last losses; the exit status."""
    from kimia_infer.training.run_directory import FINAL

    if not outcome.complete:
        print(f"stopped; --resume continues from {outcome.checkpoint}", file=sys.stderr)
        return STOPPED
    if outcome.metrics:  # only the main process has them
        last = {name: value for line in outcome.metrics for name, value in line.items()}
        losses = [f"{name} {last[name]:.4g}" for name in ("loss", "eval_loss") if name in last]
        print(f"{Path(output) / FINAL}: {outcome.step} steps, {', '.join(losses)}")
    return 0
