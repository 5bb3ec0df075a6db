"""What the server for OpenAI's clients adds to a request, beside the library in one process.

    .venv/bin/python -m scripts.benchmark.http_overhead --weights weights/mini

The same question is asked through the library and over HTTP in turn, by one client that keeps its
connection, so that nothing but the way differs.
"""

from __future__ import annotations

import argparse
import base64
import json
import logging
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from kimia_infer.api.events import AudioChunk
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import ServiceParameters, parse_as
from kimia_infer.serving.openai.app import create_app
from kimia_infer.serving.openai.server import bound
from kimia_infer.serving.openai.service import Service
from kimia_infer.serving.openai.settings import OpenAISettings

QUESTION = Path(__file__).parents[1] / "question.wav"
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="weights/mini")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    model = KimiAudio(arguments.weights)
    with bound("127.0.0.1", 0) as listener:
        service = Service(model, OpenAISettings())
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_config=None))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
                measure(model, client, arguments.rounds)
        finally:
            server.should_exit = True
            thread.join()


def measure(model: KimiAudio, client: httpx.Client, rounds: int) -> None:
    sound = QUESTION.read_bytes()
    ways: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        "whole text": (lambda: library_text(model, sound), lambda: http_text(client, sound)),
        "first streamed sound": (
            lambda: library_first_sound(model, sound),
            lambda: http_first_sound(client, sound),
        ),
    }
    print(f"milliseconds, median of {rounds} rounds (least)")
    for name, (library, http) in ways.items():
        times = [(library(), http()) for _ in range(WARM_UP + rounds)][WARM_UP:]
        own, asked = zip(*times, strict=True)
        added = statistics.median(b - a for a, b in times)
        print(
            f"{name}: library {shown(own)}, HTTP {shown(asked)}, added to each {1000 * added:+.1f}"
        )
    refused = [http_refused(client, sound) for _ in range(WARM_UP + rounds)][WARM_UP:]
    print(f"refused, as an earlier reply is unknown: HTTP {shown(refused)}")


def shown(seconds: Sequence[float]) -> str:
    return f"{1000 * statistics.median(seconds):.1f} ({1000 * min(seconds):.1f})"


def library_text(model: KimiAudio, sound: bytes) -> float:
    options = parse_as(ServiceParameters, {"output_type": "text", "seed": 1})
    start = time.perf_counter()
    assert model.complete(chat(sound), options).text
    return time.perf_counter() - start


def http_text(client: httpx.Client, sound: bytes) -> float:
    start = time.perf_counter()
    answer = client.post("/v1/chat/completions", json=body(sound))
    assert answer.json()["choices"][0]["message"]["content"]
    return time.perf_counter() - start


def library_first_sound(model: KimiAudio, sound: bytes) -> float:
    options = parse_as(ServiceParameters, {"preset": "low_latency", "seed": 1})
    start = time.perf_counter()
    first = 0.0
    for event in model.respond(chat(sound), options):
        if isinstance(event, AudioChunk) and not first:
            first = time.perf_counter() - start
    return first


def http_first_sound(client: httpx.Client, sound: bytes) -> float:
    speech = {
        "modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"},
        "stream": True,
    }  # fmt: skip
    start, first = time.perf_counter(), 0.0
    with client.stream("POST", "/v1/chat/completions", json=body(sound) | speech) as answer:
        for line in answer.iter_lines():
            if not first and '"data"' in line:
                assert json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["audio"]
                first = time.perf_counter() - start
    return first


def http_refused(client: httpx.Client, sound: bytes) -> float:
    """All of the way but the model: the body is read and checked, a thread refuses it."""
    asked = body(sound)
    asked["messages"].insert(1, {"role": "assistant", "audio": {"id": "unknown"}})
    asked["messages"].append(asked["messages"][0])
    start = time.perf_counter()
    assert client.post("/v1/chat/completions", json=asked).status_code == 404
    return time.perf_counter() - start


def chat(sound: bytes) -> list[dict[str, Any]]:
    return [{"role": "user", "message_type": "audio", "content": sound}]


def body(sound: bytes) -> dict[str, Any]:
    data = base64.b64encode(sound).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    message = {"role": "user", "content": [part]}
    return {"model": "kimi-audio", "seed": 1, "messages": [message]}


if __name__ == "__main__":
    main()
