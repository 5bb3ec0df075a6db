"""The argument parser of every command, and the arguments that several commands have."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from kimia_infer.serving.settings import Settings

QUANTIZATIONS = ("none", "fp8", "int8", "int4")
DTYPES = ("float32", "bfloat16")


class UsageError(Exception):
    """An argument cannot be used; the message names it, and the exit status is 2."""


class Parser(argparse.ArgumentParser):
    """Help as in the docstring of a command; errors in one line with status 2."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Formatter)
        super().__init__(allow_abbrev=False, **options)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        arguments, unknown = self.parse_known_args(args)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, 1)
            self.error(f"unknown argument {name}" + (f"; did you mean {near[0]}?" if near else ""))
        return arguments

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message_prefix(self.prog)}: {message} (see --help)\n")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def message_prefix(program: str) -> str:
    """The first word of messages: ``infer`` for ``scripts/infer``."""
    return program.removeprefix("scripts/")


WEIGHTS_HELP = "checkpoint directory or owner/name[@revision]"
DEVICE_HELP = "cpu, cuda, cuda:1, ... [the accelerator, else cpu]"


def add_dtype(group: Any) -> None:
    group.add_argument("--dtype", choices=DTYPES, help="[bfloat16 on accelerators, float32 on CPU]")


def add_quantization(group: Any) -> None:
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        metavar="SCHEME",
        help=f"{', '.join(QUANTIZATIONS)} [KIMI_AUDIO_QUANTIZATION, else as stored]",
    )


def add_change(group: Any) -> None:
    """How weights are changed while they are loaded."""
    add_quantization(group)
    group.add_argument(
        "--adapter", metavar="DIR", help="add an adapter from finetune [KIMI_AUDIO_ADAPTER]"
    )


def add_slots(group: Any) -> None:
    group.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help="requests at a time [KIMI_AUDIO_SLOTS, else what fits; 8 on the CPU]",
    )


def add_kokoro(group: Any) -> None:
    group.add_argument(
        "--kokoro",
        metavar="DIR|auto",
        help="offer the voices of Kokoro [KIMI_AUDIO_KOKORO, else none]",
    )
    group.add_argument(
        "--kokoro-adapter",
        metavar="NAME|DIR",
        help="adapter of Kokoro's prosody [KIMI_AUDIO_KOKORO_ADAPTER]",
    )


def add_model(group: Any) -> None:
    """How a model is loaded; environment variables are the defaults."""
    group.add_argument("--device", help=DEVICE_HELP)
    group.add_argument(
        "--speech-device",
        metavar="DEVICE",
        help="for encoders, detokenizer and vocoder [--device]",
    )
    add_slots(group)
    add_dtype(group)
    add_change(group)


MODEL_ARGUMENTS = (
    *("device", "speech_device", "slots", "dtype", "quantization", "adapter", "kokoro"),
    "kokoro_adapter",
)


def model_variables(arguments: argparse.Namespace) -> dict[str, str]:
    """The environment, overridden by arguments of the same names."""
    names = (*MODEL_ARGUMENTS, "editx")
    given = {f"KIMI_AUDIO_{name.upper()}": getattr(arguments, name, None) for name in names}
    return os.environ | {
        name: str(value) for name, value in given.items() if value not in (None, "")
    }


def model_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of KimiAudio besides its weights, as the predictors load it.

    Raises what :func:`model_settings` does.
    """
    return model_settings(arguments).model_arguments()


def model_settings(arguments: argparse.Namespace) -> Settings:
    """How the model is run, by the arguments and the environment.

    Raises UsageError naming the argument, or the variable where that is not given.
    """
    from kimia_infer.serving.settings import Settings, read_settings
    from kimia_infer.utils.errors import ConfigurationError

    try:
        return read_settings(Settings, model_variables(arguments))
    except ConfigurationError as error:
        name, _, reason = str(error).partition(": ")
        short = name.removeprefix("KIMI_AUDIO_").lower()
        given = short in MODEL_ARGUMENTS and getattr(arguments, short, None) is not None
        option = f"--{short.replace('_', '-')}"
        raise UsageError(f"{option if given else name}: {reason}") from error


def check_adapter(parser: Parser, arguments: argparse.Namespace) -> None:
    """Make the adapter, also one from the environment, an absolute path."""
    name = arguments.adapter or os.environ.get("KIMI_AUDIO_ADAPTER")
    if name:
        adapter = Path(name).expanduser()
        if not adapter.is_dir():
            parser.error(f"--adapter: {adapter} is not a directory")
        arguments.adapter = str(adapter.resolve())


def check_kokoro(parser: Parser, arguments: argparse.Namespace) -> None:
    """Make the directories of Kokoro and of its adapter absolute, also from the environment."""
    name = arguments.kokoro or os.environ.get("KIMI_AUDIO_KOKORO")
    if name and name != "auto":
        directory = Path(name).expanduser()
        if not directory.is_dir():
            parser.error(f"--kokoro: {directory} is not a directory, nor auto")
        arguments.kokoro = str(directory.resolve())
    adapter = arguments.kokoro_adapter or os.environ.get("KIMI_AUDIO_KOKORO_ADAPTER")
    if adapter and not name:
        parser.error("--kokoro-adapter needs --kokoro")
    if adapter and Path(adapter).expanduser().is_dir():
        arguments.kokoro_adapter = str(Path(adapter).expanduser().resolve())


def check_positive(parser: Parser, arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, found {value}")
