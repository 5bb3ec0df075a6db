"""Train an adapter of Kokoro's prosody: durations, pitch and energy.

    kimi-audio finetune-kokoro model=weights/kokoro data=recordings.csv output=runs/mine
    kimi-audio finetune-kokoro model=weights/kokoro teacher_voice=am_adam output=runs/adam
    kimi-audio finetune-kokoro model=weights/kokoro output=runs/cfc objective=outputs \\
        adapter.method=replace adapter.cell=cfc
    kimi-audio finetune-kokoro run.yaml --resume

With recordings and their texts (data is .csv, .tsv or .jsonl), a voice learns to speak as they
do. Without, the model teaches itself, with the prosody of another voice if there is a
teacher_voice. Settings come from a YAML file, name=value arguments, or both; arguments win.
OUTPUT/final is an adapter; as MODEL/adapters/NAME it is loaded by its name.
"""

from __future__ import annotations

from argparse import Namespace

from kimia_infer.commands.parser import Parser
from kimia_infer.commands.settings import add_settings, check_settings, describe, read, report


def add_arguments(parser: Parser) -> None:
    add_settings(
        parser, describe("kimia_infer.training.tasks.kokoro_config", "KokoroTrainingConfig")
    )


check = check_settings


def run(arguments: Namespace) -> int:
    from kimia_infer.training.tasks.kokoro_config import KokoroTrainingConfig

    settings = read(KokoroTrainingConfig, arguments)
    from kimia_infer.training.tasks.kokoro import train_kokoro  # imports PyTorch: seconds

    return report(train_kokoro(settings, arguments.resume), settings.output)
