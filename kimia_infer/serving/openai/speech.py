"""``/v1/audio/speech``: text read aloud, by the model or Kokoro, sent while it is made."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import AsyncGenerator, Generator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.requests import Request

from kimia_infer.api.events import AudioChunk, Completion, Event
from kimia_infer.api.parameters import ServiceParameters, parse_as
from kimia_infer.api.reading import Reading, ReadingEvent, read_aloud
from kimia_infer.api.request import Deadline
from kimia_infer.audio.encode import MEDIA_TYPES, SpeechEncoder
from kimia_infer.serving.openai.editing import editing
from kimia_infer.serving.openai.errors import ApiError, unsupported
from kimia_infer.serving.openai.service import EDITX_NAME, Service, Serving
from kimia_infer.serving.openai.speech_request import SpeechRequest
from kimia_infer.serving.openai.streams import event_stream, streamed
from kimia_infer.serving.openai.voices import Voice, read_voice
from kimia_infer.utils.errors import NoSpeech

routes = APIRouter()

Whole = Reading | Completion


@routes.post("/audio/speech")
async def speech(request: Request, service: Serving, asked: SpeechRequest) -> Response:
    """Read a text aloud. The sound is sent while it is made, as one file."""
    service.check_model(asked.model, speech=True)
    if asked.model == EDITX_NAME and service.editor is not None:
        return await answer(request, service, asked, editing(service, asked))
    for name in ("task", "option", "ref_audio", "ref_text"):
        if name in asked.model_fields_set:
            raise unsupported(name, f"it is for the model {EDITX_NAME}")
    voice = read_voice(service, asked.voice, "voice")
    service.check_speech("model", voice.speaker)
    if asked.speed != 1 and not voice.speaker:
        raise unsupported("speed", "the model has one speed; leave it out, or use Kokoro's voices")
    if asked.instructions.strip() and voice.speaker:
        raise unsupported("instructions", "a voice of Kokoro takes none; leave them out")
    return await answer(request, service, asked, reading(service, asked, voice))


async def answer(
    request: Request,
    service: Service,
    asked: SpeechRequest,
    events: AsyncGenerator[ReadingEvent] | AsyncGenerator[Event],
) -> Response:
    """The response: the sound of ``events`` while it comes, in the form that is asked for."""
    pieces = sound(service, asked, events)
    if asked.stream_format == "sse":
        return await event_stream(request, wire_events(pieces))
    return await streamed(request, content(pieces), MEDIA_TYPES[asked.response_format])


def reading(service: Service, asked: SpeechRequest, voice: Voice) -> AsyncGenerator[ReadingEvent]:
    """What becomes of the text, on a thread."""
    given = asked.model_dump(include={"seed", "speed"}) | {"speaker": voice.speaker}
    options = parse_as(
        ServiceParameters, {"preset": "low_latency", "stop_repetition": True, **given}
    )

    def begin(deadline: Deadline) -> Generator[ReadingEvent]:
        return read_aloud(
            service.model,
            asked.input,
            options,
            instructions=asked.instructions,
            voice=voice.recording,
            deadline=deadline,
        )

    return service.answers.stream(begin)


async def sound(
    service: Service,
    asked: SpeechRequest,
    events: AsyncGenerator[ReadingEvent] | AsyncGenerator[Event],
) -> AsyncGenerator[bytes | Whole]:
    """The pieces of the file, none of them empty, then the last of ``events``."""
    encoder: SpeechEncoder | None = None
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, AudioChunk):
                    encoder = encoder or SpeechEncoder(asked.response_format, event.sample_rate)
                    if piece := encoder.push(event.wav.numpy()):
                        yield piece
                    continue
                assert isinstance(event, Whole)
                service.meters.count(event)
                if encoder is not None and (piece := encoder.finish()):
                    yield piece
                yield event
    except NoSpeech as error:
        reason = str(error).removeprefix("text: ")
        raise ApiError(422, f"input: {reason}", "input", "no_speech") from error


async def content(pieces: AsyncGenerator[bytes | Whole]) -> AsyncGenerator[bytes]:
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, bytes):
                yield piece


async def wire_events(
    pieces: AsyncGenerator[bytes | Whole],
) -> AsyncGenerator[dict[str, Any]]:
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, bytes):
                audio = base64.b64encode(piece).decode()
                yield {"type": "speech.audio.delta", "audio": audio}
            else:
                yield {
                    "type": "speech.audio.done",
                    "usage": usage(piece),
                    "kimi_audio": {"notes": piece.notes},
                }


def usage(done: Whole) -> dict[str, int]:
    prompt = done.metrics["prompt_tokens"]
    answer = done.metrics["speech_codes" if isinstance(done, Reading) else "audio_tokens"]
    return {"input_tokens": prompt, "output_tokens": answer, "total_tokens": prompt + answer}
