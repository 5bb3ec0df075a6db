"""``kimi-audio NAME``: runs the command and prints errors in one line."""

from __future__ import annotations

import errno
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Sequence

from kimia_infer.commands.parser import Parser, UsageError, message_prefix

COMMANDS = {
    "serve": "serve the model: for OpenAI's clients and a browser, or with Cog's server",
    "infer": "ask for one answer, from a model that is loaded here or from a server",
    "transcribe": "write down what is said in recordings, as text or subtitles",
    "batch": "transcribe, answer, speak or encode many recordings or texts, also on a cluster",
    "speak": "speak a text in one of Kokoro's voices",
    "clone": "say a text in the voice of a recording, with Step-Audio-EditX",
    "edit": "change how a recording is spoken: emotion, style, speed, noise, silence, sounds",
    "download": "download a checkpoint",
    "prepare": "write a slim checkpoint for serving, also quantized",
    "evaluate": "measure error rates, accuracy and speed on your data",
    "finetune": "fine-tune the language model, whole or with adapters",
    "finetune-kokoro": "train an adapter of Kokoro's prosody",
    "train-codec": "train a component of the codec: another voice, or other codes",
    "export": "write a training run as a directory to serve from",
    "extract-codes": "compute the speech codes of training data in advance",
    "convert-manifest": "turn a table of audio files and texts into training data",
    "make-data": "make training data from long recordings: speakers, texts, filters",
}

EXTRAS = {
    **dict.fromkeys(("cog", "fastapi", "limits", "prometheus_client"), "serve"),
    **dict.fromkeys(("python_multipart", "silero_vad", "uvicorn", "websockets"), "serve"),
    "accelerate": "train",
    "bitsandbytes": "train",
    "faster_whisper": "data",
    "matplotlib": "train",
    "peft": "train",
    "pyarrow": "ray",
    "ray": "ray",
    "jiwer": "eval",
    "onnx": "kokoro",
    "onnxruntime": "editx",
    "scipy": "data",
    "whisper_normalizer": "eval",
}
"""Packages that only some commands need, and the extra that installs each."""

INTERRUPTED = 130


def main() -> int:
    """The entry point of the installed package."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {name:18}{text}" for name, text in COMMANDS.items()]
        print("usage: kimi-audio COMMAND [arguments]; kimi-audio COMMAND --help", *lines, sep="\n")
        return 0
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"kimi-audio: expected a command ({known}), found {name!r}", file=sys.stderr)
        return 2
    return run_command(name, arguments, f"kimi-audio {name}")


def run_command(
    name: str, arguments: Sequence[str], program: str, prepare: Callable[[], None] | None = None
) -> int:
    """Run a command; the exit status.

    ``program`` is what the user called, for messages. ``prepare`` is called when the arguments are
    good and before anything that has to be installed is imported.
    """
    command = importlib.import_module(f"kimia_infer.commands.{name.replace('-', '_')}")
    description = (inspect.getdoc(command) or "").replace("kimi-audio " + name, program)
    parser = Parser(prog=program, description=description)
    parser.set_defaults(program=program)
    prefix = message_prefix(program)
    try:
        command.add_arguments(parser)
        parsed = parser.parse_args(arguments)
        if hasattr(command, "check"):
            command.check(parser, parsed)
        bare = hasattr(command, "needs_packages") and not command.needs_packages(parsed)
        if prepare is not None and not bare:
            prepare()
        logging.basicConfig(format="%(message)s")
        return command.run(parsed)
    except KeyboardInterrupt:
        hint = getattr(command, "AFTER_INTERRUPTION", "")
        print(f"{prefix}: interrupted{hint and f'; {hint}'}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not is_message(error):
            raise
        extra = EXTRAS.get(getattr(error, "name", None) or "")
        remedy = f"; install it with: pip install 'kimia-infer[{extra}]'" if extra else ""
        print(f"{prefix}: {explain(error)}{remedy}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else getattr(command, "FAILED", 1)


def explain(error: Exception) -> str:
    """The text of an error; that of the system begins with the file and has no number."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    where = "" if error.filename is None else f"{error.filename}: "
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{where}{error.strerror}{'; make room for the output' if full else ''}"


def is_message(error: Exception) -> bool:
    """Whether an error is for the user: the library's, of a file, or of a missing package."""
    own = type(error).__module__.partition(".")[0] == "kimia_infer"
    return own or isinstance(error, OSError | ImportError)
