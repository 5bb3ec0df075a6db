"""Inputs behind the server: types, bounds, files and histories."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimia_infer.models.kimi_audio.prompt import parse_messages
from kimia_infer.serving.cog.inputs import (
    MAX_FILES,
    CogInputs,
    build_chat,
    name_files,
    name_messages,
    parse_history,
    parse_inputs,
    place_files,
)
from kimia_infer.serving.cog.schema import read_inputs
from kimia_infer.utils.errors import RequestError

SCHEMAS = read_inputs("StreamingPredictor")
DEFAULTS = {name: schema["default"] for name, schema in SCHEMAS.items()}
NUMBERS = [name for name, schema in SCHEMAS.items() if schema["type"] in ("integer", "number")]
FILES = ["audio", "voice", "history_audio"]


def check(**values) -> CogInputs:
    return parse_inputs(DEFAULTS | values)


def refused(name: str, value) -> str:
    with pytest.raises(RequestError) as caught:
        check(**{name: value})
    assert str(caught.value).startswith(name)
    return str(caught.value)


def test_limit_of_the_service_is_no_input() -> None:
    given = {"self": object(), "stop_repetition": True, "timeout_seconds": 2.5}
    inputs = parse_inputs(DEFAULTS | given)
    assert inputs.timeout_seconds is None
    assert {name: getattr(inputs, name) for name in DEFAULTS} == DEFAULTS
    assert "timeout_seconds" not in SCHEMAS and "stop_repetition" not in SCHEMAS


@pytest.mark.parametrize("name", NUMBERS)
def test_bounds_hold(name: str) -> None:
    """The declared type decides between whole numbers and floats, whichever is sent."""
    low, high = SCHEMAS[name]["minimum"], SCHEMAS[name]["maximum"]
    kind = {"integer": int, "number": float}[SCHEMAS[name]["type"]]
    for edge in (low, float(low), int(high), float(high)):
        value = getattr(check(**{name: edge}), name)
        assert value == edge and type(value) is kind
    if kind is int:
        refused(name, low + 0.5)
    for beyond in (low - 1, high + 1, math.inf, -math.inf, 10**400):
        assert re.search(rf"at least {low:g}.* and at most {high}", refused(name, beyond))
    for wrong in ("1", True, math.nan, [1], {}):
        refused(name, wrong)
    if not SCHEMAS[name].get("nullable"):
        assert "null" in refused(name, None)


@pytest.mark.parametrize("name", ["text", "history", "output_type"])
def test_text_is_checked(name: str) -> None:
    for wrong in (7, None, ["a"], b"a"):
        refused(name, wrong)
    assert refused(name, "\ud800")
    if choices := SCHEMAS[name].get("enum"):
        assert [getattr(check(**{name: c}), name) for c in choices] == choices
        assert "'text'" in refused(name, "sound")
    else:
        longest = SCHEMAS[name]["maxLength"]
        assert check(**{name: "x" * longest})
        message = refused(name, "x" * (longest + 1))
        assert str(longest) in message and len(message) < 200


@pytest.mark.parametrize("name", FILES)
def test_only_uploaded_files_are_taken(name: str, tmp_path: Path) -> None:
    secret, repeated = tmp_path / "secret.wav", name == "history_audio"
    value = [secret] if repeated else secret
    assert getattr(check(**{name: value}), name) == value
    for text in (str(secret), f"file://{secret}", ""):
        for wrong in ([text], [secret, text]) if repeated else (text,):
            assert "paths on the server are not opened" in refused(name, wrong)
    refused(name, secret if repeated else [secret])


def test_uploads_get_paths_that_have_the_names_of_their_inputs(tmp_path: Path) -> None:
    uri, url, path = "DATA:,x", "Https://a/b.wav", "/etc/hostname"
    values = {"audio": uri, "voice": None, "history_audio": [url, path, uri], "text": url}
    placed, references = place_files(values, tmp_path)
    first, last = tmp_path / "history_audio[0]", tmp_path / "history_audio[2]"
    assert placed == values | {"audio": tmp_path / "audio", "history_audio": [first, path, last]}
    assert references == {tmp_path / "audio": uri, first: url, last: uri}
    for other in (path, f"file://{path}", "ftp://a/b", "", 3, {}):
        assert place_files({"audio": other}, tmp_path) == ({"audio": other}, {})


def test_number_of_files_is_bounded(tmp_path: Path) -> None:
    assert check(history_audio=[tmp_path] * MAX_FILES)
    message = refused("history_audio", [tmp_path] * (MAX_FILES + 1))
    assert f"at most {MAX_FILES}" in message and str(tmp_path) not in message


def test_instruction_precedes_the_sound() -> None:
    assert build_chat(check(text="What is said?", audio=Path("a.wav"))) == [
        {"role": "user", "message_type": "text", "content": "What is said?"},
        {"role": "user", "message_type": "audio", "content": Path("a.wav")},
    ]


@pytest.mark.parametrize("text", ["", "  \n"])
def test_nothing_to_answer_is_refused(text: str) -> None:
    history = json.dumps([{"role": "user", "message_type": "text", "content": "Hi"}])
    with pytest.raises(RequestError, match="audio, text: nothing to answer"):
        build_chat(check(text=text, history=history))


def test_history_comes_first_with_its_files() -> None:
    history = [
        {"role": "user", "message_type": "audio", "content": 1},
        {"role": "assistant", "message_type": "audio-text", "content": [0, "At ten."]},
        {"role": "user", "message_type": "text", "content": "0"},
    ]
    files = [Path("reply.wav"), Path("question.wav")]
    chat = build_chat(check(text="Why?", history=json.dumps(history), history_audio=files))
    assert [message["content"] for message in chat] == [
        files[1],
        [files[0], "At ten."],
        "0",
        "Why?",
    ]


def audio(content) -> str:
    return json.dumps([{"role": "user", "message_type": "audio", "content": content}])


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ("{", "history: not valid JSON"),
        ("[" * 100_000, "history: not valid JSON .nested too deeply"),
        ('["\\ud800"]', "not valid JSON .half of a surrogate pair"),
        ("9" * 5000, r"not valid JSON \(a number with too many digits\)"),
        ("[1] x", r"not valid JSON \(Extra data: line 1 column 5"),
        ('{"role": "user"}', "history: expected a JSON list"),
        ("3", "history: expected a JSON list"),
        ('["hello"]', r"history\[0\]: expected an object"),
        ('[{"role": "user", "file": "a.wav"}]', r"history\[0\]: unknown field 'file'"),
        (audio(2), r"history\[0\]\.content: expected the index .*\(0 to 1\), found 2"),
        (audio(-1), "found -1"),
        (audio(True), "found true"),
        (audio(0.0), "found 0.0"),
        (audio("/etc/hostname"), "found '/etc/hostname'"),
        (audio(["a.wav", "text"]), "found"),
        (
            audio({"array": [0.0], "sampling_rate": 16000, "path": "/etc/hostname"}),
            "found {'array'",
        ),
        (audio(0), r"history_audio\[1\]: no message of history refers to it"),
        ("", r"history_audio\[0\]: no message of history refers to it"),
    ],
    ids=lambda value: value[:40],
)
def test_bad_history_is_refused(history: str, message: str) -> None:
    values = check(text="Hi", history=history, history_audio=[Path("a"), Path("b")])
    with pytest.raises(RequestError, match=message):
        build_chat(values)


def test_reference_without_any_file_says_so() -> None:
    with pytest.raises(RequestError, match="history_audio is empty"):
        build_chat(check(text="Hi", history=audio(0)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.lists(st.fixed_dictionaries({"role": JSON}, optional={"message_type": JSON})) | JSON)
def test_any_json_is_read_or_refused_as_history(value) -> None:
    try:
        messages = parse_history(json.dumps(value), lambda where, reference: reference)
    except RequestError as error:
        assert str(error).startswith("history")
    else:
        assert len(messages) == len(value)


@given(st.sampled_from(["audio", "audio-text"]), st.lists(st.just(0) | JSON, max_size=3) | JSON)
def test_no_caller_can_name_a_sound_but_by_its_index(kind: str, content) -> None:
    history = json.dumps([{"role": "user", "message_type": kind, "content": content}])
    files = [Path("upload.wav")]
    try:
        [message, _] = parse_messages(
            build_chat(check(text="Hi", history=history, history_audio=files))
        )
    except RequestError:
        return
    assert message.audio == files[0]


@given(st.sampled_from(list(SCHEMAS)), JSON)
def test_any_json_value_is_converted_or_refused(name: str, value) -> None:
    try:
        converted = getattr(check(**{name: value}), name)
    except RequestError as error:
        assert str(error).startswith(name)
    else:
        assert converted == value and (name not in FILES or converted in (None, []))


def test_transcription_needs_a_sound_and_nothing_of_a_chat() -> None:
    sound = Path("a.wav")
    with pytest.raises(RequestError, match="audio: nothing to transcribe"):
        build_chat(check(task="transcribe", text="Write it down."))
    for extra in ({"voice": sound}, {"history": "[]"}, {"history_audio": [sound]}):
        with pytest.raises(RequestError, match=f"{min(extra)}: not used for transcription"):
            build_chat(check(task="transcribe", audio=sound, **extra))
    assert build_chat(check(task="transcribe", audio=sound))


def test_voice_needs_speech() -> None:
    with pytest.raises(RequestError, match="voice: there is no speech with output_type 'text'"):
        build_chat(check(text="Hi", voice=Path("a.wav"), output_type="text"))


def test_messages_are_called_as_the_inputs_they_are() -> None:
    history = json.dumps([{"role": "user", "message_type": "text", "content": "Hi"}] * 2)
    inputs = check(text="Hi", audio=Path("a.wav"), history=history)
    for message, expected in {
        "chats[1].role: wrong": "history[1].role: wrong",
        "chats[0].content[1]: wrong": "history[0].content[1]: wrong",
        "chats[2].content: wrong": "text: wrong",
        "chats[3].content: silent": "audio: silent",
        "chats[4].content: none": "chats[4].content: none",
        "chats: too long": "audio, text, history: too long",
        "top_k: wrong": "top_k: wrong",
    }.items():
        assert name_messages(message, inputs) == expected
    assert name_messages("chats[0].content: x", check(audio=Path("a.wav"))) == "audio: x"
    inputs = check(task="transcribe", audio=Path("a.wav"))
    assert name_messages("chats[1].content: x", inputs) == "audio: x"


def test_uploads_are_called_as_the_inputs_they_are() -> None:
    files = {name: Path(f"/tmp/{name}") for name in ("audio", "voice")}
    inputs = check(**files, history_audio=[Path("/tmp/x"), Path("/tmp/y")])
    message = "/tmp/voice and /tmp/audio, /tmp/y"
    assert name_files(message, inputs) == "voice and audio, history_audio[1]"
    message = "history[1].content: /tmp/y: empty file"
    assert name_files(message, inputs) == "history_audio[1]: empty file"
