"""Models with random weights, made where they run: no checkpoint is read or written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from kimia_infer.detokenizer.dit import DiT, DiTConfig
from kimia_infer.detokenizer.stream import Detokenizer
from kimia_infer.detokenizer.vocoder import Vocoder, VocoderConfig
from kimia_infer.language_model.config import LanguageModelConfig
from kimia_infer.language_model.model import LanguageModel

SEED = 0

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Sizes:
    """The parts whose speed depends on nothing but their size."""

    language_model: LanguageModelConfig
    dit: DiTConfig
    vocoder: VocoderConfig


# Fields of the published configuration files.
PUBLISHED = Sizes(
    LanguageModelConfig.from_dict(
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "kimia_adaptor_input_dim": 5120,
            "kimia_mimo_audiodelaytokens": 6,
            "kimia_mimo_layers": 6,
            "kimia_mimo_transformer_from_layer_index": 21,
            "kimia_token_offset": 152064,
            "max_position_embeddings": 8192,
            "num_attention_heads": 28,
            "num_base_tokens": 151643,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "vocab_size": 168448,
        }
    ),
    DiTConfig.from_dict(
        {
            "mel_mean": -4.479605,
            "mel_std": 3.4584913,
            "normalize_mel": True,
            "model": {
                "dit": {
                    "condition_type": "discrete_codes",
                    "depth": 16,
                    "ffn_gated_glu": False,
                    "ffn_type": "vanilla_mlp",
                    "hidden_size": 2304,
                    "input_size": 80,
                    "max_seq_len": 4096,
                    "mlp_ratio": 4,
                    "num_heads": 18,
                    "position_embedding_type": "skip",
                    "rope_params": {
                        "max_position_embeddings": 4096,
                        "rope_base": 10000.0,
                        "rope_interpolation_factor": 1.0,
                    },
                    "semantic_vocab_size": 16384,
                    "use_rope": True,
                }
            },
        }
    ),
    VocoderConfig.from_dict(
        {
            "activation": "snakebeta",
            "hop_size": 480,
            "num_mels": 80,
            "resblock": "1",
            "resblock_dilation_sizes": [[1, 3, 5]] * 4,
            "resblock_kernel_sizes": [3, 5, 7, 11],
            "sampling_rate": 24000,
            "snake_logscale": True,
            "upsample_initial_channel": 2048,
            "upsample_kernel_sizes": [9, 4, 4, 4, 4, 5, 4],
            "upsample_rates": [5, 2, 2, 2, 2, 3, 2],
            "use_bias_at_final": False,
            "use_tanh_at_final": False,
        }
    ),
)
SIZES = {
    "published": PUBLISHED,
    # For CPUs: the published vocabulary and structure, narrower and less deep.
    "mid": Sizes(
        replace(
            PUBLISHED.language_model,
            hidden_size=512,
            intermediate_size=1536,
            trunk_layers=8,
            heads=8,
            kv_heads=2,
            mimo_layers=2,
            fork_layer=5,
        ),
        replace(PUBLISHED.dit, depth=6, hidden_size=512, heads=4),
        replace(PUBLISHED.vocoder, initial_channels=512),
    ),
    # Too small to tell anything about speed; shows in seconds that everything runs.
    "tiny": Sizes(
        replace(
            PUBLISHED.language_model,
            vocab_size=2048,
            hidden_size=64,
            intermediate_size=128,
            trunk_layers=3,
            heads=4,
            kv_heads=2,
            base_tokens=512,
            token_offset=1024,
            adaptor_input_dim=64,
            mimo_layers=1,
            fork_layer=1,
        ),
        replace(PUBLISHED.dit, depth=1, hidden_size=64, heads=2, codes=1024),
        replace(PUBLISHED.vocoder, initial_channels=128),
    ),
}


def random_module(build: Callable[[], Module], device: torch.device, dtype: torch.dtype) -> Module:
    """A module with random weights that keep activations near 1 in size.

    Matrices have the variance 1 / fan-in, norm weights are one, biases and the log-scale
    parameters of the vocoder's activations zero.
    """
    with torch.device("meta"):
        module = build()
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(SEED)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            deviation = (len(parameter) / parameter.numel()) ** 0.5
            parameter.normal_(0, deviation, generator=generator)
        else:
            parameter.fill_(1 if name.endswith("norm.weight") else 0)
    return module


def random_language_model(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    return random_module(lambda: LanguageModel(sizes.language_model), device, dtype)


def random_detokenizer(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Detokenizer:
    return Detokenizer(
        random_module(lambda: DiT(sizes.dit), device, dtype),
        random_module(lambda: Vocoder(sizes.vocoder), device, dtype),
    )
