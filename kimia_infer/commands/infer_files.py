"""`kimi-audio infer` with several recordings: each is answered on its own, several at a time."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kimia_infer.commands.parser import Parser, UsageError, model_arguments
from kimia_infer.utils.errors import RequestError

if TYPE_CHECKING:
    from kimia_infer.api.kimia import KimiAudio
    from kimia_infer.api.request import Deadline
    from kimia_infer.serving.cog.inputs import CogInputs

DEFAULT_DIRECTORY = Path("answers")


def check_files(parser: Parser, arguments: Namespace) -> None:
    """Refuse what goes with a single recording only, and answers that would have one name."""
    for name in ("url", "answer", "history", "metrics"):
        if getattr(arguments, name):
            parser.error(f"--{name} goes with a single --audio")
    if arguments.output.suffix:
        parser.error(f"--output: with several --audio it is a directory, found {arguments.output}")
    stem, count = Counter(path.stem for path in arguments.audio).most_common(1)[0]
    if count > 1:
        parser.error(f"--audio: the answers to {count} files would be called {stem}.wav")
    if arguments.output.exists() and not arguments.output.is_dir():
        parser.error(f"--output: {arguments.output} is no directory")


def answer_files(arguments: Namespace, given: dict[str, Any]) -> int:
    """Print a line for each recording, in order; 1 if one of them was refused."""
    from kimia_infer.models.kimi_audio.checkpoint import weights_from_environment
    from kimia_infer.serving.cog.inputs import parse_inputs

    try:
        inputs = {path: parse_inputs(given | {"audio": path}) for path in arguments.audio}
    except RequestError as error:
        raise UsageError(str(error)) from error
    weights = arguments.weights or weights_from_environment()

    from kimia_infer.api.kimia import KimiAudio  # imports PyTorch: seconds
    from kimia_infer.api.request import Deadline
    from kimia_infer.utils.progress import progress

    first = inputs[arguments.audio[0]]
    loading = model_arguments(arguments)
    loading["load_detokenizer"] = first.task == "chat" and first.output_type == "both"
    model = KimiAudio(weights, **loading)
    deadline, failed = Deadline(None), 0
    pool = ThreadPoolExecutor(model.scheduler.slots)
    try:
        answers = {
            path: pool.submit(_answer, model, asked, deadline, arguments.output)
            for path, asked in inputs.items()
        }
        with progress("Answering", len(answers), "files") as bar:
            for path, answer in answers.items():
                try:
                    print(f"{path}: {answer.result()}", flush=True)
                except RequestError as error:
                    failed += 1
                    print(f"infer: {path}: {error}", file=sys.stderr, flush=True)
                bar.update()
    finally:
        deadline.cancel()
        pool.shutdown(cancel_futures=True)
    if failed:
        print(f"infer: {failed} of {len(inputs)} files were refused", file=sys.stderr)
    return 1 if failed else 0


def _answer(model: KimiAudio, inputs: CogInputs, deadline: Deadline, directory: Path) -> str:
    """The text of the answer; its speech is written to the directory."""
    from kimia_infer.api.events import Completion
    from kimia_infer.api.transcription import Transcript
    from kimia_infer.audio.files import wav_bytes
    from kimia_infer.serving.cog.inputs import respond

    *_, answer = respond(model, inputs, deadline=deadline)
    assert isinstance(answer, Completion | Transcript) and inputs.audio is not None
    if isinstance(answer, Completion) and answer.wav is not None:
        directory.mkdir(parents=True, exist_ok=True)
        content = wav_bytes(answer.wav, answer.sample_rate)
        (directory / f"{inputs.audio.stem}.wav").write_bytes(content)
    return answer.text
