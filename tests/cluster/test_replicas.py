"""Replicas on Ray Serve: one dies, they become more and fewer, they have several adapters."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from kimia_infer.weights.adapter import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from tests.paths import MINI, ROOT
from tests.ray_environment import RAY
from tests.serving.helpers import PATIENCE, Server, free_port

MODEL, ASKED = "kimi-audio", "what comes after six"
CLEAR = (openai.APIConnectionError, openai.InternalServerError, httpx.RemoteProtocolError)
"""What the client raises for an answer whose replica has died, the last within a stream."""

NAME = "kimi-audio"
HEAD = r"language_model\.text_head"


@pytest.fixture(scope="module")
def url(long: bool) -> Iterator[str]:
    """The address of Ray Serve on two cores of this machine."""
    ray = pytest.importorskip("ray")
    if not long:
        pytest.skip("takes minutes: scripts/test --long")
    from ray import serve

    os.environ |= RAY | {
        "KIMI_AUDIO_WEIGHTS": str(MINI),
        "KIMI_AUDIO_DEVICE": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    ray.init(num_cpus=2, num_gpus=0, object_store_memory=200 << 20, include_dashboard=False)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@contextlib.contextmanager
def serving(**scale: Any) -> Iterator[None]:
    from ray import serve

    from kimia_infer.cluster.serve import application

    serve.run(application(scale), name=NAME, route_prefix="/")
    try:
        yield
    finally:
        serve.delete(NAME)


def replicas() -> int:
    from ray import serve

    [deployment] = serve.status().applications[NAME].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def ask(client: openai.OpenAI, **options: Any) -> str:
    """The streamed answer to the question, whole; the seed makes it the same each time."""
    messages: Any = [{"role": "user", "content": ASKED}]
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, stream=True, seed=1, **options
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream).strip()


class Load:
    """Clients that ask again as soon as they are answered; what became of it, in order."""

    def __init__(self, url: str, clients: int):
        self.outcomes: list[str | type[Exception]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url,)) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, url: str) -> None:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
        while not self._stop.is_set():
            try:
                self.outcomes.append(ask(client))
            except CLEAR as error:
                self.outcomes.append(type(error))
                time.sleep(0.5)


def replica_processes() -> list[int]:
    """The processes of the replicas, which are below this one."""
    server = Server("", Path(), os.getpid())
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in server.processes()}
    return [pid for pid, title in titles.items() if b"ServeReplica" in title]


def talks(session: ClientConnection) -> bool:
    """Whether a session still answers."""
    text = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": ASKED}]}
    try:
        session.send(json.dumps({"type": "conversation.item.create", "item": text}))
        asked = {"output_modalities": ["text"]}
        session.send(json.dumps({"type": "response.create", "response": asked}))
        while (event := json.loads(session.recv(PATIENCE)))["type"] != "response.done":
            assert event["type"] != "error", event
    except ConnectionClosed:
        return False
    return event["response"]["status"] == "completed"


def test_a_replica_that_dies_takes_its_requests_alone(url: str) -> None:
    with serving(min_replicas=2, max_replicas=2), contextlib.ExitStack() as stack:
        address = f"{url.replace('http', 'ws')}/v1/realtime?model={MODEL}"
        sessions = [stack.enter_context(connect(address)) for _ in range(6)]
        assert httpx.get(f"{url}/health").json()["slots"] == 16  # of both
        assert "kimi_audio_sessions 6.0\n" in httpx.get(f"{url}/metrics").text
        with Load(url, 4) as load:
            wait_for(lambda: len(load.outcomes) >= 8)
            os.kill(replica_processes()[0], signal.SIGKILL)
            before = len(load.outcomes)
            wait_for(lambda: replicas() == 2 and len(load.outcomes) >= before + 30)
            after = len(load.outcomes)
            wait_for(lambda: len(load.outcomes) >= after + 8)
        (answer,) = set(load.outcomes[:before])
        assert set(load.outcomes[before:after]) - set(CLEAR) == {answer}
        assert set(load.outcomes[after:]) == {answer}
        assert 0 < sum(map(talks, sessions)) < len(sessions)


def test_replicas_come_and_go_with_the_load(url: str) -> None:
    """No answer is lost, not even of the replica that is stopped."""
    # A replica that is still loading when it is to go takes all of the time to end.
    scale = {"min_replicas": 1, "max_replicas": 2, "requests": 2, "drain_seconds": 20}
    with serving(**scale, upscale_seconds=1, downscale_seconds=5), Load(url, 1) as few:
        wait_for(lambda: len(few.outcomes) >= 2)
        assert replicas() == 1
        with Load(url, 6) as many:
            wait_for(lambda: replicas() == 2)
            wait_for(lambda: len(many.outcomes) >= 20)
        wait_for(lambda: replicas() == 1)
        wait_for(lambda: len(few.outcomes) >= 10)
    assert len({*few.outcomes, *many.outcomes}) == 1 and isinstance(few.outcomes[0], str)


def write_adapter(directory: Path) -> None:
    """An adapter that spoils the model: every text it writes is another one."""
    shape = load_file(MINI / "model.safetensors")["lm_head.weight"].shape
    directory.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": HEAD}
    (directory / CONFIG_NAME).write_text(json.dumps(config))
    tensors = {
        f"{PREFIX}language_model.text_head.lora_A.weight": torch.ones(1, shape[1]),
        f"{PREFIX}language_model.text_head.lora_B.weight": torch.linspace(-9, 9, shape[0])[:, None],
    }
    save_file(tensors, directory / WEIGHTS_NAME)


def test_a_header_chooses_an_adapter(url: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_adapter(tmp_path / name)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    with serving(adapters=str(tmp_path)):
        answer = ask(client)
        for name in ("one", "two", "one"):  # one is unloaded for two, and loaded again
            header = {"serve_multiplexed_model_id": name}
            assert ask(client, extra_headers=header) != answer
            assert ask(client) == answer
            models = client.models.list(extra_headers=header)
            assert [model.id for model in models] == [name, MODEL]
        with pytest.raises(openai.NotFoundError, match="there is no adapter 'three' here"):
            ask(client, extra_headers={"serve_multiplexed_model_id": "three"})
