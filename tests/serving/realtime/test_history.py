"""Conversations as prompts: what the model is given, and what is left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.serving.openai.errors import ApiError
from kimia_infer.serving.realtime.conversation import MAX_SOUND, Conversation, Item, Part
from kimia_infer.serving.realtime.history import build_prompt, cut_to_heard, first_words
from scripts.miniature.scoring import load_model
from tests.paths import MINI
from tests.serving.realtime.talk import RATE, silence


@pytest.fixture(scope="module")
def model() -> KimiAudio:
    return load_model(MINI)


def asked(seconds: float) -> Item:
    return Item("user", [Part("input_audio", None, silence(seconds))])


def answered(text: str, seconds: float) -> Item:
    return Item("assistant", [Part("output_audio", text, silence(seconds))])


def build(model: KimiAudio, items: list[Item], output: str = "both", **options: Any) -> Any:
    given = {"instructions": "", "max_tokens": None, "truncation": "auto"} | options
    return build_prompt(model, items, output_type=output, **given)


def test_items_become_messages(model: KimiAudio) -> None:
    items = [
        asked(1),
        answered("nine", 0.64),
        Item("system", [Part("input_text", "Be brief.")]),
        Item("user", [Part("input_text", "and then"), Part("input_audio", "x", silence(0.8))]),
        Item("assistant", [Part("output_text", "ten")]),
        Item("assistant", [Part("output_audio", "unheard", b"")]),
    ]
    prompt = build(model, items, instructions="Listen.")
    kinds = [(message["role"], message["message_type"]) for message in prompt.chats]
    assert kinds == [
        ("user", "text"),
        ("user", "audio"),
        ("assistant", "audio-text"),
        ("user", "text"),
        ("user", "text"),
        ("user", "audio"),
        ("assistant", "text"),
    ]
    assert prompt.chats[0]["content"] == "Listen."
    (samples, rate), text = prompt.chats[2]["content"]
    assert (len(samples), samples.dtype, rate, text) == (0.64 * RATE, np.int16, RATE, "nine")
    assert (prompt.left_out, prompt.audio_tokens) == (0, 13 + 8 + 10)
    assert prompt.tokens == counted(model, prompt.chats)


def counted(model: KimiAudio, chats: list[dict[str, Any]]) -> int:
    """The length of a prompt as the model counts it."""
    options: Any = {"output_type": "text", "max_new_tokens": 1}
    return list(model.stream(chats, **options))[-1].metrics["prompt_tokens"]


def test_the_oldest_turns_are_left_out_of_a_long_conversation(model: KimiAudio) -> None:
    items = [item for _ in range(20) for item in (asked(4), answered("nine", 1))]
    assert build(model, items, "text").left_out == 0
    prompt = build(model, items)
    assert 0 < prompt.left_out < 30 and prompt.left_out % 2 == 0
    assert prompt.tokens <= 1000 < prompt.tokens + 80
    assert build(model, items, max_tokens=50).left_out < prompt.left_out
    ratio = {"type": "retention_ratio", "retention_ratio": 0.5, "token_limits": None}
    assert 400 < build(model, items, truncation=ratio).tokens <= 500
    limited = ratio | {"token_limits": {"post_instructions": 300}}
    assert build(model, items, truncation=limited).tokens <= 150
    with pytest.raises(ApiError, match="positions are more than the 999") as refused:
        build(model, items, truncation="disabled")
    assert refused.value.code == "context_length_exceeded"


def test_the_last_turn_is_never_left_out(model: KimiAudio) -> None:
    prompt = build(model, [asked(1), answered("nine", 1), asked(110)])
    assert (prompt.left_out, len(prompt.chats)) == (2, 1)


def test_words_without_room_beside_their_sound_are_cut(model: KimiAudio) -> None:
    text = "the red ball is in the kitchen " * 20
    [message] = build(model, [answered(text, 0.4)]).chats
    kept = message["content"][1]
    assert text.startswith(kept) and 0 < len(model.text_tokenizer.encode(kept)) <= 5 + 6


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        (0, ""),
        (0.3, "take"),
        (0.5, "take the"),
        (0.55, "take the red"),
        (0.99, "take the red ball"),
        (1, "all"),
    ],
)
def test_text_is_cut_in_whole_words(share: float, kept: str) -> None:
    text = "take the red ball home"
    assert first_words(text, share) == (text if kept == "all" else kept)


def test_syllables_are_words() -> None:
    assert first_words("你好世界", 0.5) == "你好"


def test_what_is_heard_of_a_stopped_answer_is_what_there_was_time_for() -> None:
    """Its text is known long before its sound."""
    text = "one two three four five six seven eight nine ten"
    whole = Part("output_audio", text, silence(2))
    cut_to_heard(whole, RATE, whole=True)
    assert (whole.samples, whole.text) == (RATE, "one two three four five")
    quick = Part("output_audio", text, silence(1))
    cut_to_heard(quick, RATE, whole=False, speed=2.0)
    assert quick.text == "one two three four five six"
    stopped = Part("output_audio", text, silence(1))
    cut_to_heard(stopped, RATE, whole=False)
    assert (stopped.samples, stopped.text) == (RATE, "one two three")


def test_a_conversation_forgets_sound_that_fits_no_prompt() -> None:
    conversation = Conversation()
    for _ in range(12):
        conversation.add(asked(60))
    sounds = [item.parts[0].sound for item in conversation.items]
    assert sum(map(len, sounds)) <= MAX_SOUND and sounds[-1] and not sounds[0]
