"""What there is: the model, its health, its counters, and the errors of wrong addresses."""

from __future__ import annotations

import socket

import httpx
import openai
import pytest

from kimia_infer.serving.openai.errors import as_api_error
from kimia_infer.utils.errors import RequestTimeout
from tests.serving.conftest import RATE
from tests.serving.helpers import PATIENCE, Server


def test_models_are_listed(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object) == ("kimi-audio", "model")
    assert client.models.retrieve("kimi-audio") == model


def test_unknown_models_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no 'gpt-9' here; this server has kimi-audio"):
        client.models.retrieve("gpt-9")


def test_health_says_how_busy_the_engine_is(front: Server) -> None:
    status, health = front.request("GET", "/health")
    assert status == 200
    assert health == {"status": "ready", "queued": 0, "running": 0, "slots": 8}


def test_wrong_addresses_and_methods_are_errors_in_openais_form(front: Server) -> None:
    for method, path, expected in (("GET", "/v1/nothing", 404), ("POST", "/health", 405)):
        status, body = front.request(method, path)
        assert status == expected
        assert body["error"].keys() == {"message", "type", "param", "code"}
        assert path in body["error"]["message"]


def test_a_time_limit_is_explained_to_those_who_cannot_set_it() -> None:
    refused = as_api_error(RequestTimeout(2.0))
    assert (refused.status_code, refused.code, refused.param) == (408, "timeout", None)
    assert str(refused).startswith("the answer was not complete within 2 s, the limit of this serv")


def refusals(server: Server, path: str) -> float:
    """How many requests for ``path`` were refused for their key."""
    name = f'kimi_audio_requests_total{{endpoint="{path}",status="401"}} '
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def test_keys_names_and_rates(limited_front: Server) -> None:
    url = f"{limited_front.url}/v1"
    paths = ("/v1/models", "/v1/models/{name}")
    before = [refusals(limited_front, path) for path in paths]
    wrong = openai.OpenAI(base_url=url, api_key="third", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="a key of this server"):
        wrong.models.list()
    with pytest.raises(openai.AuthenticationError):
        wrong.models.retrieve("hearing")
    assert [refusals(limited_front, path) for path in paths] == [count + 1 for count in before]
    assert limited_front.request("GET", "/health")[0] == 200
    for key in ("first", "second"):
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
        assert [m.id for m in client.models.list()] == ["hearing", "kimi-audio"]
        for _ in range(RATE - 1):
            client.models.retrieve("kimi-audio")
        message = f"{RATE} requests in a minute"
        with pytest.raises(openai.RateLimitError, match=message) as refused:
            client.models.list()
        assert 0 < int(refused.value.response.headers["retry-after-ms"]) <= 60_000
    page = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    allowed = httpx.options(f"{url}/models", headers=page).headers
    assert allowed["access-control-allow-origin"] == "https://example.org"
    # A key is checked before the body is read, which here never comes.
    host, _, port = limited_front.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000000\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")
