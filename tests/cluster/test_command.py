"""Arguments of the commands for clusters, and what crosses from one process to another."""

from __future__ import annotations

import pickle

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kimia_infer.commands.batch import given_inputs
from kimia_infer.serving.openai.errors import ApiError, too_many
from kimia_infer.serving.openai.replies import Replies
from tests.command_line import run_here


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--ray", "--cog"], "--ray: with the server for OpenAI's clients only"),
        (["serve", "--replicas", "2"], "--replicas goes with --ray"),
        (["batch", "codes", "a", "b", "--workers", "2"], "--workers goes with --ray"),
        (["batch", "codes", "a", "b", "--speech"], "--speech goes with answer, not with codes"),
        (["batch", "codes", "missing", "b", "--weights", "w"], "missing: no such files there"),
        (["batch", "codes", "tests", "b", "--weights", "w", "--input", "x"], "found 'x'"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(*arguments) == 2
    assert message in capsys.readouterr().err


def test_inputs_are_numbers_or_texts() -> None:
    numbers = given_inputs(["seed=0", "text_temperature=0.5", "stop_repetition=true"])
    assert numbers == {"seed": 0, "text_temperature": 0.5, "stop_repetition": True}
    for text in ("Say this: one: two", "[a", "yes", "5", "true"):
        assert given_inputs([f"text={text}", f"speaker={text}"]) == {"text": text, "speaker": text}


@pytest.mark.parametrize("text", ["0", "3-2", "many", "1-"])
def test_wrong_numbers_of_replicas_are_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here("serve", "--ray", "--weights", "w", "--replicas", text) == 2
    assert (
        f"--replicas: expected N or MIN-MAX such as 1-4, found {text!r}" in capsys.readouterr().err
    )


def test_errors_are_the_same_in_another_process() -> None:
    with pytest.raises(ApiError) as found:
        Replies().find("audio_1", "messages[0].audio.id")
    for error in (found.value, too_many("enough", 1500, "busy")):
        copy = pickle.loads(pickle.dumps(error))
        assert (copy.status_code, copy.error, copy.headers) == (
            error.status_code,
            error.error,
            error.headers,
        )


def test_metrics_of_replicas_are_added() -> None:
    pytest.importorskip("ray")
    from kimia_infer.cluster.gathering import summed

    text = '# TYPE asked_total counter\nasked_total{status="200"} %s\nasked_created %s\n'
    assert summed([text % (1.0, 9.0), text % (2.0, 8.0)]) == text % (3.0, 8.0)


def test_samples_of_a_metric_stay_together() -> None:
    """Also those that the first replica has not yet."""
    pytest.importorskip("ray")
    from kimia_infer.cluster.gathering import summed

    asked = '# TYPE asked counter\nasked{status="%d"} 1.0\n'
    slots = "# TYPE slots gauge\nslots %s\n"
    found = summed([asked % 200 + slots % 8.0, asked % 500 + slots % 8.0])
    assert found == asked % 200 + 'asked{status="500"} 1.0\n' + slots % 16.0


def test_a_replica_answers_for_itself_while_another_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from kimia_infer.cluster import gathering

    async def late() -> list[gathering.Report]:
        raise TimeoutError("Timed out waiting for broadcast results.")

    monkeypatch.setattr(gathering, "reports", late)
    state = {"status": "ready", "queued": 0, "running": 1, "slots": 8, "model": "kimi-audio"}
    app = gathering.Gathered(FastAPI(), lambda: (state, "# TYPE asked counter\nasked 1.0\n"))
    client = TestClient(app)
    response = client.get("/health")
    assert response.status_code == 200
    assert response.json() == {"status": "ready", "queued": 0, "running": 1, "slots": 8}
    assert "asked 1.0" in client.get("/metrics").text
    assert client.get("/elsewhere").status_code == 404
