"""What a full-size checkpoint must hold, derived from the published configuration alone."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from torch import nn

from kimia_infer.models.kimi_audio.config import DiTConfig, LanguageModelConfig, VocoderConfig
from kimia_infer.models.kimi_audio.dit import DiT, dit_slots
from kimia_infer.models.kimi_audio.language_model import (
    LanguageModel,
    language_model_slots,
)
from kimia_infer.models.kimi_audio.vocoder import Vocoder, vocoder_slots
from kimia_infer.weights.component import Slot, expected_tensors

LANGUAGE_MODEL = {
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "kimia_adaptor_input_dim": 5120,
    "kimia_mimo_audiodelaytokens": 6,
    "kimia_mimo_layers": 6,
    "kimia_mimo_transformer_from_layer_index": 21,
    "kimia_token_offset": 152064,
    "num_attention_heads": 28,
    "num_base_tokens": 151643,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 168448,
}
DETOKENIZER = {
    "normalize_mel": True,
    "mel_mean": -4.479605,
    "mel_std": 3.4584913,
    "model": {
        "dit": {
            "depth": 16,
            "hidden_size": 2304,
            "num_heads": 18,
            "semantic_vocab_size": 16384,
            "input_size": 80,
            "mlp_ratio": 4,
            "ffn_type": "vanilla_mlp",
            "ffn_gated_glu": False,
            "position_embedding_type": "skip",
            "use_rope": True,
            "rope_params": {
                "max_position_embeddings": 4096,
                "rope_base": 10000.0,
                "rope_interpolation_factor": 1.0,
            },
            "max_seq_len": 4096,
            "condition_type": "discrete_codes",
        }
    },
}
VOCODER = {
    "resblock": "1",
    "upsample_rates": [5, 2, 2, 2, 2, 3, 2],
    "upsample_kernel_sizes": [9, 4, 4, 4, 4, 5, 4],
    "upsample_initial_channel": 2048,
    "resblock_kernel_sizes": [3, 5, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5]] * 4,
    "activation": "snakebeta",
    "snake_logscale": True,
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
    "num_mels": 80,
    "sampling_rate": 24000,
    "hop_size": 480,
    "n_fft": 1024,
    "win_size": 1024,
    "fmin": 0,
    "fmax": 8000,
}


def on_meta(build) -> nn.Module:
    with torch.device("meta"):
        return build()


def elements(slots: list[Slot]) -> int:
    return sum(math.prod(shape) for shape in expected_tensors(slots).values())


def assert_filled_exactly_once(module: nn.Module, slots: list[Slot]) -> None:
    """Every element of every parameter has one source, and every source one place."""
    parameters = dict(module.named_parameters())
    names = [name for slot in slots for name in slot.sources]
    assert len(names) == len(set(names))
    spans = defaultdict(list)
    for slot in slots:
        shape = tuple(parameters[slot.parameter].shape)
        rows = slot.rows or (0, shape[0])
        spans[slot.parameter].append(rows)
        region = (rows[1] - rows[0], *shape[1:])
        if slot.combine is None:
            assert list(slot.sources.values()) == [region], slot.parameter
        else:
            stored = [torch.ones(s, device="meta") for s in slot.sources.values()]
            assert tuple(slot.combine(*stored).shape) == region, slot.parameter
    assert spans.keys() == parameters.keys()
    for name, rows in spans.items():
        edges = [0, *(edge for span in sorted(rows) for edge in span), len(parameters[name])]
        assert edges[::2] == edges[1::2], name


def test_language_model() -> None:
    config = LanguageModelConfig.from_dict(LANGUAGE_MODEL)
    slots = language_model_slots(config)
    assert len(expected_tensors(slots)) == 419
    width = 2  # bytes of a value in bfloat16
    assert elements(slots) * width == 19_532_668_928
    rest = 34 * config.head_dim // 2  # rotary frequencies, which are not read
    assert (elements(slots) + rest) * width == 19_532_673_280
    assert_filled_exactly_once(on_meta(lambda: LanguageModel(config)), slots)


def test_detokenizer() -> None:
    config = DiTConfig.from_dict(DETOKENIZER)
    slots = dit_slots(config)
    assert len(expected_tensors(slots)) == 171
    # A third of what the published fp32 weights and two optimizer moments add up to.
    assert elements(slots) == 1_584_023_120
    assert_filled_exactly_once(on_meta(lambda: DiT(config)), slots)


def test_vocoder() -> None:
    config = VocoderConfig.from_dict(VOCODER)
    slots = vocoder_slots(config)
    assert len(expected_tensors(slots)) == 868
    # The published fp32 file has 964 918 850 bytes, container overhead included.
    assert 0 < 964_918_850 - 4 * elements(slots) < 500_000
    assert_filled_exactly_once(on_meta(lambda: Vocoder(config)), slots)


@pytest.mark.parametrize("change", ["twice", "gap", "shape"])
def test_the_check_itself_notices(change: str) -> None:
    module = on_meta(lambda: nn.Linear(3, 4, bias=False))
    slots = [Slot("weight", {"a": (2, 3)}, (0, 2)), Slot("weight", {"b": (2, 3)}, (2, 4))]
    assert_filled_exactly_once(module, slots)
    slots[1] = {
        "twice": Slot("weight", {"b": (2, 3)}, (1, 3)),
        "gap": Slot("weight", {"b": (1, 3)}, (3, 4)),
        "shape": Slot("weight", {"b": (2, 2)}, (2, 4)),
    }[change]
    with pytest.raises(AssertionError):
        assert_filled_exactly_once(module, slots)
