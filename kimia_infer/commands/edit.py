"""Change how a recording is spoken, with Step-Audio-EditX: one change at a time.

    kimi-audio edit voice.wav --emotion happy --transcript "What is said in voice.wav."
    kimi-audio edit voice.wav --speed faster --kimi-weights weights/mini --output fast.mp3
    kimi-audio edit noisy.m4a --denoise
    kimi-audio edit in.wav --paralinguistic "Well, [Laughter] come." --transcript "Well, come."

Without --transcript, Kimi-Audio writes down what is said; --denoise and --vad do without it.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from kimia_infer.commands import editing
from kimia_infer.commands.parser import Parser
from kimia_infer.models.step_audio_editx.edits import (
    NO_TEXT,
    OPTIONS,
    PARALINGUISTIC_TAGS,
    Edit,
)
from kimia_infer.utils.errors import RequestError, renamed

HELP = {
    "denoise": "take the noise out",
    "vad": "take long silence out",
    "paralinguistic": "add sounds: the text with "
    + ", ".join(f"[{t}]" for t in PARALINGUISTIC_TAGS),
}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("recording", type=Path, metavar="RECORDING")
    kinds = parser.add_argument_group("the change, one of them").add_mutually_exclusive_group(
        required=True
    )
    for kind, options in OPTIONS.items():
        if options:
            kinds.add_argument(f"--{kind}", metavar="NAME", help=", ".join(options))
        elif kind in NO_TEXT:
            kinds.add_argument(f"--{kind}", action="store_true", help=HELP[kind])
        else:
            kinds.add_argument(f"--{kind}", metavar="TEXT", help=HELP[kind])
    editing.add_arguments(parser, "output/edit.wav")


def asked(arguments: Namespace, words: str) -> Edit:
    """The change, to a recording in which ``words`` are said."""
    [(kind, value)] = [
        (kind, value)
        for kind in OPTIONS
        if (value := getattr(arguments, kind)) not in (None, False)
    ]
    if kind in NO_TEXT:
        return Edit(kind)
    return Edit(kind, value, words) if OPTIONS[kind] else Edit(kind, "", words, value)


def names_of(edit: Edit) -> dict[str, str]:
    return {"option": f"--{edit.kind}", "new_text": f"--{edit.kind}"}


def check(parser: Parser, arguments: Namespace) -> None:
    edit = asked(arguments, "the words of the recording")
    try:
        edit.check()
    except RequestError as error:
        parser.error(str(renamed(error, names_of(edit))))
    if edit.kind in NO_TEXT and arguments.transcript:
        parser.error(f"--transcript has no effect with --{edit.kind}")
    editing.check(parser, arguments, needs_words=edit.kind not in NO_TEXT)


def run(arguments: Namespace) -> int:
    edit = asked(arguments, "")
    return editing.carry_out(
        arguments,
        lambda words: asked(arguments, words),
        needs_words=edit.kind not in NO_TEXT,
        names=names_of(edit),
    )
