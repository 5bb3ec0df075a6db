"""Say a text in the voice of a recording, with Step-Audio-EditX.

    kimi-audio clone voice.wav "What should be said." --transcript "What is said in voice.wav."
    kimi-audio clone voice.m4a "Good morning." --kimi-weights weights/mini --output hi.mp3
    fortune | kimi-audio clone voice.wav - --transcript "I am a cat."

Without --transcript, Kimi-Audio writes down what is said in the recording.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from kimia_infer.commands import editing
from kimia_infer.commands.parser import Parser, UsageError
from kimia_infer.commands.speak import read_text

if TYPE_CHECKING:
    from kimia_infer.api.editx import Clone


def add_arguments(parser: Parser) -> None:
    parser.add_argument("recording", type=Path, metavar="RECORDING", help="of the voice")
    parser.add_argument("text", metavar="TEXT", help="what to say; - reads standard input")
    parser.set_defaults(file=None)
    editing.add_arguments(parser, "output/clone.wav")


def check(parser: Parser, arguments: Namespace) -> None:
    if not arguments.text.strip():
        parser.error("TEXT: expected what to say, found none")
    editing.check(parser, arguments, needs_words=True)


def run(arguments: Namespace) -> int:
    text = read_text(arguments).strip()
    if not text:
        raise UsageError("TEXT: expected what to say, found none")

    def task(words: str) -> Clone:
        from kimia_infer.api.editx import Clone

        return Clone(words, text)

    return editing.carry_out(arguments, task, needs_words=True, names={"target": "TEXT"})
