"""A server of the page whose realtime sessions answer by a script instead of a model."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

import numpy as np
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import Request
from starlette.responses import Response
from starlette.websockets import WebSocketDisconnected

from kimia_infer.serving.openai import page
from tests.serving.applications import serving

RATE = 24_000
KEY = "secret"


class ScriptedServer:
    """Hears "what is four plus five" in everything, answers with a tone of ``seconds``.

    ``events`` are those that came, ``refusal`` is a status for all requests, ``locked`` asks for
    KEY. ``described`` is the session that a client is told of. A piece of 0.2 s of sound takes
    ``pace`` seconds.
    """

    def __init__(self) -> None:
        self.url = ""
        self.reset()

    def reset(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.connections: list[WebSocket] = []
        self.forms: list[Any] = []
        self.described: dict[str, Any] = {}
        self.refusal: int | None = None
        self.locked = False
        self.seconds = 0.4
        self.pace = 0.0

    def push(self, **event: Any) -> None:
        """Send an event to the newest session, from another thread."""
        asyncio.run_coroutine_threadsafe(self.connections[-1].send_json(event), self.loop).result()

    def hang_up(self, code: int, reason: str = "") -> None:
        socket = self.connections[-1]
        asyncio.run_coroutine_threadsafe(socket.close(code, reason), self.loop).result()

    def sound(self) -> np.ndarray:
        """Samples [n] that the microphone sent, int16 at 24 kHz."""
        parts = [base64.b64decode(e["audio"]) for e in self.named("input_audio_buffer.append")]
        return np.frombuffer(b"".join(parts), "<i2")

    def named(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == name]

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(page.routes)

        @app.middleware("http")
        async def refuse(request: Request, call_next: Any) -> Response:
            if request.url.path.startswith("/v1/"):
                given = request.headers.get("authorization")
                if self.locked and given != f"Bearer {KEY}":
                    return JSONResponse({"error": {"message": "a key is needed"}}, 401)
                if self.refusal:
                    return JSONResponse({"error": {"message": "all slots taken"}}, self.refusal)
            return await call_next(request)

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": [{"id": "kimi-audio"}]}

        @app.get("/v1/audio/voices")
        async def voices() -> dict[str, Any]:
            data = [{"id": name, "name": name} for name in ("default", "anna")]
            kokoro = {"kokoro:af_heart": "en-us", "kokoro:ef_dora": "es", "kokoro:am_adam": "en-us"}
            data += [{"id": i, "name": i, "language": spoken} for i, spoken in kokoro.items()]
            return {"data": data}

        @app.post("/v1/audio/transcriptions")
        async def transcriptions(request: Request) -> Response:
            self.forms.append(await request.form())
            name = "transcript.text"
            events = [
                {"type": f"{name}.delta", "delta": "what is four"},
                {"type": f"{name}.segment", "start": 0.0, "end": 1.5, "text": "what is four"},
                {"type": f"{name}.delta", "delta": " plus five"},
                {"type": f"{name}.segment", "start": 3661.5, "end": 3662.9996, "text": "plus five"},
                {"type": f"{name}.done", "text": "what is four plus five"},
            ]

            async def lines() -> AsyncIterator[str]:
                for event in events:
                    yield f"data: {json.dumps(event)}\n\n"
                    await asyncio.sleep(0.05)

            return StreamingResponse(lines(), media_type="text/event-stream")

        app.add_api_websocket_route("/v1/realtime", self.session)
        app.mount("/behind/a/path", app)
        return app

    async def session(self, socket: WebSocket) -> None:
        protocols = socket.scope["subprotocols"]
        key = f"openai-insecure-api-key.{KEY}"
        if self.refusal or (self.locked and key not in protocols):
            await socket.close(1008)
            return
        await socket.accept("realtime")
        self.loop, events = asyncio.get_running_loop(), self.events  # until the next test
        self.connections.append(socket)
        await socket.send_json({"type": "session.created", "session": self.described})
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                event = await socket.receive_json()
                events.append(event)
                await self.answer(socket, event)

    async def answer(self, socket: WebSocket, event: dict[str, Any]) -> None:
        number = len(self.events)
        match event["type"]:
            case "input_audio_buffer.commit":
                await send_heard(socket, f"user_{number}")
            case "conversation.item.create":
                item = event["item"] | {"id": f"user_{number}"}
                await socket.send_json({"type": "conversation.item.added", "item": item})
            case "response.create":
                making = send_answer(socket, f"{number}", self.seconds, self.pace)
                self.making = asyncio.create_task(while_open(making))
            case "response.cancel":
                self.making.cancel()
                response = {"id": event["response_id"], "status": "cancelled"}
                await socket.send_json({"type": "response.done", "response": response})


async def while_open(sending: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(WebSocketDisconnect, WebSocketDisconnected):
        await sending


async def send_heard(socket: WebSocket, item: str) -> None:
    name = "conversation.item.input_audio_transcription"
    for event in (
        {"type": "input_audio_buffer.committed", "item_id": item, "previous_item_id": None},
        {"type": f"{name}.delta", "item_id": item, "delta": "what is four"},
        {"type": f"{name}.completed", "item_id": item, "transcript": "what is four plus five"},
    ):
        await socket.send_json(event)


async def send_answer(socket: WebSocket, number: str, seconds: float, pace: float) -> None:
    response, item = f"resp_{number}", f"item_{number}"
    place = {"response_id": response, "item_id": item, "output_index": 0, "content_index": 0}
    message = {"id": item, "type": "message", "role": "assistant", "content": []}
    tone = np.sin(np.arange(round(seconds * RATE)) * 2 * np.pi * 440 / RATE)
    pcm = np.rint(tone * 16_000).astype("<i2")
    await socket.send_json({"type": "response.created", "response": {"id": response}})
    await socket.send_json({"type": "response.output_item.added", **place, "item": message})
    for word in ("the answer ", "is nine"):
        delta = {"type": "response.output_audio_transcript.delta", "delta": word}
        await socket.send_json(place | delta)
    for start in range(0, len(pcm), 4800):
        sound = base64.b64encode(pcm[start : start + 4800].tobytes()).decode()
        await socket.send_json(place | {"type": "response.output_audio.delta", "delta": sound})
        await asyncio.sleep(pace)
    await socket.send_json(place | {"type": "response.output_audio.done"})
    done = {"id": response, "status": "completed", "output": [message]}
    await socket.send_json({"type": "response.done", "response": done})


@contextlib.contextmanager
def running(scripted: ScriptedServer) -> Iterator[ScriptedServer]:
    with serving(scripted.app()) as scripted.url:
        yield scripted
