"""The streaming predictor behind the real server: what arrives, when, and what stops it."""

from __future__ import annotations

from typing import Any

import pytest

from kimia_infer.serving.cog.schema import read_schema, with_null
from tests.paths import ROOT
from tests.serving.helpers import Server, data_uri, joined, samples, whole


def test_schema_is_served(streaming_server: Server) -> None:
    found = streaming_server.request("GET", "/openapi.json")
    assert found == (200, with_null(read_schema("StreamingPredictor")))


def test_text_and_sound_arrive_while_the_answer_is_generated(
    streaming_server: Server, long_inputs: dict[str, Any]
) -> None:
    seen: dict[str, str] = {}
    last: dict[str, Any] = {}
    with streaming_server.stream(**long_inputs) as events:
        for name, data in events:
            if name == "output":
                kind = "audio" if data["chunk"]["audio"] is not None else "text"
                if kind not in seen:
                    seen[kind] = streaming_server.status()
            assert name != "completed" or len(seen) == 2
            last = data
    assert seen == {"text": "BUSY", "audio": "BUSY"}
    metrics = last["metrics"]
    assert metrics["first_text_seconds"] < metrics["first_audio_seconds"]
    assert metrics["first_audio_seconds"] < metrics["total_seconds"]


def test_pieces_joined_are_the_whole_answer(
    server: Server, streaming_server: Server, long_inputs: dict[str, Any]
) -> None:
    expected = server.succeed(**long_inputs)
    chunks, state = whole(streaming_server, **long_inputs, preset="quality")
    output = expected["output"]
    sound = b"" if output["audio"] is None else samples(output["audio"])
    assert joined(chunks) == (output["text"], sound)
    assert chunks[-1]["notes"] == output["notes"]
    assert chunks[-1]["audio_reason"] == output["audio_reason"]
    assert state["metrics"]["speech_codes"] == expected["metrics"]["speech_codes"]


def test_transcript_is_streamed_with_its_segments(streaming_server: Server) -> None:
    sound = data_uri((ROOT / "scripts" / "question.wav").read_bytes())
    chunks, state = whole(streaming_server, task="transcribe", audio=sound, max_new_tokens=8)
    (segment,) = [chunk["segment"] for chunk in chunks if chunk["segment"] is not None]
    assert segment["text"] == joined(chunks)[0].strip() and segment["start"] == 0
    assert state["metrics"]["segments"] == 1 and joined(chunks)[1] == b""


def test_refusal_is_a_completed_event(streaming_server: Server) -> None:
    chunks, state = whole(streaming_server, text=" ")
    assert chunks == [] and state["status"] == "failed"
    assert "audio, text: nothing to answer" in state["error"]
    streaming_server.wait_for("READY")


@pytest.mark.parametrize("events", [0, 1, 3])
def test_failure_in_the_middle_ends_the_stream(streaming_server: Server, events: int) -> None:
    server = streaming_server
    for _ in range(2):
        chunks, state = whole(server, text="Hi", max_new_tokens=30, seed=events)
        assert state["status"] == "failed" and "the device caught fire" in state["error"]
        assert state.get("output", []) == chunks and len(chunks) == events
        server.wait_for("READY")
