"""Inputs behind the server: types, bounds, files and histories."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimia_infer.serving.cog.interface import InputField, Interface, read_interface
from kimia_infer.serving.cog.request import (
    CHAT_INPUTS,
    MAX_FILES,
    check_inputs,
    name_files,
    name_messages,
    parse_history,
    split_inputs,
)
from kimia_infer.utils.errors import RequestError
from tests.paths import ROOT

INTERFACE = read_interface(ROOT / "predict.py", "StreamingPredictor")
FIELDS = {field.name: field for field in INTERFACE.inputs}
DEFAULTS = {field.name: field.default for field in INTERFACE.inputs}
NUMBERS = [field for field in INTERFACE.inputs if field.kind in ("int", "float")]
FILES = [field for field in INTERFACE.inputs if field.kind == "Path"]


def check(**values) -> dict:
    return check_inputs(INTERFACE, DEFAULTS | values)


def refused(field: InputField, value) -> str:
    with pytest.raises(RequestError) as caught:
        check(**{field.name: value})
    assert str(caught.value).startswith(field.name)
    return str(caught.value)


def test_defaults_pass_unchanged() -> None:
    assert check() == DEFAULTS


def test_every_number_is_bounded() -> None:
    assert NUMBERS and all(field.ge is not None and field.le is not None for field in NUMBERS)


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_bounds_hold(field: InputField) -> None:
    for edge in (field.ge, field.le):
        assert check(**{field.name: edge})[field.name] == edge
    for beyond in (field.ge - 1, field.le + 1, math.inf, -math.inf, 10**400):
        assert f"at least {field.ge} and at most {field.le}" in refused(field, beyond)
    for wrong in ("1", True, math.nan, [1], {}):
        refused(field, wrong)
    if not field.nullable:
        assert "null" in refused(field, None)


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_declared_type_decides_between_int_and_float(field: InputField) -> None:
    for value in (int(field.le), float(field.le)):
        converted = check(**{field.name: value})[field.name]
        assert converted == field.le
        assert type(converted).__name__ == field.kind
    if field.kind == "int":
        refused(field, field.ge + 0.5)


@pytest.mark.parametrize("name", ["text", "history", "output_type"])
def test_text_is_checked(name: str) -> None:
    field = FIELDS[name]
    for wrong in (7, None, ["a"], b"a"):
        refused(field, wrong)
    assert refused(field, "\ud800")
    if field.choices is not None:
        assert [check(**{name: c})[name] for c in field.choices] == list(field.choices)
        assert "'text'" in refused(field, "sound")
    else:
        assert check(**{name: "x" * field.max_length})
        message = refused(field, "x" * (field.max_length + 1))
        assert str(field.max_length) in message and len(message) < 200


@pytest.mark.parametrize("field", FILES, ids=lambda field: field.name)
def test_only_uploaded_files_are_taken(field: InputField, tmp_path: Path) -> None:
    secret = tmp_path / "secret.wav"
    value = [secret] if field.repeated else secret
    assert check(**{field.name: value})[field.name] == value
    for text in (str(secret), f"file://{secret}", ""):
        for wrong in ([text], [secret, text]) if field.repeated else (text,):
            assert "paths on the server are not opened" in refused(field, wrong)
    refused(field, secret if field.repeated else [secret])


def test_number_of_files_is_bounded(tmp_path: Path) -> None:
    field = FIELDS["history_audio"]
    assert check(history_audio=[tmp_path] * MAX_FILES)
    assert str(MAX_FILES) in refused(field, [tmp_path] * (MAX_FILES + 1))


def test_required_field_needs_a_value() -> None:
    interface = Interface((InputField("needed", "str"),), ())
    with pytest.raises(RequestError, match="needed: expected text, found null"):
        check_inputs(interface, {"needed": None})


def test_instruction_precedes_the_sound() -> None:
    chat, options = split_inputs(check(text="What is said?", audio=Path("a.wav"), seed=3))
    assert chat == [
        {"role": "user", "message_type": "text", "content": "What is said?"},
        {"role": "user", "message_type": "audio", "content": Path("a.wav")},
    ]
    assert options["seed"] == 3
    assert options.keys() == DEFAULTS.keys() - set(CHAT_INPUTS)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_nothing_to_answer_is_refused(text: str) -> None:
    history = json.dumps([{"role": "user", "message_type": "text", "content": "Hi"}])
    with pytest.raises(RequestError, match="audio, text: nothing to answer"):
        split_inputs(check(text=text, history=history))


def test_history_comes_first_with_its_files() -> None:
    history = [
        {"role": "user", "message_type": "audio", "content": 1},
        {"role": "assistant", "message_type": "audio-text", "content": [0, "At ten."]},
        {"role": "user", "message_type": "text", "content": "0"},
    ]
    files = [Path("reply.wav"), Path("question.wav")]
    chat, _ = split_inputs(check(text="Why?", history=json.dumps(history), history_audio=files))
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
        ("[" * 100_000, "history: not valid JSON"),
        ('["\\ud800"]', "history: not valid JSON"),
        ('{"role": "user"}', "history: expected a JSON list"),
        ("3", "history: expected a JSON list"),
        ('["hello"]', r"history\[0\]: expected an object"),
        ('[{"role": "user", "file": "a.wav"}]', r"history\[0\]: unknown field 'file'"),
        (audio(2), r"history\[0\]\.content: expected the place .*\(0 to 1\), found 2"),
        (audio(-1), "found -1"),
        (audio(True), "found true"),
        (audio(0.0), "found 0.0"),
        (audio("/etc/hostname"), "found '/etc/hostname'"),
        (audio(["a.wav", "text"]), "found"),
        (audio(0), r"history_audio\[1\]: no message of history refers to it"),
        ("", r"history_audio\[0\]: no message of history refers to it"),
    ],
    ids=lambda value: value[:40],
)
def test_bad_history_is_refused(history: str, message: str) -> None:
    values = check(text="Hi", history=history, history_audio=[Path("a"), Path("b")])
    with pytest.raises(RequestError, match=message):
        split_inputs(values)


def test_reference_without_any_file_says_so() -> None:
    with pytest.raises(RequestError, match="history_audio is empty"):
        split_inputs(check(text="Hi", history=audio(0)))


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


@given(st.sampled_from([field.name for field in INTERFACE.inputs]), JSON)
def test_any_json_value_is_converted_or_refused(name: str, value) -> None:
    field = FIELDS[name]
    try:
        converted = check(**{name: value})[name]
    except RequestError as error:
        assert str(error).startswith(name)
    else:
        assert converted == value and (
            converted is None or field.kind in ("str", "int", "float") or converted == []
        )


def test_transcription_needs_a_sound_and_nothing_of_a_chat() -> None:
    sound = Path("a.wav")
    with pytest.raises(RequestError, match="audio: nothing to transcribe"):
        split_inputs(check(task="transcribe", text="Write it down."))
    for extra in ({"voice": sound}, {"history": "[]"}, {"history_audio": [sound]}):
        with pytest.raises(RequestError, match=f"{min(extra)}: a transcription has none"):
            split_inputs(check(task="transcribe", audio=sound, **extra))
    assert split_inputs(check(task="transcribe", audio=sound))


def test_voice_needs_speech() -> None:
    with pytest.raises(RequestError, match="voice: output_type 'text' has no speech"):
        split_inputs(check(text="Hi", voice=Path("a.wav"), output_type="text"))


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
