"""The predictor behind the real server, with the real schema file."""

from __future__ import annotations

import base64
import io
import json
import socket
import wave
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimia_infer.serving.cog.interface import InputField, read_interface
from kimia_infer.serving.cog.schema import openapi_schema
from tests.paths import GOLDEN, ROOT
from tests.serving.conftest import Server, data_uri, serve, serve_bare, silence

INTERFACE = read_interface(ROOT / "predict.py", "Predictor")
AUDIO = GOLDEN / "e2e" / "audio"
CASES = [
    case
    for case in json.loads((GOLDEN / "e2e" / "cases.json").read_text())["cases"]
    if not case.get("draws") and len(case["codes"]) <= 1
]
GREEDY = {"audio_temperature": 0.0, "audio_top_k": 5}


def recorded(name: str) -> str:
    return data_uri((AUDIO / name).read_bytes())


@pytest.fixture(scope="module")
def speech() -> str:
    """The shortest recorded file."""
    return data_uri(min(AUDIO.iterdir(), key=lambda path: path.stat().st_size).read_bytes())


def inputs_of(case: dict) -> dict:
    """A recorded chat as inputs: its last message as the turn, the others as history."""
    files: list[str] = []

    def numbered(name: str) -> int:
        files.append(recorded(name))
        return len(files) - 1

    history = []
    for message in case["messages"][:-1]:
        content = message["content"]
        if message["message_type"] == "audio":
            content = numbered(content)
        elif message["message_type"] == "audio-text":
            content = [numbered(content[0]), content[1]]
        history.append({**message, "content": content})
    last = case["messages"][-1]
    is_audio = last["message_type"] == "audio"
    turn = {"audio": recorded(last["content"])} if is_audio else {"text": last["content"]}
    chat = {"history": json.dumps(history), "history_audio": files} if history else {}
    return {**GREEDY, **case["arguments"], **turn, **chat}


def read_wav(uri: str) -> tuple[int, int, int]:
    """Channels, rate and frames of the wav file in a data URI."""
    with wave.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as reader:
        return reader.getnchannels(), reader.getframerate(), reader.getnframes()


def sounds() -> list[bytes]:
    """Samples of the recorded files that are mono at 16 kHz with 16 bits."""
    found = []
    for path in sorted(AUDIO.glob("*.wav")):
        with wave.open(str(path)) as reader:
            if (reader.getnchannels(), reader.getsampwidth(), reader.getframerate()) == (
                1,
                2,
                16_000,
            ):
                found.append(reader.readframes(reader.getnframes()))
    return found


def wav(samples: bytes) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(16_000)
        writer.writeframes(samples)
    return file.getvalue()


def test_schema_is_served(server: Server) -> None:
    assert server.request("GET", "/openapi.json") == (200, openapi_schema(INTERFACE))


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


def test_speech_answers_a_text_alone(server: Server) -> None:
    answer = server.succeed(text="Where is the station?", output_type="both", max_new_tokens=9)
    assert read_wav(answer["output"]["audio"])[:2] == (1, 24_000)


def test_drawn_seed_repeats_the_answer(server: Server, speech: str) -> None:
    inputs = {"audio": speech, "max_new_tokens": 10, "text_temperature": 1.5, "text_top_k": 0}
    first = server.succeed(**inputs)
    again = server.succeed(**inputs, seed=first["metrics"]["seed"])
    assert again["output"] == first["output"]
    others = [server.succeed(**inputs)["output"]["text"] for _ in range(2)]
    assert [first["output"]["text"]] * 2 != others


def out_of_range(field: InputField) -> list:
    """Values that the schema must refuse; without it they would reach the model."""
    if field.choices is not None:
        return ["", "sound", 1]
    if field.kind == "str":
        return ["x" * (field.max_length + 1), 1, None]
    if field.kind == "Path":
        return ["x"] if field.repeated else [1]
    return [field.ge - 1, field.le + 1, str(field.le), True, None]


BOUNDS = [
    pytest.param(field.name, value, id=f"{field.name}={str(value)[:12]}")
    for field in INTERFACE.inputs
    for value in out_of_range(field)
]


@pytest.mark.parametrize(("name", "value"), BOUNDS)
def test_every_bound_is_refused_by_the_server(server: Server, name: str, value) -> None:
    status, answer = server.request("POST", "/predictions", {"input": {"text": "a", name: value}})
    assert status == 422
    assert answer["detail"][0]["loc"] == ["body", "input", name]


@pytest.mark.parametrize("path", ["/etc/hostname", "file:///etc/hostname", "predict.py"])
def test_path_on_the_server_is_not_opened(server: Server, speech: str, path: str) -> None:
    message = server.fail(audio=path)
    assert "audio: expected an uploaded file" in message
    history = json.dumps([{"role": "user", "message_type": "audio", "content": 0}] * 2)
    message = server.fail(text="a", history=history, history_audio=[speech, path])
    assert "history_audio[1]: expected an uploaded file" in message
    for error in (message, server.fail(text="a", history=history.replace("0", f'"{path}"'))):
        assert socket.gethostname() not in error.replace(path, "")


SILENCE = silence(1)
BAD_SOUNDS = {
    "empty": b"",
    "text": b"This is not sound. " * 100,
    "noise": bytes(range(256)) * 40,
    "zero seconds": silence(0),
    "header only": SILENCE[:44],
    "damaged header": SILENCE[:20] + bytes(24) + SILENCE[44:],
    "picture": base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5C"
        "YII="
    ),
}


@pytest.mark.parametrize("content", BAD_SOUNDS.values(), ids=BAD_SOUNDS)
def test_what_is_no_sound_is_refused(server: Server, content: bytes) -> None:
    assert "AudioError: audio: " in server.fail(audio=data_uri(content), output_type="text")


def test_bad_sound_of_the_history_is_named(server: Server, speech: str) -> None:
    history = json.dumps([{"role": "user", "message_type": "audio", "content": i} for i in (0, 1)])
    error = server.fail(text="a", history=history, history_audio=[speech, data_uri(b"no sound")])
    assert "AudioError: history_audio[1]: " in error


def test_damaged_base64_is_refused(server: Server) -> None:
    assert server.fail(audio="data:audio/wav;base64,@@@@")


def test_ten_minutes_of_sound_do_not_fit(server: Server) -> None:
    message = server.fail(audio=data_uri(silence(600)), output_type="text")
    assert "positions" in message and "transcribe" in message


def test_recording_of_any_length_is_transcribed(server: Server) -> None:
    """A recorded sound before and after a silence that is longer than two segments."""
    voice = min(sounds(), key=len)
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


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text": "a"}, "audio: nothing to transcribe"),
        ({"audio": True, "history": "[]"}, "history: a transcription has none"),
        ({"audio": True, "voice": True}, "voice: a transcription has none"),
    ],
    ids=["no sound", "history", "voice"],
)
def test_transcription_refuses_what_it_would_ignore(
    server: Server, speech: str, inputs: dict, message: str
) -> None:
    files = {name: speech for name, value in inputs.items() if value is True}
    assert message in server.fail(task="transcribe", **inputs | files)


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
    assert note.startswith("history[0].content: the sound is silent")
    (note,) = server.succeed(audio=data_uri(silence(1)), output_type="text", max_new_tokens=1)[
        "output"
    ]["notes"]
    assert note.startswith("audio: the sound is silent")


def test_voice_changes_the_speech(server: Server) -> None:
    sound = data_uri(wav(max((s for s in sounds() if len(s) <= 30 * 32_000), key=len)))
    inputs = {"text": "Hi", "max_new_tokens": 12, "seed": 1}
    plain = server.succeed(**inputs)["output"]
    voiced = server.succeed(**inputs, voice=sound)["output"]
    assert voiced["text"] == plain["text"] and voiced["audio"] != plain["audio"]
    assert "voice: " in server.fail(**inputs, voice=data_uri(silence(0.5)))
    assert "voice: " in server.fail(**inputs, voice=data_uri(b"no sound"))
    assert "voice: " in server.fail(**inputs, output_type="text", voice=sound)


def test_one_sample_is_a_sound(server: Server) -> None:
    answer = server.succeed(
        audio=data_uri(silence(1 / 16_000)), output_type="text", max_new_tokens=3
    )
    assert answer["metrics"]["decode_steps"] <= 3


@pytest.mark.parametrize("kind", ["application/octet-stream", "audio/ogg", ""])
def test_content_decides_not_the_declared_type(server: Server, kind: str) -> None:
    sounds = sorted(AUDIO.iterdir(), key=lambda path: path.stat().st_size)
    for path in sounds[:2]:
        content = data_uri(path.read_bytes(), kind)
        answer = server.succeed(audio=content, output_type="text", max_new_tokens=2)
        assert answer["metrics"]["input_audio_seconds"] > 0


@pytest.mark.parametrize("inputs", [{}, {"text": " "}, {"history": "[]"}], ids=str)
def test_nothing_to_answer_is_refused(server: Server, inputs: dict) -> None:
    assert "audio, text: nothing to answer" in server.fail(**inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"history": "{"}, "history: not valid JSON"),
        ({"history": '[{"role": "system", "message_type": "text", "content": "a"}]'}, "role"),
        ({"history": '[{"role": "user", "message_type": "audio", "content": 0}]'}, "empty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"text": "word " * 9000}, "positions"),
    ],
    ids=["json", "role", "file", "tokens", "length"],
)
def test_request_errors_name_the_input(server: Server, inputs: dict, message: str) -> None:
    assert message in server.fail(**{"text": "a", **inputs})


def test_nothing_stays_on_disk(server: Server, speech: str) -> None:
    inputs = {"audio": speech, "max_new_tokens": 12}
    before = server.left_files()
    assert server.succeed(**inputs)["output"]["audio"]
    server.fail(audio=data_uri(b"no sound"))
    server.wait_for("READY")
    assert server.left_files() == before


@pytest.fixture(scope="module")
def bare_server(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server in a directory without a schema file, where it lets everything through."""
    with serve_bare(golden, tmp_path_factory.mktemp("bare")) as server:
        yield server


def test_without_schema_file_our_code_validates(bare_server: Server) -> None:
    assert bare_server.request("GET", "/openapi.json")[0] == 503
    for field in INTERFACE.inputs:
        for value in out_of_range(field):
            if value is None and field.nullable:
                continue
            error = bare_server.fail(**{"text": "a", field.name: value})
            assert f"RequestError: {field.name}" in error, (field.name, value)
    assert "audio: expected an uploaded file" in bare_server.fail(audio="/etc/hostname")
    answer = bare_server.succeed(
        text="a", output_type="text", max_new_tokens=2.0, audio_temperature=1, seed=None
    )
    assert answer["metrics"]["decode_steps"] <= 2


def test_a_service_of_text_alone(golden: Path, tmp_path: Path) -> None:
    with serve(golden, tmp_path, KIMI_AUDIO_OUTPUT="text") as silent:
        assert "output_type: this service answers in text alone" in silent.fail(text="Hello")
        answer = silent.succeed(text="Hello", output_type="text", max_new_tokens=4)
        assert answer["output"]["audio"] is None and answer["metrics"]["decode_steps"] <= 4
