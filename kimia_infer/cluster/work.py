"""What is done with a row of a batch, the same on one machine and on a cluster."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kimia_infer.api.devices import parse_device
from kimia_infer.api.events import Completion
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.request import Deadline
from kimia_infer.api.subtitles import described
from kimia_infer.api.transcription import Transcript
from kimia_infer.audio.files import SAMPLE_RATE, load_audio, wav_bytes
from kimia_infer.cluster.rows import Row
from kimia_infer.cluster.store import open_store
from kimia_infer.models.kimi_audio.checkpoint import SPEECH_TOKENIZER_FOLDER, resolve_weights
from kimia_infer.models.kimi_audio.components import speech_tokenizer_component
from kimia_infer.models.kimi_audio.encoders import SpeechCodes
from kimia_infer.models.kimi_audio.packing import is_packed
from kimia_infer.serving.cog.inputs import (
    TRANSCRIPTION_PARAMETERS,
    CogInputs,
    name_files,
    parse_inputs,
    respond,
)
from kimia_infer.serving.settings import Settings, read_settings
from kimia_infer.utils.errors import (
    ConfigurationError,
    RequestError,
    RequestOutOfMemory,
    ServiceBusy,
    suggest,
)

Task = Literal["transcribe", "answer", "codes", "speak"]

RECORDINGS = ("audio", "voice")
_ALL = frozenset(CogInputs.model_fields) - {"task", "timeout_seconds", "history_audio"}
INPUTS: dict[Task, frozenset[str]] = {
    "transcribe": frozenset({"audio", *TRANSCRIPTION_PARAMETERS}) - {"timeout_seconds"},
    "answer": _ALL - {"output_type"},
    "codes": frozenset({"audio"}),
    "speak": _ALL - {"audio", "history", "output_type"},
}
"""Fields of a row that are inputs of a task, those of the Cog predictors. A text beside a recording
that is transcribed is none: in most data it is what is said."""

KINDS = {"transcribe": "transcribe", "answer": "chat", "speak": "speak"}
"""What the Cog predictors call a task."""

ATTEMPTS = 3
PAUSE_SECONDS = 1.0
"""Before a second attempt; twice as long before a third."""

SPEECH = "speech/{:08d}.wav"
"""Speech of a row in the output, by the row's number from 0."""

FOR_GOOD = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""Errors of files that another attempt would meet, too."""


@dataclass(frozen=True)
class Work:
    """What every worker of a batch has to know.

    ``inputs`` are those of rows that have none of their own, ``variables`` the settings of the
    model, ``KIMI_AUDIO_...``. ``speech`` is whether answers are spoken. Paths in rows begin at
    ``folder``, speech is written below ``output``.
    """

    task: Task
    weights: str
    inputs: Mapping[str, Any]
    variables: Mapping[str, str]
    folder: str
    output: str
    speech: bool

    def __post_init__(self) -> None:
        known = INPUTS[self.task]
        for name in self.inputs.keys() - known:
            raise ConfigurationError(f"{name}: no input of {self.task}{suggest(name, known)}")


class Worker:
    """A loaded model. Rows may be given to it from several threads at a time."""

    def __init__(self, work: Work):
        self._work = work
        self._source, self._output = open_store(work.folder), open_store(work.output)
        settings = read_settings(Settings, work.variables)
        self._do: Callable[[int, Row, Deadline], dict[str, Any]]
        if work.task == "codes":
            self._do = self._extract
            self._codes, self.threads = speech_codes(work.weights, settings.device), 1
            return
        arguments = settings.model_arguments()
        if work.task == "transcribe":
            arguments = settings.transcriber_arguments() | {"slots": settings.slots}
        elif not work.speech:
            arguments["load_detokenizer"] = False
        self._model = KimiAudio(work.weights, **arguments)
        self._do, self.threads = self._respond, self._model.scheduler.slots

    @property
    def broken(self) -> bool:
        """Whether the engine has failed, so that no more rows can be finished."""
        return self._work.task != "codes" and bool(self._model.scheduler.stopped)

    def finish(self, number: int, row: Row, deadline: Deadline) -> dict[str, Any]:
        """The row of the output, with its result or the reason why there is none.

        What may be over soon is tried again: a store that does not answer, a lack of memory.
        Raises RequestCancelled once ``deadline`` is cancelled, and what shows that the engine is
        broken.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return row.finished(self._do(number, row, deadline), None)
            except (RequestError, OSError) as error:
                deadline.check()
                brief = isinstance(error, OSError) and not isinstance(error, FOR_GOOD)
                if attempt == ATTEMPTS or not (
                    brief or isinstance(error, RequestOutOfMemory | ServiceBusy)
                ):
                    return row.finished(None, str(error))
                time.sleep(PAUSE_SECONDS * attempt)
        raise AssertionError("every attempt returns or is followed by another")

    def _respond(self, number: int, row: Row, deadline: Deadline) -> dict[str, Any]:
        """A transcript, an answer, or speech."""
        work = self._work
        names = (name for name in INPUTS[work.task] if row.fields.get(name) is not None)
        given = {**work.inputs, **{name: row.fields[name] for name in names}}
        if work.task == "answer":
            given["output_type"] = "both" if work.speech else "text"
        with self._placed(given) as placed:
            inputs = parse_inputs({"task": KINDS[work.task], **placed})
            try:
                *_, answer = respond(self._model, inputs, deadline=deadline)
            except RequestError as error:
                if (named := name_files(str(error), inputs)) == str(error):
                    raise  # some kinds, such as RequestTimeout, are not made of a message
                raise type(error)(named) from error
        if isinstance(answer, Transcript):
            return described(answer)
        assert isinstance(answer, Completion)
        return self._said(number, answer)

    @contextlib.contextmanager
    def _placed(self, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """``given`` with the paths of its recordings on this machine.

        Raises RequestError for what is no path, nor a URL that can be read.
        """
        placed = dict(given)
        with contextlib.ExitStack() as stack:
            for name in RECORDINGS:
                if name not in given:
                    continue
                if not isinstance(given[name], str):
                    raise RequestError(f"{name}: expected a path or a URL")
                try:
                    placed[name] = stack.enter_context(self._source.local(given[name]))
                except ConfigurationError as error:  # of a row alone
                    raise RequestError(f"{name}: {error}") from error
            yield placed

    def _said(self, number: int, answer: Completion) -> dict[str, Any]:
        """The text of an answer, and its speech as a file of the output."""
        speech, seconds = None, 0.0
        if answer.wav is not None:
            speech, seconds = SPEECH.format(number), answer.wav.shape[1] / answer.sample_rate
            self._output.write(speech, wav_bytes(answer.wav, answer.sample_rate))
        reasons = [] if answer.audio_reason is None else [answer.audio_reason]
        return {
            "text": answer.text,
            "speech": speech,
            "duration": seconds,
            "notes": [*reasons, *answer.notes],
        }

    def _extract(self, number: int, row: Row, deadline: Deadline) -> dict[str, Any]:
        """Speech codes from 0, 12.5 per second."""
        if "audio" not in row.fields:
            raise RequestError("audio: nothing to encode; give a recording")
        with self._placed({"audio": row.fields["audio"]}) as placed:
            wave = load_audio(placed["audio"])
        codes = self._codes.encode(wave).tolist()
        return {"codes": codes, "duration": len(wave) / SAMPLE_RATE}


def speech_codes(weights: str, device: str | None) -> SpeechCodes:
    """The speech tokenizer of a checkpoint alone, in float32.

    Raises ConfigurationError for a checkpoint whose tokenizer gives other codes.
    """
    directory = Path(resolve_weights(weights, detokenizer=False))
    if is_packed(directory):
        raise ConfigurationError(
            f"{directory}: prepared for a CPU, with a speech tokenizer in 8 bits, whose codes "
            "differ; use the checkpoint that it was made from"
        )
    folder = directory / SPEECH_TOKENIZER_FOLDER
    place = torch.device(parse_device(device))
    codes = SpeechCodes(speech_tokenizer_component(folder).load(place, torch.float32), folder)
    codes.warm_up()
    return codes
