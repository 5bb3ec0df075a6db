"""First sound through a realtime session and from the library, in turns, with one loaded model.

    .venv/bin/python -m scripts.benchmark.realtime --weights weights/mini --runs 20

The client is another thread of the process; its sound is there before the time begins, which is
when it asks for the answer. Needs the extras serve and dev.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import uvicorn

from kimia_infer.api.events import AudioChunk
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import ServiceParameters
from kimia_infer.audio.files import load_audio, pcm16
from kimia_infer.serving.openai.app import create_app
from kimia_infer.serving.openai.service import Service
from kimia_infer.serving.openai.settings import OpenAISettings
from kimia_infer.serving.realtime.schema import SAMPLE_RATE

QUESTION = Path(__file__).parents[1] / "question.wav"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="weights/mini")
    parser.add_argument("--audio", type=Path, default=QUESTION)
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    model = KimiAudio(arguments.weights, head_rows="track")
    sound = pcm16(load_audio(arguments.audio, sample_rate=SAMPLE_RATE))
    times: dict[str, list[float]] = {"library": [], "realtime": []}
    with serving(model) as url:
        for run in range(arguments.runs + 1):
            pair = {"library": library(model, sound), "realtime": realtime(url, sound)}
            for name, seconds in pair.items() if run else ():  # the first warms up
                times[name].append(seconds)
    for name, values in times.items():
        print(f"{name:9} {1000 * statistics.median(values):6.0f} ms to the first sound (median)")
    extra = [b - a for a, b in zip(times["library"], times["realtime"], strict=True)]
    print(f"{'more':9} {1000 * statistics.median(extra):6.0f} ms (median of pairs)")


@contextlib.contextmanager
def serving(model: KimiAudio) -> Iterator[str]:
    """A server around ``model`` in this process."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(Service(model, OpenAISettings()))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="websockets-sansio"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


def library(model: KimiAudio, sound: np.ndarray) -> float:
    """Seconds to the first sound."""
    chats = [{"role": "user", "message_type": "audio", "content": (sound, SAMPLE_RATE)}]
    started, first = time.perf_counter(), 0.0
    for event in model.respond(chats, ServiceParameters(preset="low_latency")):
        if isinstance(event, AudioChunk) and not first:
            first = time.perf_counter() - started
    return first


def realtime(url: str, sound: np.ndarray) -> float:
    """The same through a session."""
    client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
    with client.realtime.connect(model="kimi-audio") as session:
        session.session.update(
            session={"type": "realtime", "audio": {"input": {"turn_detection": None}}}  # type: ignore[typeddict-item]
        )
        session.input_audio_buffer.append(audio=base64.b64encode(sound.tobytes()).decode())
        session.conversation.item.delete(item_id="none")  # is answered once the sound is there
        while session.recv().type != "error":
            pass
        started, first = time.perf_counter(), 0.0
        session.input_audio_buffer.commit()
        session.response.create()
        while (event := session.recv()).type != "response.done":
            if event.type == "response.output_audio.delta" and not first:
                first = time.perf_counter() - started
    return first


if __name__ == "__main__":
    main()
