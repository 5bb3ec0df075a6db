"""Compute the speech codes of training data in advance, which makes training faster.

    kimi-audio extract-codes train.jsonl train.codes.jsonl --model weights/mini --workers 4

After an interruption the same command continues. Lines that cannot be used are left out and listed
in OUTPUT.bad.jsonl.
Exit status: 0 done, 1 lines were left out, 2 cannot be run, 130 interrupted.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from kimia_infer.commands.parser import DEVICE_HELP, WEIGHTS_HELP, Parser, check_positive

AFTER_INTERRUPTION = "the same command continues"
FAILED = 2


def add_arguments(parser: Parser) -> None:
    parser.add_argument("input", metavar="INPUT", type=Path, help="JSONL of conversations")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="the same with audio_tokens")
    parser.add_argument("--model", required=True, help=WEIGHTS_HELP)
    parser.add_argument(
        "--audio-root", type=Path, default=Path(), metavar="DIR", help="base of relative paths [.]"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes [1]")
    parser.add_argument("--device", help=DEVICE_HELP)


def check(parser: Parser, arguments: Namespace) -> None:
    check_positive(parser, arguments, "workers")


def run(arguments: Namespace) -> int:
    from kimia_infer.api.devices import parse_device
    from kimia_infer.data.extraction import extract_codes
    from kimia_infer.models.kimi_audio.checkpoint import resolve_weights

    written, faults = extract_codes(
        arguments.input,
        arguments.output,
        resolve_weights(arguments.model, detokenizer=False),
        arguments.audio_root,
        str(parse_device(arguments.device)),
        arguments.workers,
    )
    for fault in faults:
        print(f"left out: {fault['error']}", file=sys.stderr)
    print(f"{arguments.output}: {written} lines, {len(faults)} left out")
    return 1 if faults else 0
