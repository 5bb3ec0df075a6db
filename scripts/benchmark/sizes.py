"""Sizes of models with random weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import WhisperConfig

from kimia_infer.models.kimi_audio.config import (
    TOKENIZER_FIXED,
    DiTConfig,
    LanguageModelConfig,
    SpeechTokenizerConfig,
    VocoderConfig,
    encoder_config,
)


@dataclass(frozen=True)
class Sizes:
    """Configurations of all components with weights."""

    speech_tokenizer: SpeechTokenizerConfig
    whisper: WhisperConfig
    language_model: LanguageModelConfig
    dit: DiTConfig
    vocoder: VocoderConfig


def encoder_fields(width: int, heads: int, layers: int, codes: int) -> tuple[dict, dict]:
    """``config.json`` of both encoders; the speech tokenizer uses the lower half of the layers."""
    whisper = {
        "d_model": width,
        "encoder_layers": layers,
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width,
        "num_mel_bins": 128,
    }
    quantizer = {
        "pooling_position": layers // 2,
        "quantize_position": layers // 2,
        "quantize_vocab_size": codes,
        "quantize_causal_block_size": 200,
    }
    return {**TOKENIZER_FIXED, **whisper, **quantizer}, whisper


def encoders(*sizes: int) -> tuple[SpeechTokenizerConfig, WhisperConfig]:
    """Both encoders of :func:`encoder_fields`."""
    speech_tokenizer, whisper = encoder_fields(*sizes)
    source = Path("random weights")
    return (
        SpeechTokenizerConfig.from_json(speech_tokenizer, source),
        encoder_config(whisper, source),
    )


FIELDS: dict[str, dict] = {
    **dict(zip(("speech_tokenizer", "whisper"), encoder_fields(1280, 20, 32, 16384), strict=True)),
    "language_model": {
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
    },
    "dit": {
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
    },
    "vocoder": {
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
    },
}
"""Fields of the published configuration files, by component."""

PUBLISHED = Sizes(
    SpeechTokenizerConfig.from_json(FIELDS["speech_tokenizer"], Path("published")),
    encoder_config(FIELDS["whisper"], Path("published")),
    LanguageModelConfig.from_dict(FIELDS["language_model"]),
    DiTConfig.from_dict(FIELDS["dit"]),
    VocoderConfig.from_dict(FIELDS["vocoder"]),
)
SIZES = {
    "published": PUBLISHED,
    # For CPUs: the published vocabulary and structure, narrower and less deep.
    "mid": Sizes(
        *encoders(512, 8, 8, 16384),
        replace(
            PUBLISHED.language_model,
            hidden_size=512,
            adaptor_input_dim=2048,
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
        *encoders(16, 2, 2, 1024),
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
