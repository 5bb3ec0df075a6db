"""The predictor behind the real server, with the real schema file."""

from __future__ import annotations

import base64
import json
import socket

import pytest

from kimia_infer.serving.cog.schema import read_inputs, read_schema, with_null
from tests.serving.helpers import (
    CASES,
    COG_PREFIX,
    Server,
    data_uri,
    inputs_of,
    read_wav,
    recorded_waves,
    silence,
    wav,
)

INPUTS = read_inputs("Predictor")


def test_schema_is_served(server: Server) -> None:
    schema = with_null(read_schema("Predictor"))
    assert server.request("GET", "/openapi.json") == (200, schema)
    declared = {name for name, input_ in INPUTS.items() if input_.get("nullable")}
    assert declared == {"audio", "voice", "seed"}
    server.succeed(text="a", output_type="text", max_new_tokens=1, **dict.fromkeys(declared))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recorded_chats_are_answered_as_recorded(server: Server, case: dict) -> None:
    answer = server.succeed(**inputs_of(case))
    assert answer["output"]["text"] == case["text"]
    assert answer["metrics"]["speech_codes"] == len(case["codes"])
    if case["codes"]:
        assert read_wav(answer["output"]["audio"]) == (1, 24_000, 1920 * len(case["codes"]))
    else:
        assert answer["output"]["audio"] is None


def test_sound_and_text_are_answered_with_both(server: Server, speech: str) -> None:
    answer = server.succeed(audio=speech, text="What is said?", max_new_tokens=12)
    metrics = answer["metrics"]
    assert read_wav(answer["output"]["audio"]) == (1, 24_000, 1920 * metrics["speech_codes"])
    assert metrics["prompt_tokens"] > 0 and metrics["decode_steps"] <= 12
    stages = ("load_audio", "prompt", "encoders", "prefill", "decode", "detokenizer")
    assert all(metrics[f"{stage}_seconds"] > 0 for stage in stages)


def test_drawn_seed_repeats_the_answer(server: Server, speech: str) -> None:
    inputs = {"audio": speech, "max_new_tokens": 10, "text_temperature": 1.5, "text_top_k": 0}
    first = server.succeed(**inputs)
    again = server.succeed(**inputs, seed=first["metrics"]["seed"])
    assert again["output"] == first["output"]
    others = [server.succeed(**inputs)["output"]["text"] for _ in range(2)]
    assert [first["output"]["text"]] * 2 != others


def out_of_range(schema: dict) -> list:
    """Values that the schema must refuse; without it they would reach the model."""
    if "enum" in schema:
        return ["", "sound", 1]
    if schema["type"] == "array":
        return ["x"]
    if schema.get("format") == "uri":
        return [1]
    if schema["type"] == "string":
        return ["x" * (schema["maxLength"] + 1), 1, None]
    low, high = schema["minimum"], schema["maximum"]
    return [low - 1, high + 1, str(high), True, None]


def test_schema_is_enforced_by_the_server(server: Server) -> None:
    """One value for each kind of bound; the schema file is compared elsewhere."""
    for name in ("task", "text", "audio_top_k", "history_audio", "seed"):
        body = {"input": {"text": "a", name: out_of_range(INPUTS[name])[0]}}
        status, answer = server.request("POST", "/predictions", body)
        assert (status, answer["detail"][0]["loc"]) == (422, ["body", "input", name])


@pytest.mark.parametrize("path", ["/etc/hostname", "file:///etc/hostname", "predict.py"])
def test_path_on_the_server_is_not_opened(server: Server, speech: str, path: str) -> None:
    message = server.fail(audio=path)
    assert "audio: expected an uploaded file" in message
    history = json.dumps([{"role": "user", "message_type": "audio", "content": 0}] * 2)
    message = server.fail(text="a", history=history, history_audio=[speech, path])
    assert "history_audio[1]: expected an uploaded file" in message
    for error in (message, server.fail(text="a", history=history.replace("0", f'"{path}"'))):
        assert socket.gethostname() not in error.replace(path, "")


def test_bad_sound_of_the_history_is_named(server: Server, speech: str) -> None:
    history = json.dumps([{"role": "user", "message_type": "audio", "content": i} for i in (0, 1)])
    error = server.fail(text="a", history=history, history_audio=[speech, data_uri(b"no sound")])
    assert error.startswith(f"{COG_PREFIX}history_audio[1]: ")


def test_recording_of_any_length_is_transcribed(server: Server) -> None:
    """A recorded sound before and after a silence that is longer than two segments."""
    voice = min(recorded_waves(), key=len)
    sound = wav(voice + bytes(70 * 32_000) + voice)
    answer = server.succeed(task="transcribe", audio=data_uri(sound), max_new_tokens=8, seed=1)
    output = answer["output"]
    segments = output["segments"]
    assert output["audio"] is None and output["audio_reason"] is None
    assert segments[0]["start"] == 0 and len(segments) > 2
    assert all(0 < s["end"] - s["start"] <= 30 for s in segments)
    assert [s["end"] for s in segments[:-1]] == [s["start"] for s in segments[1:]]
    assert segments[-1]["end"] == pytest.approx((len(sound) - 44) / 32_000)
    assert "" in [s["text"] for s in segments], "the silence in the middle says nothing"
    assert output["text"].split() == " ".join(s["text"] for s in segments).split()
    assert answer["metrics"]["segments"] == len(segments)


def test_missing_speech_has_a_reason(server: Server, speech: str) -> None:
    output = server.succeed(audio=speech, max_new_tokens=1)["output"]
    assert output["audio"] is None and "no speech" in output["audio_reason"]
    assert output["segments"] is None and output["notes"] == []
    output = server.succeed(audio=speech, output_type="text", max_new_tokens=1)["output"]
    assert output["audio"] is None and output["audio_reason"] is None


def test_silence_is_noted_in_terms_of_the_inputs(server: Server, speech: str) -> None:
    history = json.dumps([{"role": "user", "message_type": "audio", "content": 0}])
    sounds = {"history": history, "history_audio": [data_uri(silence(1))], "audio": speech}
    (note,) = server.succeed(**sounds, output_type="text", max_new_tokens=1)["output"]["notes"]
    assert note.startswith("history[0].content: the audio is silent")
    (note,) = server.succeed(audio=data_uri(silence(1)), output_type="text", max_new_tokens=1)[
        "output"
    ]["notes"]
    assert note.startswith("audio: the audio is silent")


def test_voice_changes_the_speech(server: Server) -> None:
    sound = data_uri(wav(max((s for s in recorded_waves() if len(s) <= 30 * 32_000), key=len)))
    inputs = {"text": "Hi", "max_new_tokens": 12, "seed": 1}
    plain = server.succeed(**inputs)["output"]
    voiced = server.succeed(**inputs, voice=sound)["output"]
    assert voiced["text"] == plain["text"] and voiced["audio"] != plain["audio"]
    assert "voice: " in server.fail(**inputs, voice=data_uri(silence(0.5)))
    assert "voice: " in server.fail(**inputs, voice=data_uri(b"no sound"))
    assert "voice: " in server.fail(**inputs, output_type="text", voice=sound)


def test_content_decides_not_the_declared_type(server: Server, speech: str) -> None:
    content = speech.replace("audio/wav", "audio/ogg")
    answer = server.succeed(audio=content, output_type="text", max_new_tokens=2)
    assert answer["metrics"]["input_audio_seconds"] > 0


def test_data_uris_are_read_in_every_spelling(server: Server, speech: str) -> None:
    content = base64.b64decode(speech.partition(",")[2])
    urlsafe = base64.urlsafe_b64encode(content + b"\xff\xfe\xfb").decode().rstrip("=")
    assert "-" in urlsafe or "_" in urlsafe
    for uri in (
        f"data:audio/wav;base64,{urlsafe}",
        f'data:audio/wav;name="a, b";base64,{urlsafe}',
        f"DATA:audio/wav;name=a,b;BASE64,{urlsafe}",
    ):
        answer = server.succeed(audio=uri, output_type="text", max_new_tokens=1)
        assert answer["metrics"]["input_audio_seconds"] > 0
    assert "audio: the data URI is not valid base64" in server.fail(audio=speech + "!")


def test_request_errors_name_the_input(server: Server) -> None:
    for inputs, message in (
        ({"max_new_tokens": 0}, f"{COG_PREFIX}max_new_tokens: expected"),
        ({"text": "word " * 9000}, "positions"),
        ({"history": '[{"cancelled": 1}]'}, "history[0]: unknown field 'canceled'"),
        ({"audio": data_uri(silence(600)), "output_type": "text"}, "transcribe"),
    ):
        assert message in server.fail(**{"text": "a", **inputs})


def test_without_schema_file_our_code_validates(scripted_server: Server) -> None:
    assert scripted_server.request("GET", "/openapi.json")[0] == 503
    for name, schema in INPUTS.items():
        for value in out_of_range(schema):
            if value is None and schema.get("nullable"):
                continue
            error = scripted_server.fail(**{"text": "a", name: value})
            assert error.startswith(f"{COG_PREFIX}{name}"), (name, value)
    assert "audio: expected an uploaded file" in scripted_server.fail(audio="/etc/hostname")
    answer = scripted_server.succeed(
        text="a", output_type="text", max_new_tokens=2.0, audio_temperature=1, seed=None
    )
    assert answer["metrics"]["decode_steps"] <= 2


def test_a_service_of_text_alone_with_a_time_limit(limited_server: Server) -> None:
    limited = limited_server
    assert "output_type: this service answers with text only" in limited.fail(text="Hello")
    assert "KIMI_AUDIO_OUTPUT=both" in limited.fail(task="speak", text="Hello")
    answer = limited.succeed(text="Hello", output_type="text", max_new_tokens=4)
    assert answer["output"]["audio"] is None and answer["metrics"]["decode_steps"] <= 4
    for seed in range(5):  # some answers end by themselves
        sampled = {"text_temperature": 2.0, "text_top_k": 0, "seed": seed}
        answer = limited.predict(text="Hello", output_type="text", **sampled)
        if answer["status"] == "failed":
            break
    assert "not complete within 2 s" in answer["error"]
    assert "KIMI_AUDIO_TIMEOUT" in answer["error"]
    assert answer["error"].endswith("; set a smaller max_new_tokens or send shorter audio")
