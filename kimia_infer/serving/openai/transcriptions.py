"""``/v1/audio/transcriptions`` and ``/v1/audio/translations``: recordings to text and subtitles."""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from kimia_infer.api.events import TextDelta
from kimia_infer.api.request import Deadline
from kimia_infer.api.subtitles import SUBTITLE_SECONDS, srt, vtt
from kimia_infer.api.transcription import (
    INSTRUCTION,
    INSTRUCTIONS,
    TRANSLATE,
    UNSPACED,
    Transcript,
    TranscriptEvent,
    TranscriptSegment,
    prompted,
)
from kimia_infer.audio.files import AudioError
from kimia_infer.serving.openai.answers import while_connected
from kimia_infer.serving.openai.errors import ApiError, no_room, unsupported
from kimia_infer.serving.openai.service import Service, Serving
from kimia_infer.serving.openai.streams import event_stream
from kimia_infer.utils.errors import suggest

ResponseFormat = Literal["json", "verbose_json", "text", "srt", "vtt", "diarized_json"]

LANGUAGES = {"en": "english", "zh": "chinese"}
"""What the model can be asked to write down, as requests and as answers call it."""

NO_SPEAKERS = "the model does not tell speakers apart"
UNSUPPORTED = {
    "include": "the model's engine keeps no probabilities",
    "keywords": "name them in prompt",
    "known_speaker_names": NO_SPEAKERS,
    "known_speaker_references": NO_SPEAKERS,
    "languages": "name one in language, or leave it out",
}
"""Fields of OpenAI's API that are refused, and why."""

routes = APIRouter()


class RecordingForm(BaseModel):
    """The fields that both endpoints have."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)  # others are refused by name

    file: Annotated[UploadFile, Field(description="A recording in any format that ffmpeg reads")]
    model: str
    prompt: str = Field(
        "",
        max_length=2000,
        description="Text that goes before the request for a transcript, such as names in it",
    )
    response_format: ResponseFormat = "json"
    temperature: float = Field(0.0, ge=0, le=1)

    @field_validator("file", mode="before")
    @classmethod
    def _is_file(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("expected a file: a part of the form that has a filename")
        return value


class TranscriptionForm(RecordingForm):
    language: str = Field("", description="en or zh (ISO 639-1)")
    stream: bool = False
    timestamp_granularities: list[str] = Field([], alias="timestamp_granularities[]")
    chunking_strategy: str = ""


class TranslationForm(RecordingForm):
    pass


@dataclass(frozen=True)
class Asked:
    """What to do with a recording; ``language`` is that of the text, as answers call it."""

    task: Literal["transcribe", "translate"]
    response_format: ResponseFormat
    instruction: str
    temperature: float
    language: str | None

    @property
    def timed(self) -> bool:
        """Whether the answer has times."""
        return self.response_format in ("verbose_json", "srt", "vtt")


@routes.post("/audio/transcriptions")
async def transcriptions(
    request: Request,
    service: Serving,
    form: Annotated[TranscriptionForm, Form(media_type="multipart/form-data")],
) -> Response:
    """Write down what is said in a recording of up to KIMI_AUDIO_MAX_SECONDS."""
    await check_form(request, service, form)
    if any(name == "word" for name in form.timestamp_granularities):
        raise unsupported(
            "timestamp_granularities[]", "words have no times here; ask for 'segment'"
        )
    if form.timestamp_granularities and form.response_format != "verbose_json":
        raise ApiError(
            400,
            "timestamp_granularities[]: only with response_format 'verbose_json'",
            "timestamp_granularities[]",
            "invalid_value",
        )
    if form.chunking_strategy not in ("", "auto"):
        raise unsupported("chunking_strategy", "recordings are cut at pauses, as with 'auto'")
    language = read_language(form.language)
    instruction = INSTRUCTION if language is None else INSTRUCTIONS[language]
    name = None if language is None else LANGUAGES[language]
    asked = Asked(
        "transcribe",
        form.response_format,
        prompted(form.prompt, instruction),
        form.temperature,
        name,
    )
    events = read_recording(service, form.file, asked)
    if not form.stream:
        return await answer(request, service, asked, events)
    if form.response_format not in ("json", "verbose_json"):
        raise ApiError(
            400,
            "stream: a stream is of events; ask for response_format 'json' or, for segments with "
            "times, 'verbose_json'",
            "stream",
            "invalid_value",
        )
    return await event_stream(request, wire_events(service, asked, events))


@routes.post("/audio/translations")
async def translations(
    request: Request,
    service: Serving,
    form: Annotated[TranslationForm, Form(media_type="multipart/form-data")],
) -> Response:
    """Write down in English what is said in a recording."""
    await check_form(request, service, form)
    asked = Asked(
        "translate",
        form.response_format,
        prompted(form.prompt, TRANSLATE),
        form.temperature,
        LANGUAGES["en"],
    )
    return await answer(request, service, asked, read_recording(service, form.file, asked))


async def check_form(request: Request, service: Service, form: RecordingForm) -> None:
    """Raise ApiError for another model, and for fields that are not honoured."""
    service.check_model(form.model)
    if (files := len((await request.form()).getlist("file"))) > 1:
        text = f"file: one recording in a request, found {files}"
        raise ApiError(400, text, "file", "invalid_value")
    if form.response_format == "diarized_json":
        raise unsupported("response_format", f"{NO_SPEAKERS}; ask for 'verbose_json'")
    for name in form.model_extra or {}:
        plain = re.split(r"\[", name)[0]
        if plain in UNSUPPORTED:
            raise unsupported(name, UNSUPPORTED[plain])
        if plain == "chunking_strategy":
            raise unsupported(name, "recordings are cut at pauses; send 'auto' or leave it out")
        near = suggest(name, type(form).model_fields)
        raise ApiError(400, f"{name}: unknown field{near}", name, "unknown_parameter")


def read_language(value: str) -> str | None:
    """One of LANGUAGES, None if it is left to the model; raises ApiError for another one."""
    language = value.strip().lower().partition("-")[0]
    if language and language not in LANGUAGES:
        raise ApiError(
            400,
            f"language: the model writes down English (en) and Chinese (zh), found {value[:20]!r}; "
            "leave it out to try another one",
            "language",
            "invalid_value",
        )
    return language or None


async def read_recording(
    service: Service, upload: UploadFile, asked: Asked
) -> AsyncGenerator[TranscriptEvent]:
    """The events of the transcript. The file lies in a folder of its own until the last one."""
    with service.uploads.folder() as folder:
        path = await stored(upload, folder)

        def begin(deadline: Deadline) -> Generator[TranscriptEvent]:
            return service.model.stream_transcription(
                str(path),
                instruction=asked.instruction,
                max_seconds=service.settings.max_seconds,
                longest_segment=SUBTITLE_SECONDS if asked.timed else None,
                text_temperature=asked.temperature,
                deadline=deadline,
            )

        try:
            async with contextlib.aclosing(service.answers.stream(begin)) as events:
                async for event in events:
                    if isinstance(event, Transcript):
                        service.meters.count(event)
                    yield event
        except AudioError as error:
            message = str(error).replace(f"audio: {path}: ", "file: ")
            raise ApiError(400, message, "file", "invalid_value") from error


async def stored(upload: UploadFile, folder: Path) -> Path:
    """The uploaded file in ``folder``. Of its name only a plain suffix is kept."""
    suffix = re.search(r"\.\w{1,8}$", upload.filename or "", re.ASCII)
    path = folder / f"recording{suffix[0] if suffix else ''}"
    try:
        await run_in_threadpool(copy, upload, path)
    except OSError as error:
        raise no_room(error) from error
    return path


COPIED = 2**20


def copy(upload: UploadFile, path: Path) -> None:
    with path.open("wb") as file:
        for piece in iter(partial(upload.file.read, COPIED), b""):
            file.write(piece)


async def answer(
    request: Request, service: Service, asked: Asked, events: AsyncGenerator[TranscriptEvent]
) -> Response:
    """The response to a request that does not stream."""

    async def last() -> Transcript:
        async with contextlib.aclosing(events):
            event = [event async for event in events][-1]
        assert isinstance(event, Transcript)
        return event

    transcript = await while_connected(request, last())
    if asked.response_format == "verbose_json":
        return JSONResponse(verbose(service, asked, transcript))
    write = TEXTS.get(asked.response_format)
    if write is not None:
        return PlainTextResponse(write(transcript))
    return JSONResponse({"text": transcript.text, **details(transcript)})


TEXTS: Mapping[str, Callable[[Transcript], str]] = {
    "text": lambda transcript: f"{transcript.text}\n",
    "srt": lambda transcript: srt(transcript.segments),
    "vtt": lambda transcript: vtt(transcript.segments),
}
"""The answers that are plain text."""


def details(transcript: Transcript) -> dict[str, Any]:
    """The usage, and what OpenAI's form has no place for."""
    prompt, heard, written = (
        transcript.metrics.get(name, 0)
        for name in ("prompt_tokens", "prompt_audio_tokens", "text_tokens")
    )
    usage = {
        "type": "tokens",
        "input_tokens": prompt,
        "input_token_details": {"audio_tokens": heard, "text_tokens": prompt - heard},
        "output_tokens": written,
        "total_tokens": prompt + written,
    }
    seconds = transcript.metrics["input_audio_seconds"]
    own = {"input_audio_seconds": seconds, "notes": transcript.notes}
    return {"usage": usage, "kimi_audio": own}


def verbose(service: Service, asked: Asked, transcript: Transcript) -> dict[str, Any]:
    seconds = transcript.metrics["input_audio_seconds"]
    spoken = [segment for segment in transcript.segments if segment.text]
    return {
        "task": asked.task,
        "language": asked.language or written_language(transcript.text),
        "duration": seconds,
        "text": transcript.text,
        "segments": [describe(service, asked, n, s) for n, s in enumerate(spoken)],
        **details(transcript),
        "usage": {"type": "duration", "seconds": seconds},
    }


def describe(
    service: Service, asked: Asked, number: int, segment: TranscriptSegment
) -> dict[str, Any]:
    """A segment of verbose_json. What the model does not give is null."""
    content, (start, end) = segment.text.encode(), segment.shown
    return {
        "id": number,
        "seek": round(100 * segment.start),  # in hundredths of a second, as Whisper has it
        "start": start,
        "end": end,
        "text": segment.text,
        "tokens": service.model.text_tokenizer.encode(segment.text),
        "temperature": asked.temperature,
        "avg_logprob": None,
        "compression_ratio": len(content) / len(zlib.compress(content)),
        "no_speech_prob": None,
    }


def written_language(text: str) -> str:
    """The language of a transcript by its writing."""
    return LANGUAGES["zh" if re.search(f"[{UNSPACED}]", text) else "en"]


async def wire_events(
    service: Service, asked: Asked, events: AsyncGenerator[TranscriptEvent]
) -> AsyncGenerator[dict[str, Any]]:
    """The events of a stream; segments are among them where times were asked for."""
    number = 0
    async with contextlib.aclosing(events):
        async for event in events:
            if isinstance(event, TextDelta):
                yield {"type": "transcript.text.delta", "delta": event.text}
            elif isinstance(event, Transcript):
                done = {"type": "transcript.text.done", "text": event.text}
                yield done | details(event)
            elif event.text and asked.timed:
                start, end = event.shown
                yield {
                    "type": "transcript.text.segment",
                    "id": f"seg_{number}",
                    "start": start,
                    "end": end,
                    "text": event.text,
                    "speaker": None,
                }
                number += 1
