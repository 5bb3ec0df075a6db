"""Writing down what the user says, beside the answers to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from typing import Any

import numpy as np

from kimia_infer.api.events import TextDelta
from kimia_infer.api.request import Deadline
from kimia_infer.api.transcription import (
    INSTRUCTION,
    INSTRUCTIONS,
    Transcript,
    TranscriptEvent,
)
from kimia_infer.serving.openai.errors import ApiError
from kimia_infer.serving.openai.service import Service
from kimia_infer.serving.openai.transcriptions import prompted
from kimia_infer.serving.realtime.config import SessionConfig, Transcription
from kimia_infer.serving.realtime.conversation import Item
from kimia_infer.serving.realtime.outbox import SessionOver
from kimia_infer.serving.realtime.response import Send
from kimia_infer.serving.realtime.schema import SAMPLE_RATE, as_failure

MOST_WAITING = 8
"""Turns of a session that may wait to be transcribed; each holds its sound."""

STOCK_MODELS = ("whisper-1", "gpt-transcribe", "gpt-live-transcribe", "gpt-realtime-whisper")
STOCK_PREFIXES = ("gpt-4o-transcribe", "gpt-4o-mini-transcribe")
"""OpenAI's transcribers, which clients name unless told otherwise: the one model transcribes."""

PREFIX = "conversation.item.input_audio_transcription"


def with_transcriber(service: Service, config: SessionConfig) -> SessionConfig:
    """``config`` with the model that will transcribe; raises ApiError for one there is not."""
    asked = config.audio.input.transcription
    if asked is None:
        return config
    name = asked.model
    if name is None or name in STOCK_MODELS or name.startswith(STOCK_PREFIXES):
        name = service.name
    service.check_model(name, "session.audio.input.transcription.model")
    given = config.model_dump()
    given["audio"]["input"]["transcription"]["model"] = name
    return SessionConfig.model_validate(given)


class Transcriptions:
    """Transcribes the turns of one session, one at a time, in their order."""

    def __init__(self, service: Service, send: Send):
        self._service, self._send = service, send
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def transcribe(self, item: Item, config: Transcription) -> None:
        """Transcribe the sound of ``item``, and send what is found; the item gets it, too."""
        place = {"item_id": item.id, "content_index": 0}
        try:
            text = await self._in_turn(item, config, place)
        except SessionOver:
            raise
        except Exception as error:
            failure = as_failure(error, {"audio": "item"})
            await self._send(f"{PREFIX}.failed", **place, error=failure.error)
        else:
            await self._completed(item, text, place)

    async def _in_turn(self, item: Item, config: Transcription, place: dict[str, Any]) -> str:
        if self._waiting >= MOST_WAITING:
            text = f"{MOST_WAITING} turns wait to be transcribed already"
            raise ApiError(429, text, code="too_many_transcriptions")
        self._waiting += 1
        try:
            async with self._turn:
                return await self._run(item, config, place)
        finally:
            self._waiting -= 1

    async def _completed(self, item: Item, text: str, place: dict[str, Any]) -> None:
        part = item.parts[0]
        part.text = text
        usage = {"type": "duration", "seconds": round(part.samples / SAMPLE_RATE, 3)}
        await self._send(f"{PREFIX}.completed", **place, transcript=text, usage=usage)

    async def _run(self, item: Item, config: Transcription, place: dict[str, Any]) -> str:
        sound = np.frombuffer(item.parts[0].sound, "<i2")
        language = INSTRUCTIONS[config.language] if config.language else INSTRUCTION
        instruction = prompted(config.prompt or "", language)

        def events(deadline: Deadline) -> Generator[TranscriptEvent]:
            return self._service.model.stream_transcription(
                (sound, SAMPLE_RATE), instruction=instruction, deadline=deadline
            )

        text = ""
        async with contextlib.aclosing(self._service.answers.stream(events)) as found:
            async for event in found:
                if isinstance(event, TextDelta):
                    await self._send(f"{PREFIX}.delta", **place, delta=event.text)
                elif isinstance(event, Transcript):
                    self._service.meters.count(event)
                    text = event.text
        return text
