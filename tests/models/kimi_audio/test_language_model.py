"""Hidden states, caches and logits against the recorded published implementation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kimia_infer.layers.attention import CachedAttention, choose_backend
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.language_model import LanguageModel, language_model_component
from kimia_infer.utils.errors import CheckpointError

TOLERANCE = 1e-4
Recorded = dict[str, torch.Tensor]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=0)


def new_attention(model: LanguageModel, capacity: int) -> CachedAttention:
    backend = choose_backend(model.device, model.config.head_dim)
    cache = model.new_cache(capacity, capacity)
    return CachedAttention(backend, cache)


@pytest.fixture(scope="module")
def prefilled(model: LanguageModel, recorded: Recorded, features: torch.Tensor):
    """Embeddings, residual stream per layer, final states and cache of the recorded prompt."""
    streams: dict[str, torch.Tensor] = {}
    hooks = []
    for kind, layers in (("layer", model.layers), ("mimo_layer", model.mimo_layers)):
        for index, layer in enumerate(layers):

            def keep(_module, _args, output, name=f"{kind}.{index}"):
                streams[name] = sum(output)[0]

            hooks.append(layer.register_forward_hook(keep))
    with torch.inference_mode():
        x = model.embed(
            recorded["prefill.audio_ids"],
            recorded["prefill.text_ids"],
            recorded["prefill.is_continuous_mask"],
            features,
        )
        length = x.shape[1]
        attention = new_attention(model, length + len(recorded["decode.audio_ids"]))
        hidden = model(x, attention.sequence(0, 0))
    for hook in hooks:
        hook.remove()
    return x, streams, hidden, attention, length


def test_adaptor(model: LanguageModel, recorded: Recorded, features: torch.Tensor) -> None:
    mask = recorded["prefill.is_continuous_mask"][0]
    rows = torch.zeros(len(mask), features.shape[1])
    rows[mask] = features
    close(model.adaptor(rows), recorded["prefill.hidden.vq_adaptor_out_TBD"].reshape(len(mask), -1))


def test_prefill(model: LanguageModel, recorded: Recorded, prefilled) -> None:
    x, streams, hidden, _, _ = prefilled
    close(x[0], recorded["prefill.hidden.inputs_embeds"].reshape(x[0].shape))
    for name, stream in streams.items():
        close(stream, recorded[f"prefill.hidden.{name}"].reshape(stream.shape))
    close(hidden.text[0], recorded["prefill.hidden.norm"].reshape(x[0].shape))
    close(hidden.audio[0], recorded["prefill.hidden.mimo_norm"].reshape(x[0].shape))
    close(model.text_head(hidden.text[0]), recorded["prefill.text_logits"])
    close(model.audio_head(hidden.audio[0]), recorded["prefill.audio_logits"])


def test_cache(recorded: Recorded, prefilled) -> None:
    *_, attention, length = prefilled
    layers = [n for n in recorded if n.startswith("prefill.cache.") and n.endswith(".k")]
    assert len(layers) == len(attention.cache.keys)
    for index in range(len(layers)):
        close(attention.cache.keys[index, :, :length], recorded[f"prefill.cache.{index}.k"])
        close(attention.cache.values[index, :, :length], recorded[f"prefill.cache.{index}.v"])


def test_decode_steps(model: LanguageModel, recorded: Recorded, prefilled) -> None:
    """One token at a time on top of the prompt, text id 0 and blanks included."""
    *_, attention, length = prefilled
    assert (recorded["decode.text_ids"] == 0).any()
    for step, (audio, text) in enumerate(
        zip(recorded["decode.audio_ids"], recorded["decode.text_ids"], strict=True)
    ):
        with torch.inference_mode():
            x = model.embed(audio.view(1, 1), text.view(1, 1))
            hidden = model(x, attention.sequence(0, length + step))
        close(model.audio_head(hidden.audio[0, 0]), recorded["decode.audio_logits"][step])
        close(model.text_head(hidden.text[0, 0]), recorded["decode.text_logits"][step])


def test_several_positions_on_a_filled_cache(
    model: LanguageModel, recorded: Recorded, features: torch.Tensor
) -> None:
    """A prompt read in two pieces gives what reading it at once gives."""
    mask = recorded["prefill.is_continuous_mask"]
    cut = int(mask[0].nonzero()[0]) - 1
    with torch.inference_mode():
        x = model.embed(recorded["prefill.audio_ids"], recorded["prefill.text_ids"], mask, features)
        attention = new_attention(model, x.shape[1])
        model(x[:, :cut], attention.sequence(0, 0))
        hidden = model(x[:, cut:], attention.sequence(0, cut))
    close(model.text_head(hidden.text[0]), recorded["prefill.text_logits"][cut:])
    close(model.audio_head(hidden.audio[0]), recorded["prefill.audio_logits"][cut:])


@pytest.mark.parametrize("name", ["zero_text", "text_only"])
def test_prompts_without_features(model: LanguageModel, recorded: Recorded, name: str) -> None:
    length = len(recorded[f"{name}.audio_logits"])
    audio = recorded["prefill.audio_ids"][:, :length]
    text = recorded["prefill.text_ids"][:, :length]
    if name == "zero_text":
        text = torch.zeros_like(text)
    with torch.inference_mode():
        hidden = model(model.embed(audio, text), new_attention(model, length).sequence(0, 0))
    close(model.audio_head(hidden.audio[0]), recorded[f"{name}.audio_logits"])
    close(model.text_head(hidden.text[0]), recorded[f"{name}.text_logits"])


def test_skipping_a_track_leaves_the_other_unchanged(
    model: LanguageModel, recorded: Recorded, features: torch.Tensor, prefilled
) -> None:
    x, _, hidden, _, length = prefilled
    with torch.inference_mode():
        text_only = model(x, new_attention(model, length).sequence(0, 0), audio=False)
        audio_only = model(x, new_attention(model, length).sequence(0, 0), text=False)
    assert text_only.audio is None
    assert audio_only.text is None
    assert torch.equal(text_only.text, hidden.text)
    assert torch.equal(audio_only.audio, hidden.audio)


def test_bfloat16(golden: Path, recorded: Recorded, features: torch.Tensor) -> None:
    """bf16 weights and activations stay within rounding of the recorded bf16 run."""
    expected = load_file(golden / "llm" / "forward_bf16.safetensors")
    model = language_model_component(golden / "llm").load(torch.device("cpu"), torch.bfloat16)
    with torch.inference_mode():
        x = model.embed(
            recorded["prefill.audio_ids"],
            recorded["prefill.text_ids"],
            recorded["prefill.is_continuous_mask"],
            features.bfloat16(),
        )
        hidden = model(x, new_attention(model, x.shape[1]).sequence(0, 0))
    audio, text = model.audio_head(hidden.audio[0]), model.text_head(hidden.text[0])
    close(audio, expected["prefill.audio_logits"], 0.15)
    close(text, expected["prefill.text_logits"], 0.15)


def test_null_fields_of_qwen2_configurations(golden: Path) -> None:
    values = json.loads((golden / "llm" / "config.json").read_text())
    config = LanguageModelConfig.from_dict(values | {"num_key_value_heads": None})
    assert config.kv_heads == config.heads


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "big"),
        ("kimia_mimo_layers", None),
        ("hidden_act", "gelu"),
        ("num_key_value_heads", 3),
        ("kimia_mimo_transformer_from_layer_index", 99),
        ("kimia_token_offset", 10**9),
    ],
)
def test_bad_configuration_names_the_field(golden: Path, field: str, value: object) -> None:
    values = json.loads((golden / "llm" / "config.json").read_text()) | {field: value}
    with pytest.raises(CheckpointError, match=field):
        LanguageModelConfig.from_dict(values)
