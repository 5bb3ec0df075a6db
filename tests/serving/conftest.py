"""Servers that are started once for all tests of a process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.models.kokoro.tiny import tiny_directory
from tests.paths import MINI, ROOT
from tests.ray_environment import RAY
from tests.serving.helpers import ADMITTED, AUDIO, Server, data_uri, serve, serve_bare
from tests.serving.questions import QUESTION

SCRIPTED = ROOT / "tests" / "serving" / "scripted_predictors.py"


@pytest.fixture(scope="session")
def server(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(golden, tmp_path_factory.mktemp("server")) as server:
        yield server
        server.kill()


@pytest.fixture(scope="session")
def streaming_server(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The streaming predictor of scripted_predictors.py, which is the real one until it is told."""
    directory = tmp_path_factory.mktemp("streaming")
    with serve_bare(golden, directory, f"{SCRIPTED}:Streaming", "StreamingPredictor") as server:
        yield server
        server.kill()


MANY = {
    "KIMI_AUDIO_WEIGHTS": str(MINI),
    "KIMI_AUDIO_URLS": "any",
    "COG_MAX_CONCURRENCY": str(ADMITTED),
}


@pytest.fixture(scope="session")
def many_server(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The trained miniature, which takes many predictions at a time."""
    with serve(golden, tmp_path_factory.mktemp("many"), **MANY) as server:
        yield server
        server.kill()


@pytest.fixture(scope="session")
def many_streaming_server(
    golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serve(golden, tmp_path_factory.mktemp("many-streaming"), "--stream", **MANY) as server:
        yield server
        server.kill()


@pytest.fixture(scope="session")
def replicas(pytestconfig: pytest.Config) -> tuple[str, ...]:
    """Arguments of the OpenAI servers: none, or those of two replicas with ``--ray``."""
    if not pytestconfig.getoption("--ray"):
        return ()
    os.environ |= RAY
    return "--ray", "--replicas", "2", "--slots", "4"  # together as many as without


@pytest.fixture(scope="session")
def front(
    golden: Path, tmp_path_factory: pytest.TempPathFactory, replicas: tuple[str, ...]
) -> Iterator[Server]:
    """``scripts/serve --openai`` with the trained miniature, and the voices anna and nova, and
    a tiny Kokoro.

    It takes recordings of at most 150 s, and bodies of at most 20 MB.
    """
    directory = tmp_path_factory.mktemp("front")
    voices = directory / "voices"
    voices.mkdir()
    for name in ("anna", "nova"):
        (voices / f"{name}.wav").write_bytes(QUESTION.read_bytes())
    kokoro = directory / "kokoro"
    kokoro.mkdir()
    settings = {
        "KIMI_AUDIO_WEIGHTS": str(MINI),
        "KIMI_AUDIO_VOICES": str(voices),
        "KIMI_AUDIO_KOKORO": str(tiny_directory(kokoro)),
        "KIMI_AUDIO_MAX_SECONDS": "150",
        "KIMI_AUDIO_MAX_MEGABYTES": "20",
    }
    with serve(golden, directory, "--openai", *replicas, **settings) as server:
        yield server
        server.kill()


RATE = 30
SESSIONS = 2
"""Requests of a key in a minute, and sessions at a time, that the limited front takes."""


@pytest.fixture(scope="session")
def limited_front(
    golden: Path, tmp_path_factory: pytest.TempPathFactory, replicas: tuple[str, ...]
) -> Iterator[Server]:
    """An OpenAI server of text alone with keys, another name, and few requests and sessions."""
    settings = {
        "KIMI_AUDIO_WEIGHTS": str(MINI),
        "KIMI_AUDIO_OUTPUT": "text",
        "KIMI_AUDIO_API_KEYS": "first, second, retrying, talking",
        "KIMI_AUDIO_MODEL_NAMES": "hearing,kimi-audio",
        "KIMI_AUDIO_REQUESTS_PER_MINUTE": str(RATE),
        "KIMI_AUDIO_CORS_ORIGINS": "https://example.org",
        "KIMI_AUDIO_MAX_SESSIONS": str(SESSIONS),
        "KIMI_AUDIO_SESSION_SECONDS": "6",
        "KIMI_AUDIO_SESSION_IDLE_SECONDS": "3",
    }
    directory = tmp_path_factory.mktemp("limited-front")
    with serve(golden, directory, "--openai", *replicas, **settings) as server:
        yield server
        server.kill()


LIMITS = {
    "KIMI_AUDIO_OUTPUT": "text",
    "KIMI_AUDIO_TIMEOUT": "2",
    "KIMI_AUDIO_URLS": "any",
    "KIMI_AUDIO_URL_MEGABYTES": "1",
    # Nothing of this machine goes through a proxy.
    "HTTP_PROXY": "http://127.0.0.1:1",
    "http_proxy": "http://127.0.0.1:1",
}


@pytest.fixture(scope="session")
def limited_server(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service of text alone with a time limit, which downloads from this machine, too."""
    with serve(golden, tmp_path_factory.mktemp("limited"), **LIMITS) as server:
        yield server
        server.kill()


@pytest.fixture(scope="session")
def scripted_server(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """scripted_predictors.py, in a directory without a schema file: everything gets through."""
    with serve_bare(golden, tmp_path_factory.mktemp("scripted"), f"{SCRIPTED}:Plain") as server:
        yield server
        server.kill()


@pytest.fixture(scope="session")
def speech() -> str:
    """The shortest recorded file."""
    return data_uri(min(AUDIO.iterdir(), key=lambda path: path.stat().st_size).read_bytes())


@pytest.fixture(scope="session")
def long_inputs(server: Server) -> dict[str, Any]:
    """A request that is answered with at least 10 s of speech."""
    inputs = {"text": "Tell me a story.", "audio_temperature": 2.0, "audio_top_k": 0}
    inputs["max_new_tokens"] = 200
    for seed in range(10, 110):
        answer = server.succeed(**inputs, seed=seed)
        if answer["metrics"]["speech_codes"] >= 125:
            return inputs | {"seed": seed}
    pytest.fail("the recorded checkpoint never speaks for 10 s")


@pytest.fixture(scope="session")
def client(front: Server) -> openai.OpenAI:
    """OpenAI's own client, which tries nothing twice."""
    return openai.OpenAI(base_url=f"{front.url}/v1", api_key="unused", max_retries=0)
