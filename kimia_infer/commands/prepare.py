"""Write a slim checkpoint: only what serving needs, in the dtype in which it is served.

    kimi-audio prepare moonshotai/Kimi-Audio-7B-Instruct weights/slim
    kimi-audio prepare /data/Kimi-Audio-7B-Instruct /data/int8 --quantization int8
    kimi-audio prepare moonshotai/Kimi-Audio-7B-Instruct weights/laptop --for cpu --text-only

SOURCE is a checkpoint directory, or a hub repository, which is downloaded first. It is only read.
TARGET must be new, or written by the same command, which continues after an interruption and
verifies and repairs a complete TARGET. A slim checkpoint in bfloat16 (the speech tokenizer stays in
float32) gives the same answers as SOURCE served in bfloat16; --dtype source keeps every tensor as
it is, for serving in float32. A quantized checkpoint is served quantized; see docs/quantization.md.
With --for cpu it is served on a CPU alone, which maps the files of its matrices.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from kimia_infer.commands.parser import QUANTIZATIONS, Parser

AFTER_INTERRUPTION = "the same command continues"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="directory or owner/name[@revision]")
    parser.add_argument("target", metavar="TARGET", type=Path, help="directory to write")
    parser.add_argument(
        "--dtype", choices=("served", "source"), default="served", help="dtypes [%(default)s]"
    )
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="quantize the layers of the language model [none; int4 with --for cpu]",
    )
    parser.add_argument(
        "--for",
        choices=("cpu",),
        dest="target_device",
        help="keep the quantized matrices as a CPU reads them; int8 or int4",
    )
    parser.add_argument("--text-only", action="store_true", help="without speech output")


def run(arguments: Namespace) -> int:
    from kimia_infer.models.kimi_audio.checkpoint import resolve_weights

    source = resolve_weights(arguments.source, detokenizer=not arguments.text_only)
    from kimia_infer.models.kimi_audio.slim import prepare_weights  # imports PyTorch: seconds

    packed = arguments.target_device == "cpu"
    manifest = prepare_weights(
        source,
        arguments.target,
        arguments.dtype,
        quantization=arguments.quantization or ("int4" if packed else "none"),
        packed=packed,
        detokenizer=not arguments.text_only,
    )
    read = sum(file["size"] for file in manifest.source_files.values())
    written = sum(file.size for file in manifest.files.values())
    files = f"{len(manifest.files)} files, {written:,} bytes instead of {read:,}"
    print(f"{arguments.target} is complete: {files}")
    return 0
