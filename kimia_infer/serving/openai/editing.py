"""Speech by Step-Audio-EditX: texts in the voice of a recording, and changed recordings."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from pathlib import Path

from kimia_infer.api.editx_request import CLONE, EditXParameters
from kimia_infer.api.events import Event
from kimia_infer.api.parameters import parse_as
from kimia_infer.api.request import Deadline
from kimia_infer.serving.cog.references import decode_data_uri
from kimia_infer.serving.openai.errors import ApiError, unsupported
from kimia_infer.serving.openai.service import EDITX_NAME, Service
from kimia_infer.serving.openai.speech_request import SpeechRequest
from kimia_infer.serving.openai.voice_store import require_size
from kimia_infer.serving.openai.voices import recordings
from kimia_infer.utils.errors import RequestError, renamed_as

WITH_TEXT = (CLONE, "paralinguistic")
"""Tasks whose ``input`` is what is to be said; that of others is what the recording says."""


@dataclass(frozen=True)
class Sample:
    """The recording of a request: its content, what is said in it if known, and its field."""

    content: bytes
    words: str
    param: str


def editing(service: Service, asked: SpeechRequest) -> AsyncGenerator[Event]:
    """What becomes of a recording, on a thread."""
    editor = service.editor
    assert editor is not None
    if asked.speed != 1:
        raise unsupported("speed", "a clone has one; change it with task 'speed'")
    if asked.instructions.strip():
        raise unsupported("instructions", f"{EDITX_NAME} takes none; choose a task and an option")
    sample = read_sample(service, asked)
    said = asked.task in WITH_TEXT
    source, transcript = transcript_of(asked, sample)
    names = {"audio": sample.param, "text": "input", "transcript": source}
    given = {
        "task": asked.task,
        "option": asked.option,
        "text": asked.input if said else "",
        "transcript": transcript,
        "seed": asked.seed,
    }
    with renamed_as(names):
        parameters = parse_as(EditXParameters, given)
        editor.check(parameters)
    if not said and asked.ref_text.strip() not in ("", asked.input.strip()):
        text = f"ref_text: of {asked.task}, input is what the recording says; leave ref_text out"
        raise ApiError(400, text, "ref_text", "invalid_value")

    def begin(deadline: Deadline) -> Generator[Event]:
        with renamed_as(names):
            yield from editor.respond(sample.content, parameters, deadline, streams=True)

    return service.answers.stream(begin)


def transcript_of(asked: SpeechRequest, sample: Sample) -> tuple[str, str]:
    """The field in which it is sent what the recording says, and that; "" if it is not sent."""
    if asked.ref_text.strip():
        return "ref_text", asked.ref_text
    if asked.task not in WITH_TEXT and asked.input.strip():
        return "input", asked.input.strip()
    return ("voice" if sample.words else "ref_text"), sample.words


def read_sample(service: Service, asked: SpeechRequest) -> Sample:
    """The recording that comes with a request, or that its voice is. No path or URL is opened."""
    if asked.ref_audio:
        if asked.ref_audio[:5].lower() != "data:":
            text = "ref_audio: expected a data URI, data:audio/wav;base64,...; nothing is fetched"
            raise ApiError(400, text, "ref_audio", "invalid_value")
        require_size("ref_audio", len(asked.ref_audio) * 3 // 4 - 1024)
        try:
            content = decode_data_uri(asked.ref_audio)
        except RequestError as error:
            raise RequestError(f"ref_audio: {error}") from error
        return Sample(content, "", "ref_audio")
    if uploaded := service.voices.find(asked.voice):
        return Sample(uploaded.content, uploaded.words, "voice")
    own = recordings(service.settings)
    if asked.voice in own:
        return Sample(Path(own[asked.voice]).read_bytes(), "", "voice")
    known = f", or name one of {', '.join(own)}" if own else ""
    text = (
        f"voice: {EDITX_NAME} needs a recording; upload one to /v1/audio/voices and name its id, "
        f"send ref_audio{known}"
    )
    raise ApiError(400, text, "voice", "invalid_value")
