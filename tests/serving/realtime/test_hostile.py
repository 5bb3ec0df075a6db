"""Clients that send nonsense, read slowly, or leave: nothing of them stays."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import random
import time
from typing import Any

import httpx
import openai
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.serving.helpers import PATIENCE, Server
from tests.serving.realtime.talk import (
    ASKED,
    MODEL,
    answer,
    encoded,
    manual,
    open_sessions,
    say,
    silence,
    transcript,
    write,
)


def wait_until_free(server: Server) -> None:
    """Until nothing runs and no session is open."""
    deadline = time.monotonic() + PATIENCE
    while True:
        _, health = server.request("GET", "/health")
        count = open_sessions(server)
        if health["status"] == "ready" and not health["running"] and not count:
            return
        assert time.monotonic() < deadline, (health, count)
        time.sleep(0.05)


EVENTS: list[dict[str, Any]] = [
    {"type": "session.update", "session": {"type": "realtime", "instructions": "a"}},
    {
        "type": "session.update",
        "session": {"type": "realtime", "audio": {"input": {"turn_detection": None}}},
    },
    {
        "type": "session.update",
        "session": {
            "type": "realtime",
            "audio": {"input": {"transcription": {}, "turn_detection": {"type": "server_vad"}}},
        },
    },
    {"type": "input_audio_buffer.append", "audio": encoded(ASKED[:48_000])},
    {"type": "input_audio_buffer.append", "audio": encoded(silence(0.6))},
    {"type": "input_audio_buffer.commit"},
    {"type": "input_audio_buffer.clear"},
    {
        "type": "conversation.item.create",
        "item": {
            "type": "message",
            "role": "user",
            "id": "a",
            "content": [{"type": "input_text", "text": "one"}],
        },
    },
    {"type": "conversation.item.delete", "item_id": "a"},
    {"type": "conversation.item.retrieve", "item_id": "a"},
    {"type": "conversation.item.truncate", "item_id": "a", "content_index": 0, "audio_end_ms": 0},
    {"type": "response.create", "response": {"output_modalities": ["text"]}},
    {"type": "response.create"},
    {"type": "response.cancel"},
]
VALUES: list[Any] = [
    *(None, True, -1, 0, 2**63, 1e308, "", "a", "root", "\0", "é" * 1000, [], {}, [[]], {"a": {}}),
    *("AAAA", "AA==", "A" * 9999, [None] * 100, {"type": "message"}, ["audio"], "inf"),
]


def hostile_frame(chance: random.Random) -> str | bytes:
    """An event that is right, has one wrong value, or is cut or damaged."""
    event = copy.deepcopy(chance.choice(EVENTS))
    for _ in range(chance.choice((0, 1, 1, 2))):
        place: Any = event
        while True:
            inner = [v for v in (place.values() if isinstance(place, dict) else place) if v]
            inner = [value for value in inner if isinstance(value, dict | list)]
            if not inner or chance.random() < 0.4:
                break
            place = chance.choice(inner)
        value = copy.deepcopy(chance.choice(VALUES))
        if isinstance(place, list):
            place.append(value)
        else:
            place[chance.choice([*place, "other"])] = value
    text = json.dumps(event)
    if chance.random() < 0.1:
        text = text[: chance.randrange(len(text))]
    if chance.random() < 0.1:
        place = chance.randrange(len(text) + 1)
        text = text[:place] + chance.choice('{}[]",:\\\u0000e9') + text[place:]
    return text.encode() if chance.random() < 0.05 else text


async def send_frames(url: str, seed: int, count: int) -> set[str]:
    """A session full of nonsense, which it must survive; the types of what it answers."""
    chance = random.Random(seed)
    # What is not read at the end holds up the end of the connection for so many seconds.
    async with connect(url, max_size=None, close_timeout=0.5) as socket:
        replies = asyncio.create_task(read_all(socket))
        for _ in range(count):
            await socket.send(hostile_frame(chance))
        await socket.send(json.dumps({"type": "response.cancel", "event_id": "last"}))
        await socket.send(json.dumps({"type": "conversation.item.delete", "item_id": "last one"}))
        return await replies


async def read_all(socket: ClientConnection) -> set[str]:
    """Read up to the answer to the last event; none may be an error that is the server's fault."""
    types = set()
    async for message in socket:
        event = json.loads(message)
        types.add(event["type"])
        error = event.get("error") or (event.get("response") or {}).get("status_details") or {}
        error = error.get("error", error) or {}
        assert error.get("type") != "server_error", event
        if error.get("code") == "item_not_found" and "last one" in error["message"]:
            break
    return types


def test_nonsense_is_survived(front: Server, long: bool) -> None:
    url = f"{front.url.replace('http', 'ws')}/v1/realtime"
    sessions, frames = (40, 300) if long else (10, 100)

    async def attack() -> set[str]:
        async with asyncio.timeout(PATIENCE * (5 if long else 1)):
            attacks = (send_frames(url, seed, frames) for seed in range(sessions))
            return set().union(*await asyncio.gather(*attacks))

    types = asyncio.run(attack())
    assert {"error", "session.updated", "response.done", "conversation.item.retrieved"} <= types
    wait_until_free(front)


def test_clients_that_hang_up_leave_nothing(front: Server, long: bool) -> None:
    url = f"{front.url.replace('http', 'ws')}/v1/realtime"
    append = {"type": "input_audio_buffer.append", "audio": encoded(ASKED + silence(0.7))}
    stages: list[list[Any]] = [
        [],
        [append],
        [append, {"type": "response.create"}, {"type": "response.create"}],
        [{"type": "input_audio_buffer.append", "audio": encoded(silence(20))}],
        [EVENTS[2], append],
    ]

    async def hang_up(number: int) -> None:
        with contextlib.suppress(ConnectionClosed):
            socket = await connect(url)
            for event in stages[number % len(stages)]:
                await socket.send(json.dumps(event))
            if number % 3:
                await asyncio.sleep(0.1 * (number % 7))
            if number % 2:
                socket.transport.abort()
            else:
                await socket.close()

    async def hang_up_all() -> None:
        for first in range(0, 200 if long else 20, 10):
            await asyncio.gather(*(hang_up(number) for number in range(first, first + 10)))

    asyncio.run(hang_up_all())
    wait_until_free(front)


def test_a_client_that_does_not_read_holds_back_only_itself(
    front: Server, client: openai.OpenAI
) -> None:
    url = f"{front.url.replace('http', 'ws')}/v1/realtime"

    async def stall() -> ClientConnection:
        socket = await connect(url, max_queue=1, max_size=None)
        part = {"type": "input_audio", "audio": encoded(silence(60))}
        item = {"type": "message", "role": "user", "id": "long", "content": [part]}
        await socket.send(json.dumps({"type": "conversation.item.create", "item": item}))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                for _ in range(100):
                    event = {"type": "conversation.item.retrieve", "item_id": "long"}
                    await socket.send(json.dumps(event).ljust(100_000))
        return socket

    async def others() -> None:
        socket = await stall()
        assert await asyncio.to_thread(ask, client) == "nine"
        socket.transport.abort()

    asyncio.run(others())
    wait_until_free(front)


def ask(client: openai.OpenAI) -> str:
    with manual(client, output_modalities=["text"]) as session:
        say(session)
        return transcript(answer(session))


def test_a_client_that_is_gone_without_a_word_is_noticed(front: Server, long: bool) -> None:
    """It answers no ping."""
    if not long:
        pytest.skip("takes 40 s")
    url = f"{front.url.replace('http', 'ws')}/v1/realtime"

    async def go() -> None:
        socket = await connect(url, ping_interval=None)
        socket.transport.pause_reading()
        await asyncio.sleep(1)
        assert "kimi_audio_sessions 1.0" in httpx.get(f"{front.url}/metrics").text
        await asyncio.to_thread(wait_until_free, front)

    asyncio.run(go())


def test_an_answer_ends_with_its_connection(front: Server, client: openai.OpenAI) -> None:
    with client.realtime.connect(model=MODEL) as session:
        session.recv()
        write(session, "Please read aloud: " + "take the red ball to the school " * 6)
        session.response.create()
        while session.recv().type != "response.output_audio.delta":
            pass
    before = time.monotonic()
    wait_until_free(front)
    assert time.monotonic() - before < PATIENCE
