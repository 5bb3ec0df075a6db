"""Fine-tune the language model of a checkpoint.

    kimi-audio finetune model=weights/mini data=train.jsonl output=runs/first
    kimi-audio finetune lora.yaml learning_rate=2e-4 lora.rank=16
    kimi-audio finetune lora.yaml --resume
    torchrun --nproc-per-node 8 scripts/finetune full.yaml

Settings come from a YAML file, name=value arguments, or both; arguments win. OUTPUT/final is a
checkpoint directory to serve (method=full) or an adapter directory (method=lora and qlora).
"""

from __future__ import annotations

import logging
from argparse import Namespace

from kimia_infer.commands.parser import Parser
from kimia_infer.commands.settings import add_settings, check_settings, describe, read, report


def add_arguments(parser: Parser) -> None:
    add_settings(parser, describe("kimia_infer.training.config", "FinetuneConfig"))


check = check_settings


def run(arguments: Namespace) -> int:
    from kimia_infer.training.config import FinetuneConfig

    settings = read(FinetuneConfig, arguments)
    # Its warning is about a kernel that is not used.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from accelerate import PartialState  # imports PyTorch: seconds

    from kimia_infer.training.tasks.finetune import finetune

    result = finetune(settings, arguments.resume)
    PartialState().destroy_process_group()
    return report(result, settings.output)
