"""The inputs of the Cog predictors: checked, turned into a chat, and answered.

Cog's server validates against its schema file, if there is one. It also accepts what no schema
forbids: a plain string for a file, which would name a file on the server, and whole numbers for
floats and the other way round. Files arrive as they were sent, as data URIs and URLs: see
``ServiceRunner``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from pydantic import Field

from kimia_infer.api.parameters import ServiceParameters, parse_as, show
from kimia_infer.utils.errors import RequestError

if TYPE_CHECKING:
    from kimia_infer.api.events import AudioChunk, Completion, Event
    from kimia_infer.api.kimia import KimiAudio
    from kimia_infer.api.request import Deadline
    from kimia_infer.api.transcription import TranscriptEvent

MAX_FILES = 64
"""Files that one list input may hold; Cog's schema cannot express it."""

FILE_INPUTS = ("audio", "voice", "history_audio")

TRANSCRIPTION_PARAMETERS = {
    *("text_temperature", "text_top_k", "text_repetition_penalty", "text_repetition_window_size"),
    *("max_new_tokens", "seed", "timeout_seconds"),
}
"""The parameters that a transcription takes; its other inputs are the audio and an instruction."""

Report = Callable[[float, float], None]
ResolveAudio = Callable[[str, Any], Any]


class Inputs(Protocol):
    """The checked inputs of any predictor."""

    @property
    def files(self) -> dict[str, Path]:
        """The uploaded files by input."""
        ...


class CogInputs(ServiceParameters):
    """The inputs of both predictors. Files must be paths as Cog makes them, never strings.

    The names, bounds and descriptions in ``predict.py`` and in the schema files are these.
    """

    task: Literal["chat", "transcribe", "speak"] = Field(
        "chat",
        description="Answer a chat, transcribe a recording of any length, or read text aloud",
    )
    audio: Path | None = Field(
        None, description="Audio of the user's turn (speech, music or noise) in any common format"
    )
    text: str = Field(
        "",
        max_length=50000,
        description="Text of the user's turn, placed before the audio; an instruction or question",
    )
    history: str = Field(
        "",
        max_length=200000,
        description="JSON list of earlier messages; audio is given by its index in history_audio",
    )
    history_audio: list[Path] = Field(
        [], max_length=MAX_FILES, description="Audio files that the messages of history refer to"
    )
    voice: Path | None = Field(
        None, description="A recording of 1 to 30 s; the answer is spoken in its voice"
    )

    @property
    def files(self) -> dict[str, Path]:
        """The uploaded files by input: ``audio``, ``voice``, ``history_audio[0]``, ..."""
        single = {"audio": self.audio, "voice": self.voice}
        listed = {f"history_audio[{i}]": path for i, path in enumerate(self.history_audio)}
        return {name: path for name, path in single.items() if path is not None} | listed


def parse_inputs(values: Mapping[str, Any]) -> CogInputs:
    """The inputs among ``values``, checked.

    Raises:
        RequestError: naming the input, what is expected and what was found.
    """
    given = {name: value for name, value in values.items() if name in CogInputs.model_fields}
    return parse_as(CogInputs, given | {"timeout_seconds": None})


def place_files(
    values: Mapping[str, Any], directory: Path
) -> tuple[dict[str, Any], dict[Path, str]]:
    """``values`` with a path in ``directory`` for each data URI and URL, and these by their paths.

    A path has the name of its input. Other strings stay what they are, and are refused later.
    """
    references: dict[Path, str] = {}

    def place(name: str, value: Any) -> Any:
        if isinstance(value, str) and re.match("data:|https?://", value, re.IGNORECASE):
            references[directory / name] = value
            return directory / name
        return value

    placed = dict(values)
    for name in FILE_INPUTS:
        value = values.get(name)
        if isinstance(value, list):
            placed[name] = [place(f"{name}[{index}]", item) for index, item in enumerate(value)]
        elif value is not None:
            placed[name] = place(name, value)
    return placed, references


def respond(
    model: KimiAudio,
    inputs: CogInputs,
    report: Report | None = None,
    deadline: Deadline | None = None,
) -> Generator[Event | TranscriptEvent]:
    """The events of the answer, last its Completion or Transcript.

    ``report`` is called with what is done and the most there is to do, in steps of an answer or
    seconds of a recording. Closing the iterator stops generation: no further step is launched.
    ``deadline`` limits the time, and can cancel.

    Raises:
        RequestError: naming inputs instead of messages.
    """
    chat = build_chat(inputs)
    try:
        if inputs.task == "chat":
            events = model.respond(
                chat, inputs, on_step=report, voice=inputs.voice, deadline=deadline
            )
        elif inputs.task == "speak":
            events = speak(model, inputs, deadline)
        else:
            audio, parameters = inputs.audio, inputs.model_dump(include=TRANSCRIPTION_PARAMETERS)
            assert audio is not None, "checked by build_chat"
            if instruction := inputs.text.strip():
                parameters["instruction"] = instruction
            events = model.stream_transcription(
                audio, on_progress=report, deadline=deadline, **parameters
            )
        with contextlib.closing(events):
            for event in events:
                if notes := getattr(event, "notes", None):  # of the last event
                    notes = [name_messages(note, inputs) for note in notes]
                    event = dataclasses.replace(cast(Any, event), notes=notes)
                yield event
    except RequestError as error:
        if (named := name_messages(str(error), inputs)) == str(error):
            raise  # some kinds, such as RequestTimeout, are not made of a message
        raise type(error)(named) from error


def speak(
    model: KimiAudio, inputs: CogInputs, deadline: Deadline | None
) -> Generator[AudioChunk | Completion]:
    """The text read aloud, last its Completion."""
    import torch

    from kimia_infer.api.events import AudioChunk, Completion
    from kimia_infer.api.reading import Reading, read_aloud

    waves, rate = [], 0
    events = read_aloud(model, inputs.text, inputs, voice=inputs.voice, deadline=deadline)
    with contextlib.closing(events):
        for event in events:
            if isinstance(event, AudioChunk):
                waves.append(event.wav)
                rate = event.sample_rate
                yield event
            elif isinstance(event, Reading):
                wav = torch.cat(waves)[None]
                yield Completion(
                    wav, rate, inputs.text, [], [], [], event.metrics, notes=event.notes
                )


def build_chat(inputs: CogInputs) -> list[dict[str, Any]]:
    """The messages of the history and one turn of the user, its text before its audio.

    The published examples have this order, too.

    Raises:
        RequestError: neither text nor audio, a history that cannot be read, or an input that
            does not belong to the task.
    """
    turn: list[dict[str, Any]] = []
    if inputs.text.strip():
        turn.append({"role": "user", "message_type": "text", "content": inputs.text})
    if inputs.audio is not None:
        turn.append({"role": "user", "message_type": "audio", "content": inputs.audio})
    if inputs.task == "transcribe":
        _check_transcription(inputs)
    elif inputs.task == "speak":
        _check_reading(inputs)
    elif not turn:
        raise RequestError("audio, text: nothing to answer; give an audio file, a text or both")
    elif inputs.voice is not None and inputs.output_type == "text":
        raise RequestError("voice: there is no speech with output_type 'text'; leave voice out")
    return _history(inputs.history, inputs.history_audio) + turn


def _check_transcription(inputs: CogInputs) -> None:
    if inputs.audio is None:
        raise RequestError("audio: nothing to transcribe; give an audio file")
    for name in ("history", "history_audio", "voice", "speaker"):
        if getattr(inputs, name):
            raise RequestError(f"{name}: not used for transcription; leave it out")


def _check_reading(inputs: CogInputs) -> None:
    if not inputs.text.strip():
        raise RequestError("text: nothing to read aloud; give a text")
    for name in ("audio", "history", "history_audio"):
        if getattr(inputs, name):
            raise RequestError(f"{name}: not used to read a text aloud; leave it out")
    if inputs.output_type == "text":
        raise RequestError("output_type: what is read aloud is speech; leave it out")


def _history(text: str, files: list[Path]) -> list[dict[str, Any]]:
    """The messages of a request's history; their audio is an index into ``files``."""
    used: set[int] = set()

    def resolve(where: str, reference: Any) -> Path:
        if type(reference) is not int or not 0 <= reference < len(files):
            known = f"0 to {len(files) - 1}" if files else "history_audio is empty"
            raise RequestError(
                f"{where}: expected the index of a file in history_audio ({known}), "
                f"found {show(reference)}"
            )
        used.add(reference)
        return files[reference]

    messages = parse_history(text, resolve) if text.strip() else []
    if unused := set(range(len(files))) - used:
        raise RequestError(f"history_audio[{min(unused)}]: no message of history refers to it")
    return messages


def parse_history(text: str, resolve: ResolveAudio) -> list[dict[str, Any]]:
    """Messages from JSON: a list of ``{"role", "message_type", "content"}``.

    Every reference to audio is replaced by ``resolve(where, reference)``; ``where`` names its
    place for error messages. The model checks the rest of a message's content.
    """
    try:
        messages = json.loads(text)
        json.dumps(messages, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RequestError(f"history: not valid JSON ({_json_fault(error)})") from error
    if not isinstance(messages, list):
        raise RequestError(f"history: expected a JSON list of messages, found {show(messages)}")
    return [
        _message(f"history[{index}]", message, resolve) for index, message in enumerate(messages)
    ]


def _json_fault(error: ValueError | RecursionError) -> str:
    """What is wrong with JSON, without Python's advice to Python programmers."""
    match error:
        case json.JSONDecodeError():
            return str(error)
        case RecursionError():
            return "nested too deeply"
        case UnicodeError():
            return "half of a surrogate pair, which is no character"
        case _:
            return "a number with too many digits"


def _message(where: str, message: Any, resolve: ResolveAudio) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(
            f"{where}: expected an object with role, message_type and content, "
            f"found {show(message)}"
        )
    if unknown := message.keys() - {"role", "message_type", "content"}:
        raise RequestError(f"{where}: unknown field {show(min(unknown))}")
    content = message.get("content")
    if message.get("message_type") == "audio":
        content = resolve(f"{where}.content", content)
    elif message.get("message_type") == "audio-text" and isinstance(content, list) and content:
        content = [resolve(f"{where}.content[0]", content[0]), *content[1:]]
    return message | {"content": content}


def name_messages(message: str, inputs: CogInputs) -> str:
    """``message`` with the messages of the chat, ``chats[1]``, replaced by their inputs."""
    turn = ["text"] if inputs.text.strip() or inputs.task == "transcribe" else []
    turn += ["audio"] if inputs.audio is not None else []
    earlier = len(json.loads(inputs.history)) if inputs.history.strip() else 0

    def name(match: re.Match[str]) -> str:
        place = int(match[1]) - earlier
        if place < 0:
            return f"history[{match[1]}]{match[2] or ''}"
        return turn[place] if place < len(turn) else match[0]

    message = re.sub(r"\bchats\[(\d{1,6})\](\.content\b)?", name, message)
    return re.sub(r"^chats: ", "audio, text, history: ", message)


def name_files(message: str, inputs: Inputs) -> str:
    """``message`` with the temporary paths of uploads replaced by their inputs."""
    for name, path in inputs.files.items():
        # The path may follow the message it belongs to: "history[0].content: /tmp/x: empty file".
        message = re.sub(rf"(^\S+: )?{re.escape(str(path))}", name, message)
    return message
