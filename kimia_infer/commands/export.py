"""Write a training run as a directory to serve from.

    kimi-audio export runs/mine adapters/mine                # an adapter, which serving adds
    kimi-audio export runs/mine weights/mine --merge         # the model with the adapter added
    kimi-audio export runs/mine/checkpoints/step-00000100 weights/early --merge
    kimi-audio export runs/mine weights/slim-mine --merge --base weights/slim
    kimi-audio export runs/vocoder weights/voice --base weights/mini      # from train-codec
    kimi-audio export runs/adam weights/kokoro/adapters/adam              # from finetune-kokoro

SOURCE is a finished run, a checkpoint of one, or the directory of a model or adapter. A model keeps
the published names and the dtypes of the model that was trained; weights that did not change are
hard links where the file system allows. OUTPUT appears only when it is complete.
"""

from __future__ import annotations

import shlex
from argparse import Namespace
from pathlib import Path

from kimia_infer.commands.parser import Parser

AFTER_INTERRUPTION = "nothing was written"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=Path, help="run, checkpoint or directory")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="directory to write")
    parser.add_argument("--merge", action="store_true", help="add an adapter to its model")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="directory or owner/name[@revision] of the model that an adapter is added to [the one "
        "it was trained on], or whose component is replaced",
    )
    parser.add_argument("--force", action="store_true", help="replace a model or adapter in OUTPUT")


def run(arguments: Namespace) -> int:
    from kimia_infer.training.export import export

    served = export(
        arguments.source, arguments.output, arguments.merge, arguments.base, arguments.force
    )
    command = arguments.program.replace("export", "serve").split()
    print(shlex.join([*command, *served]) if served else arguments.output)
    return 0
