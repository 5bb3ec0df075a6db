"""Training samples against recorded ones: both tracks, labels and loss masks."""

from __future__ import annotations

import json

import pytest

from kimia_infer.models.kimi_audio.prompt import EncodedMessage, PromptBuilder
from kimia_infer.models.kimi_audio.text_tokenizer import SpecialTokens
from kimia_infer.training.samples import next_token_labels
from tests.paths import GOLDEN

SAMPLES = json.loads((GOLDEN / "finetune" / "finetune.json").read_text())["samples"]
IDS = json.loads((GOLDEN / "llm" / "special_tokens.json").read_text())
CONFIG = json.loads((GOLDEN / "llm" / "config.json").read_text())


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    tokens = SpecialTokens(
        msg_end=IDS["msg_end"],
        user_msg_start=IDS["kimia_user_msg_start"],
        assistant_msg_start=IDS["kimia_assistant_msg_start"],
        media_begin=IDS["media_begin"],
        media_end=IDS["media_end"],
        text_blank=IDS["kimia_text_blank"],
        text_eos=IDS["kimia_text_eos"],
        speech_ct=IDS["kimia_speech_ct_id"],
        speech_ctd=IDS["kimia_speech_ctd_id"],
        pad=IDS["pad"],
    )
    return PromptBuilder(
        tokens, CONFIG["kimia_token_offset"], CONFIG["kimia_mimo_audiodelaytokens"]
    )


def encode(message: dict) -> EncodedMessage:
    """Text as UTF-8 bytes; recorded audio tokens are already offset."""
    text = message["content"].encode() if message["message_type"] == "text" else b""
    codes = [t - CONFIG["kimia_token_offset"] for t in message.get("audio_tokens", [])]
    return EncodedMessage(message["role"], message["message_type"], list(text), codes)


@pytest.mark.parametrize("sample", SAMPLES, ids=range(len(SAMPLES)))
def test_recorded_sample(sample: dict, builder: PromptBuilder) -> None:
    raw = sample["raw"]
    output_type = "text" if raw["task_type"] == "understanding" else "both"
    prompt = builder.build(
        [encode(message) for message in raw["conversation"]],
        output_type,
        add_assistant_start=False,
    )
    assert prompt.audio_ids == _flat(sample["input_ids"])
    assert prompt.text_ids == _flat(sample["text_input_ids"])
    assert prompt.is_continuous == _flat(sample["is_continuous_mask"])
    assert len(prompt.feature_messages) == sample["n_features"]
    labels = next_token_labels(prompt, builder.tokens.pad)
    assert labels.audio_ids == _flat(sample["audio_labels"])
    assert labels.text_ids == _flat(sample["text_labels"])
    assert labels.audio_loss_mask == _flat(sample["audio_loss_mask"])
    assert labels.text_loss_mask == _flat(sample["text_loss_mask"])


def _flat(values: list) -> list:
    """Recorded tensors carry a batch dimension of one, or none."""
    return values[0] if isinstance(values[0], list) else values
