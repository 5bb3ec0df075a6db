"""Chat completions through OpenAI's own client, whole and streamed: what is said, and the form."""

from __future__ import annotations

import base64
import time
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soxr
from openai.types.chat import ChatCompletion

from kimia_infer.audio.files import SAMPLE_RATE
from tests.serving.helpers import Server
from tests.serving.openai.chats import ASKED, LONG, MODEL, SPEECH, STREAMED_SPEECH, asked, said
from tests.serving.openai.sounds import heard, heard_in
from tests.serving.questions import QUESTION

READ = "take the red ball to the school"


def ask(client: openai.OpenAI, messages: list[Any], **options: Any) -> ChatCompletion:
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def test_a_spoken_question_is_answered_in_text(client: openai.OpenAI) -> None:
    answer = ask(client, ASKED, seed=5)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "nine")
    assert (choice.finish_reason, choice.index, choice.message.audio) == ("stop", 0, None)
    assert (answer.model, answer.object) == (MODEL, "chat.completion")
    assert abs(answer.created - time.time()) < 60
    assert answer.model_extra == {"kimi_audio": {"seed": 5, "notes": []}}
    usage = answer.usage
    assert usage and usage.prompt_tokens_details and usage.completion_tokens_details
    assert usage.prompt_tokens_details.audio_tokens == 25  # of 1.97 s
    assert usage.prompt_tokens - 25 == usage.prompt_tokens_details.text_tokens > 0
    assert usage.completion_tokens == usage.completion_tokens_details.text_tokens == 1
    assert usage.total_tokens == usage.prompt_tokens + 1


@pytest.mark.parametrize("form", ["wav", "mp3", "flac", "opus", "aac"])
def test_a_spoken_question_is_answered_in_speech(client: openai.OpenAI, form: str) -> None:
    options = SPEECH | {"audio": {"voice": "alloy", "format": form}}
    answer = ask(client, ASKED, seed=1, **options)
    message, usage = answer.choices[0].message, answer.usage
    assert message.content is None and message.audio is not None
    assert message.audio.transcript == heard(base64.b64decode(message.audio.data)) == "nine"
    assert time.time() + 3000 < message.audio.expires_at < time.time() + 4000
    assert usage and usage.completion_tokens_details
    spoken = usage.completion_tokens_details.audio_tokens
    assert spoken and usage.completion_tokens == spoken + 1


def test_samples_come_without_a_header(client: openai.OpenAI) -> None:
    options = SPEECH | {"audio": {"voice": "alloy", "format": "pcm16"}}
    audio = ask(client, LONG, seed=1, **options).choices[0].message.audio
    assert audio is not None and audio.transcript == READ
    assert heard_in(waveform(audio.data), "anything") == READ


def waveform(data: str) -> np.ndarray:
    """pcm16 in base64 as float32 [samples] at 16 kHz."""
    samples = np.frombuffer(base64.b64decode(data), "<i2").astype(np.float32) / 32768
    return soxr.resample(samples, 24_000, SAMPLE_RATE)


def test_text_is_streamed(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=LONG, stream=True, stream_options={"include_usage": True}
        )
    )
    first, *pieces, last, counted = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    texts = [piece.choices[0].delta.content for piece in pieces]
    assert len(texts) > 4 and all(texts)
    assert "".join(map(str, texts)) == READ
    assert last.choices[0].finish_reason == "stop"
    assert {(c.id, c.object) for c in chunks} == {(first.id, "chat.completion.chunk")}
    assert not counted.choices and counted.usage
    assert counted.usage.completion_tokens == 7
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_speech_is_streamed(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(model=MODEL, messages=LONG, seed=1, **STREAMED_SPEECH)
    found: dict[str, list[Any]] = {"id": [], "transcript": [], "data": [], "expires_at": []}
    order, reasons = [], []
    for chunk in chunks:
        [choice] = chunk.choices
        reasons.append(choice.finish_reason)
        assert choice.delta.content is None
        for name, values in found.items():
            if choice.delta.audio and (value := getattr(choice.delta.audio, name)) is not None:
                values.append(value)
                order.append(name)
    assert "".join(found["transcript"]) == READ
    assert (len(found["id"]), len(found["expires_at"])) == (1, 1)
    assert len(found["data"]) > 1
    assert order.index("data") < len(order) - 1 - order[::-1].index("data")
    assert [reason for reason in reasons if reason] == ["stop"] and reasons[-1] == "stop"
    assert all(len(base64.b64decode(data)) % 6 == 0 for data in found["data"][:-1])
    assert heard_in(waveform("".join(found["data"])), "anything") == READ


def test_the_clients_accumulator_joins_what_is_streamed(client: openai.OpenAI) -> None:
    options = {key: value for key, value in STREAMED_SPEECH.items() if key != "stream"}
    with client.chat.completions.stream(
        model=MODEL, messages=LONG, seed=1, stream_options={"include_usage": True}, **options
    ) as stream:
        answer = stream.get_final_completion()
    whole = ask(client, LONG, seed=1, **options)
    message, audio = answer.choices[0].message, answer.choices[0].message.audio
    assert audio and (audio.transcript, message.content) == (READ, None)
    assert heard_in(waveform(audio.data), "anything") == READ
    assert audio.expires_at > time.time()
    assert answer.usage and whole.usage
    assert answer.usage.completion_tokens == whole.usage.completion_tokens
    follow_up = ask(client, [*said("what comes after five"), message, *said("and then")])
    assert follow_up.choices[0].message.content
    with client.chat.completions.stream(model=MODEL, messages=ASKED) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        assert "".join(deltas) == "nine"
        assert stream.get_final_completion().choices[0].message.content == "nine"


@pytest.mark.parametrize("sent_back", ["object", "id", "text"])
def test_a_dialogue_goes_on_after_a_reply(client: openai.OpenAI, sent_back: str) -> None:
    first = said("what comes after five")
    reply = ask(client, first, seed=1, **SPEECH).choices[0].message
    assert reply.audio and reply.audio.transcript == "six"
    answers: dict[str, Any] = {
        "object": reply,
        "id": {"role": "assistant", "audio": {"id": reply.audio.id}},
        "text": {"role": "assistant", "content": reply.audio.transcript},
    }
    second = ask(client, [*first, answers[sent_back], *said("and then")], seed=1, **SPEECH)
    said_then = second.choices[0].message.audio
    assert said_then
    if sent_back != "text":  # the miniature was not taught to follow written answers
        assert said_then.transcript == heard(base64.b64decode(said_then.data)) == "seven"


def test_unknown_replies_are_refused(client: openai.OpenAI) -> None:
    gone = {"role": "assistant", "audio": {"id": "audio_gone"}}
    for options in ({}, STREAMED_SPEECH):
        with pytest.raises(openai.NotFoundError, match=r"messages\[1\].audio.id.*'audio_gone'"):
            ask(client, [*ASKED, gone, *ASKED], **options)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instructions_come_before_what_follows(client: openai.OpenAI, role: str) -> None:
    repeat = {"role": role, "content": "Please repeat what you hear."}
    answer = ask(client, [repeat, *said("anna has a blue key")])
    same = ask(client, [asked("Please repeat what you hear."), *said("anna has a blue key")])
    assert answer.choices[0].message.content == "anna has a blue key"
    assert answer.usage == same.usage


def test_text_and_sound_of_one_message(client: openai.OpenAI) -> None:
    together = asked("Please repeat what you hear.", QUESTION.read_bytes())
    assert ask(client, [together]).choices[0].message.content == "what is four plus five"


def test_answers_end_where_they_are_told_to(client: openai.OpenAI) -> None:
    cut = ask(client, LONG, stop=["ball"])
    assert cut.choices[0].message.content == "take the red "
    assert cut.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(model=MODEL, messages=LONG, stop="the", stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "take "
    for name in ("max_tokens", "max_completion_tokens"):
        short = ask(client, LONG, **{name: 3})
        assert short.choices[0].message.content == "take the red"
        assert short.choices[0].finish_reason == "length"
    assert ask(client, LONG, max_tokens=100_000).choices[0].message.content == READ


def test_speech_that_was_cut_is_remembered_by_its_words(client: openai.OpenAI) -> None:
    answer = ask(client, LONG, max_tokens=4, **SPEECH)
    audio, extras = answer.choices[0].message.audio, answer.model_extra
    assert audio and (audio.transcript, audio.data) == ("take the red ball", "")
    assert (
        extras and "no speech: the answer stopped after 4 steps" in extras["kimi_audio"]["notes"][0]
    )
    assert ask(client, [*LONG, answer.choices[0].message, *ASKED]).choices[0].message.content


def test_seed_and_temperatures_draw_answers(client: openai.OpenAI) -> None:
    unknown: Any = [{"role": "user", "content": "zebras"}]  # the miniature is sure of what it knows
    hot = {"temperature": 2, "extra_body": {"text_top_k": 0, "text_repetition_penalty": 1.1}}
    texts = [ask(client, unknown, seed=s, max_tokens=20, **hot) for s in (1, 1, 2)]
    first, again, other = (text.choices[0].message.content for text in texts)
    assert first == again != other
    sure = {"extra_body": {"audio_temperature": 0}} | SPEECH
    one, two = (ask(client, LONG, seed=s, **sure) for s in (1, 2))
    assert one.usage == two.usage


def test_options_that_change_nothing_are_taken(client: openai.OpenAI) -> None:
    answer = ask(
        client, ASKED, n=1, top_p=1, frequency_penalty=0, presence_penalty=0.0, logprobs=False,
        user="someone", metadata={"a": "b"}, store=False, service_tier="auto", tools=[],
        tool_choice="none", response_format={"type": "text"}, stop=None, logit_bias={},
        parallel_tool_calls=True, modalities=["text"], prompt_cache_key="key", seed=None,
    )  # fmt: skip
    assert answer.choices[0].message.content == "nine"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "n": ({"n": 2}, "n"),
    "n true": ({"n": True}, "n"),
    "top_p": ({"top_p": 0.5}, "top_p"),
    "frequency_penalty": ({"frequency_penalty": 0.5}, "frequency_penalty"),
    "presence_penalty": ({"presence_penalty": -1}, "presence_penalty"),
    "logprobs": ({"logprobs": True, "top_logprobs": 0}, "logprobs"),
    "logit_bias": ({"logit_bias": {"5": 100}}, "logit_bias"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "response_format": ({"response_format": {"type": "json_object"}}, "response_format"),
    "store": ({"store": True}, "store"),
    "reasoning_effort": ({"reasoning_effort": "high"}, "reasoning_effort"),
    "prediction": ({"prediction": {"type": "content", "content": "nine"}}, "prediction"),
    "stop with speech": (SPEECH | {"stop": "a"}, "stop"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_cannot_be_honoured_are_refused_by_name(
    client: openai.OpenAI, name: str
) -> None:
    options, param = REFUSED[name]
    with pytest.raises(openai.BadRequestError, match=f"{param}: not supported; ") as refused:
        ask(client, ASKED, **options)
    assert (refused.value.param, refused.value.code) == (param, "unsupported_parameter")


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown": ({"extra_body": {"audio_topk": 3}}, "audio_topk", "did you mean audio_top_k"),
    "unknown inside": (
        SPEECH | {"audio": {"voices": "ash", "format": "wav"}},
        "audio.voices",
        "unknown field; did you mean audio.voice?",
    ),
    "unknown in a message": (
        {"messages": [{"role": "user", "content": "a", "audios": 1}]},
        "messages[0].audios",
        r"unknown field; did you mean messages\[0\].audio?",
    ),
    "unknown in a part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "txt": "a"}]}]},
        "messages[0].content[0].txt",
        r"unknown field; did you mean messages\[0\].content\[0\].text?",
    ),
    "no role": ({"messages": [{"content": "a"}]}, "messages[0].role", "role: missing"),
    "extension": ({"extra_body": {"audio_temperature": 9}}, "audio_temperature", "at most 2"),
    "temperature": ({"temperature": 3}, "temperature", "expected less than or equal to 2, found 3"),
    "seed": ({"seed": -1}, "seed", "greater than or equal to 0"),
    "limits": ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "leave it out"),
    "no limit": ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    "stops": ({"stop": list("abcde")}, "stop", "at most 4"),
    "no audio": ({"modalities": ["text", "audio"]}, "audio", "missing"),
    "audio alone": ({"audio": SPEECH["audio"]}, "audio", "only with modalities"),
    "voice": (SPEECH | {"audio": {"voice": "bob", "format": "wav"}}, "audio.voice", "'bob'"),
    "format": (SPEECH | {"audio": {"voice": "ash", "format": "ogg"}}, "audio.format", "'wav'"),
    "stream": (SPEECH | {"stream": True}, "audio.format", "pcm16"),
    "stream options": ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    "no messages": ({"messages": []}, "messages", r"expected a list .*, found \[\]"),
    "nothing": ({"messages": [{"role": "user", "content": ""}]}, "messages", "nothing to answer"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'user'"),
    "last": (
        {"messages": [*ASKED, {"role": "assistant", "content": "x"}]},
        "messages",
        "nothing is asked",
    ),
    "part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "'input_audio'",
    ),
    "base64": (
        {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "hear this"},
            {"type": "input_audio", "input_audio": {"data": "é", "format": "wav"}},
        ]}]},
        "messages[0].content[1].input_audio.data",
        "not base64",
    ),
    "sound": (
        {"messages": [*ASKED, asked(b"RIFFnonsense")]},
        "messages[1].content[0].input_audio.data",
        "not readable as sound",
    ),
    "both": (
        {"messages": [*ASKED, {"role": "assistant", "content": "x", "audio": {"id": "y"}}, *ASKED]},
        "messages[1].content",
        "leave it out",
    ),
    "tool calls": (
        {"messages": [*ASKED, {"role": "assistant", "tool_calls": [{}]}, *ASKED]},
        "messages[1].tool_calls",
        "calls no tools",
    ),
    "long": (
        {"messages": [{"role": "user", "content": "the red ball " * 3000}]},
        "messages",
        "the prompt needs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_are_refused_by_field(client: openai.OpenAI, name: str) -> None:
    options, param, text = WRONG[name]
    with pytest.raises(openai.BadRequestError, match=text) as refused:
        ask(client, **{"messages": ASKED, **options})
    assert refused.value.param == param
    assert refused.value.message.count(param)


def test_a_data_uri_with_line_breaks_is_a_recording_too(client: openai.OpenAI) -> None:
    lines = base64.encodebytes(QUESTION.read_bytes()).decode()
    sound = {"data": f"data:audio/wav;base64,{lines}", "format": "wav"}
    part: Any = {"type": "input_audio", "input_audio": sound}
    answer = ask(client, messages=[{"role": "user", "content": [part]}])
    assert answer.choices[0].message.content == "nine"


def test_a_body_of_another_type_is_refused(front: Server) -> None:
    body = b'{"model": "kimi-audio", "messages": [{"role": "user", "content": "a"}]}'
    headers = {"content-type": "text/plain"}
    answer = httpx.post(f"{front.url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_unknown_models_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no 'gpt-audio' here") as refused:
        client.chat.completions.create(model="gpt-audio", messages=ASKED)
    assert refused.value.param == "model"
