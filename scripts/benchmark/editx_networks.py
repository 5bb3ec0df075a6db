"""Step-Audio-EditX with random weights, created on its device, in sizes for GPUs and CPUs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kimia_infer.layers.operators import use_onednn
from kimia_infer.layers.quantization import quantize_model
from kimia_infer.models.step_audio_editx import vq02, vq06
from kimia_infer.models.step_audio_editx.checkpoint import Networks
from kimia_infer.models.step_audio_editx.config import (
    FlowConfig,
    LanguageModelConfig,
    SanmConfig,
    VocoderConfig,
)
from kimia_infer.models.step_audio_editx.flow import Flow
from kimia_infer.models.step_audio_editx.hift import Vocoder
from kimia_infer.models.step_audio_editx.language_model import LanguageModel
from kimia_infer.models.step_audio_editx.packing import AUDIO_TOKENS, VQ02_CODES
from kimia_infer.models.step_audio_editx.variants import BITSANDBYTES, use_bitsandbytes
from scripts.benchmark.random_models import random_module

LANGUAGE_MODEL = {
    "model_type": "step1",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 48,
    "num_attention_groups": 4,
    "vocab_size": 74_752,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 3,
}
SANM = {
    "output_size": 512,
    "attention_heads": 4,
    "linear_units": 2048,
    "num_blocks": 50,
    "kernel_size": 11,
    "input_layer": "pe_online",
    "sanm_shfit": 0,
}


def flow_fields(width: int, blocks: int, up_blocks: int, heads: int, depth: int) -> dict[str, Any]:
    """``flow`` of ``cosyvoice.yaml``; heads have 64 values."""
    estimator = {"in_channels": 320, "out_channels": 80, "depth": depth}
    estimator |= {"num_heads": heads, "head_dim": 64, "hidden_size": width}
    encoder = {"input_size": width, "output_size": width, "attention_heads": heads}
    encoder |= {"num_blocks": blocks, "num_up_blocks": up_blocks, "linear_units": 4 * width}
    decoder = {"estimator": estimator}
    return {"input_size": width, "output_size": 80, "encoder": encoder, "decoder": decoder}


@dataclass(frozen=True)
class EditXSizes:
    """Fields of the published configuration files, by network; VQ06 has no file."""

    language_model: dict[str, Any]
    vq02: dict[str, Any]
    vq06: vq06.EncoderSizes
    flow: dict[str, Any]
    vocoder: dict[str, Any]

    def builds(self) -> dict[str, Callable[[], nn.Module]]:
        """What makes each network."""
        return {
            "language model": lambda: LanguageModel(
                LanguageModelConfig.model_validate(self.language_model)
            ),
            "VQ02": lambda: vq02.SanmEncoder(SanmConfig.model_validate(self.vq02)),
            "VQ06": lambda: vq06.Vq06(self.vq06),
            "flow": lambda: Flow(FlowConfig.model_validate(self.flow)),
            "vocoder": lambda: Vocoder(VocoderConfig.model_validate(self.vocoder)),
        }


SIZES = {
    "published": EditXSizes(
        LANGUAGE_MODEL,
        SANM,
        vq06.EncoderSizes(),
        flow_fields(512, 6, 4, 8, 16),
        {"in_channels": 80},
    ),
    # For CPUs: the published vocabulary and structure, narrower and less deep.
    "mid": EditXSizes(
        LANGUAGE_MODEL
        | {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 8,
            "num_attention_heads": 12,
        },
        SANM | {"output_size": 256, "linear_units": 1024, "num_blocks": 12},
        vq06.EncoderSizes(width=384, heads=6, layers=3),
        flow_fields(256, 3, 2, 4, 6),
        {"in_channels": 80, "base_channels": 128},
    ),
    # Too small to tell anything about speed; shows in seconds that everything runs.
    "tiny": EditXSizes(
        LANGUAGE_MODEL
        | {
            "hidden_size": 128,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "vocab_size": 6144,
        },
        SANM | {"output_size": 64, "linear_units": 64, "num_blocks": 2},
        vq06.EncoderSizes(width=64, heads=1, layers=1),
        flow_fields(64, 1, 1, 1, 1),
        {"in_channels": 80, "base_channels": 32},
    ),
}


class NumberTokenizer:
    """Replaces the text tokenizer: an id for each character and for each name of an audio token."""

    def __init__(self, size: int, turn_end: int):
        self.size, self.first_audio = size, size - AUDIO_TOKENS
        self.turn_begin, self.turn_end = turn_end + 1, turn_end

    def encode(self, text: str) -> list[int]:
        return [
            self.first_audio + int(token) if token else ord(character) % self.first_audio
            for token, character in re.findall(r"<audio_(\d+)>|(.)", text, re.DOTALL)
        ]

    def require_plain(self, field: str, text: str) -> None:
        """Every text is plain."""


def random_networks(
    sizes: EditXSizes, device: torch.device, dtype: torch.dtype, variant: str = "none"
) -> Networks:
    """Networks that never end an answer; a voice is a random vector, as CAM++ is a file of its own.

    The language model is in ``dtype``, the others in float32.
    """
    made: dict[str, Any] = {
        name: random_module(build, device, dtype if name == "language model" else torch.float32)
        for name, build in sizes.builds().items()
    }
    language_model, encoder, flow = (made[name] for name in ("language model", "VQ02", "flow"))
    end = language_model.config.end
    language_model.lm_head.weight[end] = 0  # not among the 50 largest
    if variant in BITSANDBYTES:
        use_bitsandbytes(language_model, variant)
    else:
        quantize_model(language_model, variant)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    normalization = vq02.Normalization(
        torch.full((vq02.FEATURES,), -10.0), torch.full((vq02.FEATURES,), 0.3)
    )
    centers = drawn(VQ02_CODES, encoder.config.width)
    first = vq02.Vq02(encoder, normalization, centers).to(device)
    networks: dict[str, Any] = {
        "tokenizer": NumberTokenizer(language_model.config.vocabulary, end),
        "language_model": language_model,
        "vq02": first,
        "vq06": made["VQ06"],
        "speaker": lambda features: drawn(flow.config.speaker),
        "flow": flow,
        "vocoder": made["vocoder"],
    }
    for network in networks.values():
        if isinstance(network, nn.Module):
            use_onednn(network)
    return Networks(**networks)
