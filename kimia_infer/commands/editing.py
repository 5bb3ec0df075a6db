"""What `kimi-audio clone` and `kimi-audio edit` share: a recording, its words, the new speech."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kimia_infer.commands.parser import (
    DEVICE_HELP,
    WEIGHTS_HELP,
    Parser,
    add_dtype,
    add_quantization,
    model_settings,
)
from kimia_infer.commands.speak import FORMATS, check_format, write_speech
from kimia_infer.utils.errors import renamed_as
from kimia_infer.utils.files import no_file

if TYPE_CHECKING:
    from kimia_infer.api.editx import Clone, Edit
    from kimia_infer.serving.settings import Settings

EPILOG = """\
Recordings have 0.5 to 30 seconds of one person, and at least 16 kHz. Weights, 9 GB, are fetched
with: kimi-audio download --model editx (docs/editx.md).
Exit status: 0 done, 1 it cannot be done or there are no weights, 2 usage, 130 interrupted."""


def add_arguments(parser: Parser, output: str) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--transcript", metavar="TEXT", help="what is said in the recording [by Kimi-Audio]")
    add(
        "--kimi-weights",
        metavar="DIR",
        help="Kimi-Audio, which writes the transcript [KIMI_AUDIO_WEIGHTS]",
    )
    add("--seed", type=int, metavar="N", help="repeats the same speech [drawn]")
    add(
        "--output",
        type=Path,
        default=Path(output),
        metavar="FILE",
        help=f"{', '.join(FORMATS)} [%(default)s]",
    )
    add("--weights", help=f"{WEIGHTS_HELP} [KIMI_AUDIO_EDITX, else the cache]")
    add("--device", help=DEVICE_HELP)
    add_dtype(parser)
    add_quantization(parser)


def check(parser: Parser, arguments: Namespace, needs_words: bool) -> None:
    from kimia_infer.api.parameters import HIGHEST_SEED  # imports pydantic

    if not arguments.recording.is_file():
        parser.error(no_file(arguments.recording))
    check_format(parser, arguments.output)
    if arguments.seed is not None and not 0 <= arguments.seed <= HIGHEST_SEED:
        parser.error(f"--seed: expected 0 .. {HIGHEST_SEED}, found {arguments.seed}")
    arguments.kimi_weights = arguments.kimi_weights or os.environ.get("KIMI_AUDIO_WEIGHTS")
    if needs_words and not (arguments.transcript or "").strip() and not arguments.kimi_weights:
        parser.error(
            "--transcript: give what is said in the recording, or name Kimi-Audio in "
            "--kimi-weights to have it written down"
        )


def carry_out(
    arguments: Namespace,
    task: Callable[[str], Clone | Edit],
    needs_words: bool,
    names: Mapping[str, str],
) -> int:
    """Write what becomes of the recording; ``task`` takes its words.

    ``names`` are the arguments that the library's errors have other names for.
    """
    from kimia_infer.models.step_audio_editx.layout import find_editx

    settings = model_settings(arguments)
    weights = find_editx(arguments.weights)
    content = arguments.recording.read_bytes()

    from kimia_infer.api.editx import EditX  # imports PyTorch: seconds
    from kimia_infer.models.step_audio_editx.reference import load_reference
    from kimia_infer.utils.progress import progress

    named = {"audio": str(arguments.recording), "text": "--transcript", "seed": "--seed", **names}
    with renamed_as(named):
        load_reference(content)
        words = (arguments.transcript or "").strip()
        if needs_words and not words:
            words = written_down(content, arguments.kimi_weights, settings)
        quantization = settings.quantization or "none"
        model = EditX(weights, settings.device, settings.dtype, quantization)
        with progress("Speaking", unit="steps", bar_format="{desc}: {n} steps [{elapsed}]") as bar:

            def step() -> None:
                bar.update()

            answer = model.answer(content, task(words), arguments.seed, check=step)
    for note in answer.notes:
        print(f"note: {note}", file=sys.stderr)
    write_speech(answer, arguments.output)
    return 0


def written_down(content: bytes, weights: str, settings: Settings) -> str:
    """The words of a recording, from Kimi-Audio, which is not kept in memory."""
    from kimia_infer.api.editx_request import words_of
    from kimia_infer.api.kimia import KimiAudio

    model = KimiAudio(weights, **settings.transcriber_arguments())
    words = words_of(model, content)
    print(f"transcript: {words}", file=sys.stderr)
    return words
