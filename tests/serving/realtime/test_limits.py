"""Who may open a session, how many there may be, and how long they last."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import openai
import pytest
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.serving.conftest import SESSIONS
from tests.serving.helpers import PATIENCE, Server
from tests.serving.realtime.talk import MODEL, open_sessions, until


def client_of(server: Server, key: str = "talking") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def dial(server: Server, query: str = "", **options: Any) -> ClientConnection:
    """A plain WebSocket, as soon as there is room for it."""
    deadline = time.monotonic() + PATIENCE
    while open_sessions(server) >= SESSIONS:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    url = f"{server.url.replace('http', 'ws')}/v1/realtime{query}"
    options = {"additional_headers": {"Authorization": "Bearer talking"}} | options
    return connect(url, **options)


def refused(server: Server, query: str = "", **options: Any) -> tuple[int, dict[str, Any]]:
    with pytest.raises(InvalidStatus) as error:
        dial(server, query, **options)
    response = error.value.response
    return response.status_code, json.loads(response.body)["error"]


def test_a_key_is_asked_for(limited_front: Server) -> None:
    wrong = {"Authorization": "Bearer third"}
    status, error = refused(limited_front, additional_headers=wrong)
    assert (status, error["code"]) == (401, "invalid_api_key")
    assert refused(limited_front, additional_headers={})[0] == 401
    browser: Any = ["realtime", "openai-insecure-api-key.talking"]
    with dial(limited_front, additional_headers={}, subprotocols=browser) as socket:
        assert socket.subprotocol == "realtime"
        assert json.loads(socket.recv())["type"] == "session.created"


def test_other_models_and_calls_are_refused(limited_front: Server) -> None:
    assert refused(limited_front, "?model=gpt-realtime")[1]["code"] == "model_not_found"
    assert refused(limited_front, "?call_id=1")[1]["param"] == "call_id"
    assert refused(limited_front, "?intent=transcription")[1]["param"] == "intent"


def test_a_client_secret_opens_the_session_it_describes(limited_front: Server) -> None:
    session: Any = {"type": "realtime", "instructions": "Be brief."}
    client = client_of(limited_front)
    secret = client.realtime.client_secrets.create(
        session=session, expires_after={"anchor": "created_at", "seconds": 30}
    )
    assert secret.value.startswith("ek_") and 20 < secret.expires_at - time.time() <= 30
    assert secret.session.type == "realtime" and secret.session.instructions == "Be brief."
    with client_of(limited_front, secret.value).realtime.connect(model=MODEL) as connection:
        created: Any = connection.recv()
        assert created.session.instructions == "Be brief."
    with pytest.raises(openai.AuthenticationError):
        client_of(limited_front, secret.value).models.list()
    for wrong in ({"seconds": 1}, {"anchor": "used_at"}):
        with pytest.raises(openai.BadRequestError, match="expires_after"):
            client.realtime.client_secrets.create(expires_after=wrong)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match=r"session\.audio\.output\.speed"):
        fast: Any = session | {"audio": {"output": {"speed": 1.5}}}
        client.realtime.client_secrets.create(session=fast)


def test_a_server_without_speech_answers_in_text(limited_front: Server) -> None:
    with client_of(limited_front).realtime.connect(model=MODEL) as session:
        created: Any = session.recv()
        assert created.session.output_modalities == ["text"]
        session.session.update(session={"type": "realtime", "output_modalities": ["audio"]})
        error: Any = session.recv()
        assert error.error.param == "session.output_modalities"
        session.response.create(response={"output_modalities": ["audio"]})
        error = session.recv()
        assert error.error.param == "response.output_modalities"
        session.send({"type": "input_audio_buffer.append"})  # type: ignore[arg-type]
        error = session.recv()
        assert error.error.message == "audio: missing"


def test_a_server_without_speech_refuses_it_elsewhere_too(limited_front: Server) -> None:
    client = client_of(limited_front)
    with pytest.raises(openai.BadRequestError, match="writes only") as error:
        client.chat.completions.create(
            model=MODEL,
            modalities=["text", "audio"],
            audio={"voice": "alloy", "format": "wav"},
            messages=[{"role": "user", "content": "what is two plus three"}],
        )
    assert error.value.param == "modalities"
    with pytest.raises(openai.BadRequestError, match="writes only") as error:
        client.audio.speech.create(model=MODEL, voice="alloy", input="a red ball")
    assert error.value.param == "model"


def test_there_are_only_so_many_sessions(limited_front: Server, replicas: tuple[str, ...]) -> None:
    if replicas:
        pytest.skip("a limit of each replica")
    with dial(limited_front), dial(limited_front):
        with pytest.raises(InvalidStatus) as error:
            connect(
                f"{limited_front.url.replace('http', 'ws')}/v1/realtime",
                additional_headers={"Authorization": "Bearer talking"},
            )
        assert error.value.response.status_code == 429
        assert int(error.value.response.headers["retry-after-ms"]) > 0
    dial(limited_front).close()


def last_error(socket: ClientConnection) -> str:
    """The code of the last event before the server closes the connection."""
    code = ""
    with pytest.raises(ConnectionClosedOK):
        while True:
            event = json.loads(socket.recv())
            code = event.get("error", {}).get("code", "")
    assert socket.close_code == 1000
    return code


def test_sessions_end_of_which_nothing_comes_and_those_that_last_too_long(
    limited_front: Server,
) -> None:
    with dial(limited_front) as silent, dial(limited_front) as busy:
        with contextlib.suppress(ConnectionClosed):
            while True:
                busy.send(json.dumps({"type": "input_audio_buffer.clear"}))
                time.sleep(0.5)
        assert last_error(silent) == "session_idle"
        assert last_error(busy) == "session_expired"


def test_silence_is_answered_after_a_while(client: openai.OpenAI) -> None:
    """In the voice of the model's own accord: the client has set a time for it."""
    with client.realtime.connect(model=MODEL) as session:
        session.recv()
        detection = {"type": "server_vad", "idle_timeout_ms": 1000}
        session.session.update(
            session={
                "type": "realtime",
                "output_modalities": ["text"],
                "audio": {"input": {"turn_detection": detection}},  # type: ignore[dict-item]
            }
        )
        item: Any = {"type": "message", "role": "user"}
        item["content"] = [{"type": "input_text", "text": "Please read aloud: one"}]
        session.conversation.item.create(item=item)
        session.response.create()
        until(session, "response.done")
        event = until(session, "input_audio_buffer.timeout_triggered")[-1]
        assert event.audio_start_ms == event.audio_end_ms == 0
        assert until(session, "input_audio_buffer.committed")[-1].item_id == event.item_id
        assert until(session, "response.done")[-1].response.status == "completed"
