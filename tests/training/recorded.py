"""The recorded fine-tuning samples and the network that they were recorded with."""

from __future__ import annotations

import json

import torch
from accelerate import PartialState
from torch import Tensor

from kimia_infer.data.conversations import parse_conversation
from kimia_infer.models.kimi_audio.components import whisper_component
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.encoders import feature_extractor
from kimia_infer.models.kimi_audio.language_model import language_model_component
from kimia_infer.models.kimi_audio.text_tokenizer import SpecialTokens
from kimia_infer.training.model_files import Components, build_network
from kimia_infer.training.network import TRAINABLE, TrainingNetwork
from kimia_infer.training.samples import Sample, SampleBuilder
from tests.paths import GOLDEN

RECORD = json.loads((GOLDEN / "finetune" / "finetune.json").read_text())
SAMPLES = RECORD["samples"]
_NAMES = json.loads((GOLDEN / "llm" / "special_tokens.json").read_text())
SPECIAL = SpecialTokens(
    msg_end=_NAMES["msg_end"],
    user_msg_start=_NAMES["kimia_user_msg_start"],
    assistant_msg_start=_NAMES["kimia_assistant_msg_start"],
    media_begin=_NAMES["media_begin"],
    media_end=_NAMES["media_end"],
    text_blank=_NAMES["kimia_text_blank"],
    text_eos=_NAMES["kimia_text_eos"],
    speech_ct=_NAMES["kimia_speech_ct_id"],
    speech_ctd=_NAMES["kimia_speech_ctd_id"],
    pad=_NAMES["pad"],
)
CONFIG = LanguageModelConfig.from_directory(GOLDEN / "llm")


def components() -> Components:
    return {
        "language_model": language_model_component(GOLDEN / "llm"),
        "whisper": whisper_component(GOLDEN / "whisper"),
    }


def network(parts: tuple[str, ...] = tuple(TRAINABLE), **options) -> TrainingNetwork:
    """The recorded network; all of it is trained unless ``parts`` says otherwise."""
    state = PartialState(cpu=True)
    return build_network(components(), state, torch.float32, parts, **options)


def builder(max_length: int = 4096, encode_speech=None) -> SampleBuilder:
    """Builds samples with the stand-in tokenizer: an id per byte."""
    mels = components()["whisper"].build().config.num_mel_bins
    return SampleBuilder(
        lambda text: list(text.encode()),
        SPECIAL,
        CONFIG,
        feature_extractor(GOLDEN / "whisper", mels),
        GOLDEN / "audio",
        max_length,
        encode_speech,
    )


def sample(record: dict) -> Sample:
    return builder().build(parse_conversation(record["raw"]))


def published_gradients(network: TrainingNetwork) -> dict[str, Tensor | None]:
    """Gradients by published names; those of joined parameters are cut into their rows."""
    parameters = dict(network.language_model.named_parameters())
    gradients = {}
    for slot in language_model_component(GOLDEN / "llm").slots:
        (name,) = slot.sources
        gradient = parameters[slot.parameter].grad
        if gradient is not None and slot.rows is not None:
            gradient = gradient[slice(*slot.rows)]
        gradients[name] = gradient
    for name, parameter in network.whisper.named_parameters():
        gradients[f"whisper_model.speech_encoder.{name}"] = parameter.grad
    return gradients
