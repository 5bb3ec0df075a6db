"""Writing down what the user says, beside the answers to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Generator

import numpy as np

from kimia_infer.api.events import TextDelta
from kimia_infer.api.request import Deadline
from kimia_infer.api.transcription import Transcript, TranscriptEvent
from kimia_infer.serving.openai.errors import ApiError, as_api_error
from kimia_infer.serving.openai.service import Service
from kimia_infer.serving.realtime.conversation import Item
from kimia_infer.serving.realtime.outbox import SessionOver
from kimia_infer.serving.realtime.response import Send
from kimia_infer.serving.realtime.schema import SAMPLE_RATE
from kimia_infer.utils.errors import RequestError

log = logging.getLogger(__name__)

MOST_WAITING = 8
"""Turns of a session that may wait to be transcribed; each holds its sound."""

PREFIX = "conversation.item.input_audio_transcription"


class Transcriptions:
    """Transcribes the turns of one session, one at a time, in their order."""

    def __init__(self, service: Service, send: Send):
        self._service, self._send = service, send
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def transcribe(self, item: Item) -> None:
        """Transcribe the sound of ``item``, and send what is found; the item gets it, too."""
        place = {"item_id": item.id, "content_index": 0}
        try:
            if self._waiting >= MOST_WAITING:
                text = f"{MOST_WAITING} turns wait to be transcribed already"
                raise ApiError(429, text, code="too_many_transcriptions")
            self._waiting += 1
            try:
                async with self._turn:
                    text = await self._run(item, place)
            finally:
                self._waiting -= 1
        except (RequestError, ApiError) as error:
            await self._failed(
                as_api_error(error) if isinstance(error, RequestError) else error, place
            )
            return
        except SessionOver:
            raise
        except Exception:
            log.exception("A transcription failed")
            await self._failed(ApiError(500, "the server failed; its log says why"), place)
            return
        part = item.parts[0]
        part.text = text
        usage = {"type": "duration", "seconds": round(part.samples / SAMPLE_RATE, 3)}
        await self._send(f"{PREFIX}.completed", **place, transcript=text, usage=usage)

    async def _run(self, item: Item, place: dict) -> str:
        sound = np.frombuffer(item.parts[0].sound, "<i2")

        def events(deadline: Deadline) -> Generator[TranscriptEvent]:
            return self._service.model.stream_transcription((sound, SAMPLE_RATE), deadline=deadline)

        text = ""
        async with contextlib.aclosing(self._service.answers.stream(events)) as found:
            async for event in found:
                if isinstance(event, TextDelta):
                    await self._send(f"{PREFIX}.delta", **place, delta=event.text)
                elif isinstance(event, Transcript):
                    self._service.meters.count(event)
                    text = event.text
        return text

    async def _failed(self, error: ApiError, place: dict) -> None:
        await self._send(f"{PREFIX}.failed", **place, error=error.error)
