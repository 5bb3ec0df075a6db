"""Prompt layout against every recorded chat."""

from __future__ import annotations

import json

import pytest

from kimia_infer.models.kimi_audio.prompt import EncodedMessage, PromptBuilder, parse_messages
from kimia_infer.models.kimi_audio.text_tokenizer import SpecialTokens
from kimia_infer.utils.errors import RequestError
from tests.paths import GOLDEN

RECORDED = json.loads((GOLDEN / "prompt" / "prompt_new.json").read_text())
# The published code fails on preset codes for reasons of its own.
CASES = [case for case in RECORDED["cases"] if case["name"] != "preset_audio_tokens"]


def encode(messages: list[dict]) -> list[EncodedMessage]:
    """Text as UTF-8 bytes and audio by its recorded codes, as in the recording."""
    encoded = []
    for message in parse_messages(messages):
        codes = RECORDED["audio_codes"][message.audio] if message.audio is not None else []
        text = list((message.text or "").encode())
        encoded.append(EncodedMessage(message.role, message.message_type, text, codes))
    return encoded


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    ids = RECORDED["special_tokens"]
    tokens = SpecialTokens(
        msg_end=ids["<|im_msg_end|>"],
        user_msg_start=ids["<|im_kimia_user_msg_start|>"],
        assistant_msg_start=ids["<|im_kimia_assistant_msg_start|>"],
        media_begin=ids["<|im_media_begin|>"],
        media_end=ids["<|im_media_end|>"],
        text_blank=ids["<|im_kimia_text_blank|>"],
        text_eos=ids["<|im_kimia_text_eos|>"],
        speech_ct=ids["<|im_kimia_speech_ct_id|>"],
        speech_ctd=ids["<|im_kimia_speech_ctd_id|>"],
        pad=RECORDED["pad"],
    )
    assert tokens == SpecialTokens.after(ids["[BOS]"])
    return PromptBuilder(tokens, RECORDED["token_offset"], RECORDED["audio_delay"])


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c['name']}-{c['output_type']}-{c['add_assistant_start_msg']}"
)
def test_recorded_prompt(case: dict, builder: PromptBuilder) -> None:
    if "error" in case:
        with pytest.raises(RequestError, match="chats"):
            builder.build(
                encode(case["messages"]), case["output_type"], case["add_assistant_start_msg"]
            )
        return
    prompt = builder.build(
        encode(case["messages"]), case["output_type"], case["add_assistant_start_msg"]
    )
    assert prompt.audio_ids == case["audio_token_ids"]
    assert prompt.text_ids == case["text_token_ids"]
    assert prompt.is_continuous == [bool(x) for x in case["is_continuous_mask"]]
    assert prompt.audio_loss_mask == [bool(x) for x in case["audio_token_loss_mask"]]
    assert prompt.text_loss_mask == [bool(x) for x in case["text_token_loss_mask"]]
    sources = [case["messages"][i]["content"] for i in prompt.feature_messages]
    assert sources == case["feature_source"]
