"""Turn a table of audio files and texts (CSV, TSV, JSONL) into training data.

    kimi-audio convert-manifest metadata.csv train.jsonl
    kimi-audio convert-manifest manifest.jsonl train.jsonl --audio audio_filepath --text text

Each row becomes a conversation: a question and the audio, answered by the text. Where a row means
a part of its recording, by start and end or offset and duration (in seconds), that is written to
OUTPUT.parts. Rows without text, of another width than the header, or whose audio file does not
exist, are left out and listed.
Exit status: 0 done, 1 rows were left out, 2 cannot be run.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from kimia_infer.commands.parser import Parser

FAILED = 2


def add_arguments(parser: Parser) -> None:
    parser.add_argument("input", metavar="MANIFEST", type=Path)
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="JSONL of conversations")
    parser.add_argument("--audio", metavar="FIELD", help="column with the path [found by its name]")
    parser.add_argument(
        "--text", metavar="FIELD", help="column with the answer [found by its name]"
    )
    parser.add_argument("--question-field", metavar="FIELD", help="column with the question")
    parser.add_argument("--question", help="question of all rows [the published one to transcribe]")
    parser.add_argument(
        "--audio-root", type=Path, metavar="DIR", help="base of relative paths [that of MANIFEST]"
    )


def run(arguments: Namespace) -> int:
    from kimia_infer.data.manifests import QUESTION, convert_manifest

    count, faults = convert_manifest(
        arguments.input,
        arguments.output,
        arguments.audio_root or arguments.input.parent,
        arguments.audio,
        arguments.text,
        arguments.question_field,
        arguments.question or QUESTION,
    )
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    print(f"{arguments.output}: {count} lines, {len(faults)} left out")
    return 1 if faults else 0
