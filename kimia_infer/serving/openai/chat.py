"""Chat completions: messages with text and sound in, text and speech out, whole or streamed."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import AsyncGenerator, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from kimia_infer.api.events import AudioChunk, Completion, Event, TextDelta
from kimia_infer.api.parameters import CODES_PER_SECOND
from kimia_infer.api.request import Deadline
from kimia_infer.audio.encode import encode
from kimia_infer.audio.files import pcm16, wav_bytes
from kimia_infer.serving.openai.answers import while_connected
from kimia_infer.serving.openai.chat_request import NAMES, ChatRequest
from kimia_infer.serving.openai.errors import as_api_error
from kimia_infer.serving.openai.messages import read_messages
from kimia_infer.serving.openai.replies import KEPT_SECONDS, Reply, new_id
from kimia_infer.serving.openai.service import Service, Serving
from kimia_infer.serving.openai.streams import DONE, event_stream
from kimia_infer.serving.openai.voices import Voice, read_voice
from kimia_infer.utils.errors import RequestError

routes = APIRouter()

WHOLE_PIECES = 6
"""Streamed samples come in multiples of so many bytes: as base64 they need no padding, so that
clients may join the pieces' base64, and none is cut within a sample."""


@routes.post("/chat/completions")
async def create(request: Request, service: Serving, asked: ChatRequest) -> Response:
    """An answer to messages, in text or in text and speech."""
    service.check_model(asked.model)
    asked.check()
    voice = Voice()
    if asked.audio is not None:
        voice = read_voice(service, asked.audio.voice, "audio.voice")
        service.check_speech("modalities", voice.speaker)
    answer = Answer(service, asked, voice)
    if asked.stream:
        return await event_stream(request, answer.chunks(), DONE, NAMES)
    try:
        last = await while_connected(request, service.answers.last(answer.events))
    except RequestError as error:
        raise as_api_error(error, NAMES) from error
    assert isinstance(last, Completion)
    return JSONResponse(answer.whole(last))


@dataclass
class Answer:
    """An answer on its way to OpenAI's form."""

    service: Service
    asked: ChatRequest
    voice: Voice
    id: str = field(default_factory=lambda: new_id("chatcmpl"))
    created: int = field(default_factory=lambda: int(time.time()))
    audio_id: str = field(default_factory=lambda: new_id("audio"))
    _data: bytes = b""
    _expires_at: int = 0

    def events(self, deadline: Deadline) -> Generator[Event]:
        """What the model answers, on a thread; last its Completion, which is kept."""
        service, asked = self.service, self.asked
        chat = read_messages(asked.messages, service.replies)
        events = service.model.respond(
            chat.messages,
            asked.parameters(service.settings.timeout, self.voice.speaker),
            voice=self.voice.recording,
            deadline=deadline,
            stop=asked.stop,
        )
        try:
            with contextlib.closing(events):
                for event in events:
                    if isinstance(event, Completion):
                        event = replace(event, notes=[chat.named(note) for note in event.notes])
                        self._complete(event)
                    yield event
        except RequestError as error:
            if (named := chat.named(str(error))) == str(error):
                raise
            raise type(error)(named) from error

    def _complete(self, completion: Completion) -> None:
        self.service.meters.count(completion)
        if not self.asked.speaks:
            return
        self._expires_at = int(time.time()) + KEPT_SECONDS
        wave = None if completion.wav is None else completion.wav[0].numpy()
        # Words that were not said, as the answer was cut, do not fit beside what was.
        room = 0 if wave is None else len(wave) / completion.sample_rate * CODES_PER_SECOND
        said = wave is not None and len(completion.text_ids) <= round(room)
        wav = wav_bytes(wave, completion.sample_rate) if said and wave is not None else None
        self.service.replies.keep(Reply(self.audio_id, completion.text, wav, self._expires_at))
        if wave is not None and not self.asked.stream:
            self._data = encode(wave, self.asked.form, completion.sample_rate)

    def whole(self, completion: Completion) -> dict[str, Any]:
        """The answer as one object."""
        message: dict[str, Any] = {"role": "assistant", "content": completion.text}
        if self.asked.speaks:
            message = {"role": "assistant", "content": None, "audio": {
                "id": self.audio_id,
                "data": base64.b64encode(self._data).decode(),
                "expires_at": self._expires_at,
                "transcript": completion.text,
            }}  # fmt: skip
        choice = {
            "index": 0,
            "message": message | {"refusal": None},
            "logprobs": None,
            "finish_reason": finish_reason(completion),
        }
        return self._object("chat.completion") | {
            "choices": [choice],
            "usage": usage(completion),
            "kimi_audio": extras(completion),
        }

    async def chunks(self) -> AsyncGenerator[Mapping[str, Any]]:
        """The answer as the chunks of a stream, for as long as they are read."""
        speaks, rest, begun = self.asked.speaks, b"", False
        async with contextlib.aclosing(self.service.answers.stream(self.events)) as events:
            async for event in events:
                if not begun:
                    begun = True
                    opening = {"audio": {"id": self.audio_id}} if speaks else {"content": ""}
                    yield self._chunk({"role": "assistant", **opening})
                match event:
                    case TextDelta():
                        text = event.text
                        yield self._chunk(
                            {"audio": {"transcript": text}} if speaks else {"content": text}
                        )
                    case AudioChunk():
                        rest += pcm16(event.wav.numpy()).tobytes()
                        end = len(rest) // WHOLE_PIECES * WHOLE_PIECES
                        if end:
                            yield self._sound(rest[:end])
                        rest = rest[end:]
                    case Completion():
                        if rest:
                            yield self._sound(rest)
                        for chunk in self._end(event):
                            yield chunk

    def _end(self, completion: Completion) -> Generator[dict[str, Any]]:
        if self.asked.speaks:
            yield self._chunk({"audio": {"expires_at": self._expires_at}})
        last = self._chunk({}, finish_reason(completion))
        yield last | {"kimi_audio": extras(completion)}
        if self.asked.includes_usage:
            yield self._chunk(None) | {"usage": usage(completion)}

    def _sound(self, samples: bytes) -> dict[str, Any]:
        return self._chunk({"audio": {"data": base64.b64encode(samples).decode()}})

    def _chunk(self, delta: Mapping[str, Any] | None, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        chunk = self._object("chat.completion.chunk")
        chunk["choices"] = [] if delta is None else [choice]
        return chunk | ({"usage": None} if self.asked.includes_usage else {})

    def _object(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model}


def finish_reason(completion: Completion) -> str:
    """A text that repeated itself was cut as one that reached a limit."""
    return "stop" if completion.metrics["stop_reason"] in ("end", "stop") else "length"


def usage(completion: Completion) -> dict[str, Any]:
    """Positions of the prompt and tokens of the answer, by track."""
    metrics = completion.metrics
    prompt, heard = metrics["prompt_tokens"], metrics["prompt_audio_tokens"]
    written, spoken = metrics["text_tokens"], metrics["speech_codes"]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written + spoken,
        "total_tokens": prompt + written + spoken,
        "prompt_tokens_details": {
            "audio_tokens": heard,
            "text_tokens": prompt - heard,
            "cached_tokens": 0,
        },
        "completion_tokens_details": {
            "audio_tokens": spoken,
            "text_tokens": written,
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def extras(completion: Completion) -> dict[str, Any]:
    """What OpenAI's form has no place for; its clients keep unknown fields aside."""
    reasons = [] if completion.audio_reason is None else [completion.audio_reason]
    return {"seed": completion.metrics["seed"], "notes": [*reasons, *completion.notes]}
