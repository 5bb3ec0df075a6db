"""One response of the model, from its first event to the last."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Awaitable, Generator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from kimia_infer.api.events import AudioChunk, Completion, Event, TextDelta
from kimia_infer.api.parameters import ServiceParameters
from kimia_infer.api.request import Deadline
from kimia_infer.audio.files import pcm16
from kimia_infer.serving.openai.errors import ApiError
from kimia_infer.serving.openai.service import Service
from kimia_infer.serving.openai.voices import Voice
from kimia_infer.serving.realtime.conversation import Conversation, Item, Part, new_id
from kimia_infer.serving.realtime.history import Prompt, build_prompt, cut_to_heard
from kimia_infer.serving.realtime.outbox import SessionOver
from kimia_infer.serving.realtime.schema import SAMPLE_RATE, as_failure

CODE_SAMPLES = 1920
"""Samples of speech, at 24 kHz, that a code of the model is."""

NAMES = {"chats": "conversation", "output_type": "output_modalities"}
"""Fields of this protocol by the model's names."""

Reason = Literal["turn_detected", "client_cancelled"]


class Send(Protocol):
    """Sends an event: its type and its other fields."""

    def __call__(self, type: str, /, **fields: Any) -> Awaitable[None]: ...


@dataclass(frozen=True)
class Options:
    """What is answered, and how. ``conversation`` None keeps the answer out of the session's.

    ``max_tokens`` None is as many as fit. ``speed`` is that of a voice of
    Kokoro. ``voice_name`` is how the client calls ``voice``.
    """

    items: list[Item]
    conversation: Conversation | None
    instructions: str
    modality: Literal["audio", "text"]
    voice: Voice
    speed: float
    voice_name: Any
    max_tokens: int | None
    truncation: Any
    metadata: dict[str, str] | None


class Response:
    """A response in progress; :meth:`run` is its task."""

    def __init__(self, service: Service, send: Send, options: Options):
        self.id = new_id("resp")
        self.item: Item | None = None
        self.ended = asyncio.Event()
        self._service, self._send, self._options = service, send, options
        self._part = Part("output_audio" if options.modality == "audio" else "output_text", "")
        self._prompt = Prompt()
        self._completion: Completion | None = None
        self._reason: Reason | None = None
        self._failure: ApiError | None = None
        self._task: asyncio.Task[None] | None = None
        self._finishing = False

    @property
    def cancelled(self) -> bool:
        return self._reason is not None

    @property
    def ending(self) -> bool:
        """Whether nothing more is generated, so that ``ended`` is near."""
        return self.cancelled or self._finishing

    @property
    def in_conversation(self) -> bool:
        return self._options.conversation is not None

    @property
    def seconds(self) -> float:
        """Length of its speech."""
        return self._part.samples / SAMPLE_RATE

    def cancel(self, reason: Reason) -> None:
        """Stop it; it then ends by itself, with its last events."""
        if self._finishing or self.cancelled:
            return
        self._reason = reason
        if self._task is not None:
            self._task.cancel()

    async def begin(self) -> None:
        """Send its first event."""
        await self._send("response.created", response=self._described("in_progress"))

    async def run(self) -> None:
        """Answer. A task that is cancelled otherwise than by :meth:`cancel` sends no more."""
        try:
            await self._run()
        finally:
            self.ended.set()

    async def _run(self) -> None:
        self._task = asyncio.current_task()
        try:
            if not self.cancelled:
                await self._answer()
        except asyncio.CancelledError:
            if not self.cancelled or self._task is None or self._task.uncancel():
                raise
        except SessionOver:
            raise
        except Exception as error:
            self._failure = as_failure(error, NAMES)
        finally:
            self._finishing = True
        await self._finish()

    def _events(self, deadline: Deadline) -> Generator[Event]:
        """What the model answers; runs on a thread."""
        options = self._options
        speaks = options.modality == "audio"
        voice = options.voice if speaks else Voice()
        output_type = "both" if speaks else "text"
        self._prompt = build_prompt(
            self._service.model,
            options.items,
            options.instructions,
            "text" if voice.speaker else output_type,  # which Kokoro speaks
            options.max_tokens,
            options.truncation,
        )
        parameters = ServiceParameters(
            output_type=output_type,
            preset="low_latency",
            max_new_tokens=options.max_tokens or -1,
            stop_repetition=True,
            speaker=voice.speaker,
            speed=options.speed if voice.speaker else 1.0,
        )
        yield from self._service.model.respond(
            self._prompt.chats, parameters, voice=voice.recording, deadline=deadline
        )

    async def _answer(self) -> None:
        async with contextlib.aclosing(self._service.answers.stream(self._events)) as events:
            async for event in events:
                await self._open()
                if isinstance(event, TextDelta):
                    await self._add_text(event.text)
                elif isinstance(event, AudioChunk):
                    await self._add_sound(event.wav)
                else:
                    self._completion = event
                    self._service.meters.count(event)

    async def _open(self) -> None:
        """Begin the item, once."""
        if self.item is not None:
            return
        self.item = item = Item("assistant", [], status="in_progress")
        conversation = self._options.conversation
        shown = item.described()
        await self._send_part("response.output_item.added", item=shown, at_content=False)
        if conversation is not None:
            before = conversation.add(item)
            await self._send("conversation.item.added", previous_item_id=before, item=shown)
        item.parts.append(self._part)
        await self._send_part("response.content_part.added", part=self._shown_part())

    async def _add_text(self, text: str) -> None:
        name = "audio_transcript" if self._part.is_sound else "text"
        await self._send_part(f"response.output_{name}.delta", delta=text)
        self._part.text = (self._part.text or "") + text

    async def _add_sound(self, wave: Tensor) -> None:
        sound = pcm16(wave).tobytes()
        delta = base64.b64encode(sound).decode()
        await self._send_part("response.output_audio.delta", delta=delta)
        self._part.sound += sound

    async def _finish(self) -> None:
        """The last events, whatever became of it."""
        status = self._status()
        if self.item is not None:
            await self._close(self.item, "completed" if status == "completed" else "incomplete")
        await self._send("response.done", response=self._described(status))

    async def _close(self, item: Item, status: Literal["completed", "incomplete"]) -> None:
        part = self._part
        item.status = status
        if part.is_sound:
            await self._send_part("response.output_audio.done")
            await self._send_part("response.output_audio_transcript.done", transcript=part.text)
        else:
            await self._send_part("response.output_text.done", text=part.text)
        await self._send_part("response.content_part.done", part=self._shown_part())
        conversation = self._options.conversation
        shown = item.described()
        if conversation is not None and item in conversation.items:
            before = conversation.before(item)
            await self._send("conversation.item.done", previous_item_id=before, item=shown)
        await self._send_part("response.output_item.done", item=shown, at_content=False)
        if part.is_sound and self.cancelled:  # the model remembers no words that it did not say
            cut_to_heard(part, part.samples, whole=False, speed=self._options.speed)

    async def _send_part(self, type: str, at_content: bool = True, **fields: Any) -> None:
        """An event about the item, or about its one part."""
        assert self.item is not None
        place: dict[str, Any] = {"response_id": self.id, "output_index": 0}
        if at_content:
            place |= {"item_id": self.item.id, "content_index": 0}
        await self._send(type, **place, **fields)

    def _shown_part(self) -> dict[str, Any]:
        if self._part.is_sound:
            return {"type": "audio", "transcript": self._part.text}
        return {"type": "text", "text": self._part.text}

    def _status(self) -> str:
        if self._failure is not None:
            return "failed"
        if self.cancelled:
            return "cancelled"
        limited = self._completion and self._completion.metrics["stop_reason"] == "limit"
        return "incomplete" if limited else "completed"

    def _details(self, status: str) -> dict[str, Any] | None:
        details: dict[str, Any] = {"type": status}
        if self._failure is not None:
            error = self._failure.error
            return details | {"error": {name: error[name] for name in ("type", "code", "message")}}
        if status == "cancelled":
            return details | {"reason": self._reason}
        return details | {"reason": "max_output_tokens"} if status == "incomplete" else None

    def _described(self, status: str) -> dict[str, Any]:
        """The response as events show it."""
        options = self._options
        ended = status != "in_progress"
        conversation = options.conversation
        voice = {"format": {"type": "audio/pcm", "rate": 24_000}, "voice": options.voice_name}
        return {
            "object": "realtime.response",
            "id": self.id,
            "status": status,
            "status_details": self._details(status) if ended else None,
            "output": [self.item.described()] if ended and self.item else [],
            "conversation_id": conversation.id if conversation else None,
            "output_modalities": [options.modality],
            "max_output_tokens": options.max_tokens or "inf",
            "audio": {"output": voice},
            "usage": self._usage() if ended else None,
            "metadata": options.metadata,
            **({"kimi_audio": {"notes": self._notes()}} if ended else {}),
        }

    def _notes(self) -> list[str]:
        """What was unusual; a field that OpenAI's clients do not know and leave alone."""
        notes = []
        if self._prompt.left_out:
            notes.append(
                f"the {self._prompt.left_out} oldest items did not fit; they were left out"
            )
        if self._completion is not None:
            notes += self._completion.notes
            if self._completion.audio_reason:
                notes.append(self._completion.audio_reason)
        return notes

    def _usage(self) -> dict[str, Any]:
        """Positions of the model. Text and speech are generated side by side, and both count."""
        prompt, done = self._prompt, self._completion
        if done is not None:
            text, audio = done.metrics["text_tokens"], done.metrics["speech_codes"]
        else:
            text = len(self._service.model.text_tokenizer.encode(self._part.text or ""))
            audio = 0 if self._options.voice.speaker else self._part.samples // CODE_SAMPLES
        heard = {"audio_tokens": prompt.audio_tokens, "cached_tokens": 0}
        return {
            "total_tokens": prompt.tokens + text + audio,
            "input_tokens": prompt.tokens,
            "output_tokens": text + audio,
            "input_token_details": heard | {"text_tokens": prompt.tokens - prompt.audio_tokens},
            "output_token_details": {"text_tokens": text, "audio_tokens": audio},
        }
