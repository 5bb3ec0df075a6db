"""Download a checkpoint: about 44 GB, or 24 GB for text output only.

    kimi-audio download                      to ~/.cache/kimi-audio (or $KIMI_AUDIO_CACHE)
    kimi-audio download --to DIR
    kimi-audio download owner/name           a fine-tuned or slim checkpoint in the same layout

Downloads only the files that are needed, from the pinned revisions of the model and of its speech
tokenizer, and verifies sizes and checksums. After an interruption the same command keeps the files
that are complete. What the hub client has in its own cache (HF_HOME) is not downloaded again: it is
linked, or copied with --to. HF_TOKEN opens restricted repositories, HF_ENDPOINT names a mirror.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from kimia_infer.commands.parser import Parser

AFTER_INTERRUPTION = "the same command continues"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("repository", nargs="?", help="[moonshotai/Kimi-Audio-7B-Instruct]")
    parser.add_argument("--revision", help="[the pinned commit; main for other repositories]")
    parser.add_argument("--to", type=Path, metavar="DIR", help="[NAME in the cache]")
    parser.add_argument("--text-only", action="store_true", help="without speech output")


def run(arguments: Namespace) -> int:
    from kimia_infer.models.kimi_audio.checkpoint import MODEL, checkpoint_layout
    from kimia_infer.weights.download import download
    from kimia_infer.weights.resolve import local_copy, parse_hub_id

    layout = checkpoint_layout(detokenizer=not arguments.text_only)
    value = arguments.repository or MODEL.name
    if arguments.revision is not None:
        value = f"{value}@{arguments.revision}"
    name, revision = parse_hub_id(value, layout)
    directory = arguments.to or local_copy(name, revision, layout)
    download(directory, layout, name, revision, copies=arguments.to is not None)
    print(f"{directory} is complete")
    return 0
