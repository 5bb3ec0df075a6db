"""The streaming predictor behind the real server: what arrives, when, and what stops it."""

from __future__ import annotations

import base64
import io
import json
import random
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kimia_infer.serving.cog.interface import read_interface
from kimia_infer.serving.cog.schema import openapi_schema
from tests.paths import ROOT
from tests.serving.conftest import Server, data_uri, serve_bare

INTERFACE = read_interface(ROOT / "predict.py", "StreamingPredictor")
WHOLE = read_interface(ROOT / "predict.py", "Predictor")

FAULTY = '''
import contextlib
import predict

class Faulty(predict.StreamingPredictor):
    """Fails after as many events as the request has for seed."""

    def setup(self, weights=None):
        super().setup(weights)
        respond = self.model.respond

        def failing(chat, options, **rest):
            with contextlib.closing(respond(chat, options, **rest)) as events:
                for count, event in enumerate(events):
                    if count == options.seed:
                        raise RuntimeError("the device caught fire")
                    yield event

        self.model.respond = failing
'''


def samples(uri: str) -> bytes:
    """What a wav file in a data URI holds, which must be mono, 16 bit, 24 kHz."""
    assert uri.startswith("data:audio/wav;base64,")
    with wave.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as reader:
        form = (reader.getnchannels(), reader.getsampwidth(), reader.getframerate())
        assert form == (1, 2, 24_000) and reader.getnframes() > 0
        return reader.readframes(reader.getnframes())


def joined(chunks: list[dict[str, Any]]) -> tuple[str, bytes]:
    """Text and samples of all pieces."""
    return (
        "".join(chunk["text"] or "" for chunk in chunks),
        b"".join(samples(chunk["audio"]) for chunk in chunks if chunk["audio"] is not None),
    )


def whole(server: Server, **inputs: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All pieces of a streamed answer, and its final state."""
    with server.stream(**inputs) as events:
        received = list(events)
    assert received[0][0] == "start" and received[-1][0] == "completed"
    outputs = [data for name, data in received if name == "output"]
    assert [data["index"] for data in outputs] == list(range(len(outputs)))
    return [data["chunk"] for data in outputs], received[-1][1]


def test_predictors_have_the_same_inputs_but_one() -> None:
    shared = tuple(field for field in INTERFACE.inputs if field.name != "preset")
    assert shared == WHOLE.inputs
    assert INTERFACE.streaming and not WHOLE.streaming


def test_schema_is_served(streaming_server: Server) -> None:
    assert streaming_server.request("GET", "/openapi.json") == (200, openapi_schema(INTERFACE))


def test_text_and_sound_arrive_while_the_answer_is_generated(
    streaming_server: Server, long_inputs: dict[str, Any]
) -> None:
    seen = {}
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


@pytest.mark.parametrize("seed_offset", [0, 1])
def test_pieces_joined_are_the_whole_answer(
    server: Server, streaming_server: Server, long_inputs: dict[str, Any], seed_offset: int
) -> None:
    inputs = long_inputs | {"seed": long_inputs["seed"] + seed_offset}
    expected = server.succeed(**inputs)
    chunks, state = whole(streaming_server, **inputs, preset="quality")
    output = expected["output"]
    sound = b"" if output["audio"] is None else samples(output["audio"])
    assert joined(chunks) == (output["text"], sound)
    assert chunks[-1]["notes"] == output["notes"]
    assert chunks[-1]["audio_reason"] == output["audio_reason"]
    assert state["metrics"]["speech_codes"] == expected["metrics"]["speech_codes"]


def test_presets_cut_the_same_codes(streaming_server: Server, long_inputs: dict[str, Any]) -> None:
    answers = {
        p: whole(streaming_server, **long_inputs, preset=p) for p in ("low_latency", "quality")
    }
    default = whole(streaming_server, **long_inputs)
    assert joined(default[0]) == joined(answers["low_latency"][0])
    (fast, fast_state), (good, good_state) = answers.values()
    assert joined(fast)[0] == joined(good)[0]
    assert len(joined(fast)[1]) == len(joined(good)[1])
    assert fast_state["metrics"]["speech_codes"] == good_state["metrics"]["speech_codes"]
    first = [next(samples(c["audio"]) for c in chunks if c["audio"]) for chunks in (fast, good)]
    assert len(first[0]) < len(first[1])


def test_client_without_events_gets_the_list(
    streaming_server: Server, long_inputs: dict[str, Any]
) -> None:
    chunks, _ = whole(streaming_server, **long_inputs)
    assert streaming_server.succeed(**long_inputs)["output"] == chunks


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


def test_plain_predictor_does_not_stream(server: Server) -> None:
    server.wait_for("READY")
    body = {"input": {"text": "a"}}
    status, answer = server.request("POST", "/predictions", body, Accept="text/event-stream")
    assert status == 406 and "streaming" in answer["error"]


@pytest.fixture(scope="module")
def faulty_server(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("faulty")
    (directory / "faulty.py").write_text(FAULTY)
    reference = f"{directory / 'faulty.py'}:Faulty"
    with serve_bare(golden, directory, reference, "StreamingPredictor") as server:
        yield server


@pytest.mark.parametrize("events", [0, 1, 3])
def test_failure_in_the_middle_ends_the_stream(faulty_server: Server, events: int) -> None:
    for _ in range(2):
        chunks, state = whole(faulty_server, text="Hi", max_new_tokens=30, seed=events)
        assert state["status"] == "failed" and "the device caught fire" in state["error"]
        assert state.get("output", []) == chunks and len(chunks) == events
        faulty_server.wait_for("READY")


@pytest.mark.parametrize("how", ["hang up", "cancel"])
def test_cancel_at_random_moments(
    streaming_server: Server, long_inputs: dict[str, Any], how: str, long: bool
) -> None:
    """The service goes on; prints how long each took, from the cancel until READY."""
    moments, seconds = random.Random(7), []
    for trial in range(10 if long else 3):
        moment = moments.uniform(0, 1.5)
        if how == "hang up":
            with streaming_server.stream(**long_inputs):
                time.sleep(moment)
                begin = time.perf_counter()
        else:
            streaming_server.wait_for("READY")
            place, body = f"/predictions/trial-{trial}", {"input": long_inputs}
            header = {"Prefer": "respond-async"}
            assert streaming_server.request("PUT", place, body, **header)[0] == 202
            time.sleep(moment)
            begin = time.perf_counter()
            assert streaming_server.request("POST", f"{place}/cancel")[0] in (200, 404)
        streaming_server.wait_for("READY")
        seconds.append(round(time.perf_counter() - begin, 3))
    print(f"{how}: READY again after {json.dumps(seconds)} s")
    assert whole(streaming_server, text="Hi", max_new_tokens=10)[1]["status"] == "succeeded"
