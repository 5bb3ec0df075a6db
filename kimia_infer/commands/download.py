"""Download a checkpoint.

    kimi-audio download                      to weights/Kimi-Audio-7B-Instruct
    kimi-audio download --to DIR
    kimi-audio download owner/name           a fine-tuned or slim checkpoint in the same layout

Only the files that are needed are fetched, from the pinned revisions of the model and of its
speech tokenizer. Sizes and checksums are verified. An interrupted download is continued by the
same command. HF_TOKEN opens restricted repositories, HF_ENDPOINT names a mirror.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from kimia_infer.commands.parser import Parser

AFTER_INTERRUPTION = "the same command continues"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("repository", nargs="?", help="[moonshotai/Kimi-Audio-7B-Instruct]")
    parser.add_argument("--revision", help="[the pinned commit; main for other repositories]")
    parser.add_argument("--to", type=Path, metavar="DIR", help="[weights/NAME]")
    parser.add_argument("--text-only", action="store_true", help="leave speech output out")


def run(arguments: Namespace) -> int:
    from kimia_infer.models.kimi_audio.published import MODEL
    from kimia_infer.weights.download import download_weights
    from kimia_infer.weights.resolve import local_copy, parse_hub_id

    value = arguments.repository or MODEL.name
    if arguments.revision is not None:
        value = f"{value}@{arguments.revision}"
    name, revision = parse_hub_id(value)
    directory = arguments.to or local_copy(name, revision)
    download_weights(directory, name, revision, detokenizer=not arguments.text_only)
    print(f"{directory} is complete")
    return 0
