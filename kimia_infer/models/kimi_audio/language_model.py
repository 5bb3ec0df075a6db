"""The dual-track model: trunk, MIMO branch forked inside it, and two heads.

Two token tracks of equal length, audio and text, are embedded with one table and summed per
position. The trunk's head predicts the text track; a branch that forks after
``fork_layer`` predicts the audio track. Query/key/value and gate/up matrices are joined, so
that a single-token step reads each in one product.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.layers.attention import (
    Attend,
    KeyValueCache,
    rotary_tables,
    rotate,
    split_heads,
)
from kimia_infer.layers.operators import add_rms_norm, rms_norm, silu_mul
from kimia_infer.layers.packed import PackedLinear, pack_layers, packed, packs
from kimia_infer.layers.quantization import stored_build, stored_scheme, stored_slots
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.component import Component, Slot
from kimia_infer.weights.manifest import MANIFEST_NAME
from kimia_infer.weights.tensors import open_directory


class RMSNorm(nn.Module):
    """x / rms(x) * weight, accumulated in fp32, of a residual stream."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sum of the residual stream x [..., size] and ``delta``, and its norm."""
        if delta is None:
            return x, rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, delta, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention between joined projections and the output projection."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, rows)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, attend: Attend, layer: int) -> Tensor:
        return self.output(attend(self.qkv(x), layer))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu_mul(self.gate_up(x)))


class DecoderLayer(nn.Module):
    """A Qwen2 block: pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, delta: Tensor | None, attend: Attend, layer: int
    ) -> tuple[Tensor, Tensor]:
        """Residual stream and the delta to be added to it, before and after this layer."""
        x, inner = self.attention_norm(x, delta)
        x, inner = self.feed_forward_norm(x, self.attention(inner, attend, layer))
        return x, self.feed_forward(inner)


class VQAdaptor(nn.Module):
    """Whisper features [n, adaptor_input_dim] -> embeddings [n, hidden_size]."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.input = nn.Linear(config.adaptor_input_dim, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.output(F.silu(self.input(features))))


class Hidden(NamedTuple):
    """Normalized states [batch, length, hidden_size] that the heads read; None if not asked for."""

    text: Tensor | None
    audio: Tensor | None


class LanguageModel(nn.Module):
    """Embedding, trunk, MIMO branch and both heads.

    The text head's rows stand for the ids from 0 on, the audio head's for those from
    ``first_audio_id`` on. ``quantization`` is the scheme in which the layers' matrices are stored.
    """

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.adaptor = VQAdaptor(config)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.trunk_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.text_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mimo_layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.mimo_layers))
        self.mimo_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.audio_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.first_audio_id = 0
        self.quantization = "none"

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def embed(
        self,
        audio_ids: Tensor,
        text_ids: Tensor,
        is_continuous: Tensor | None = None,
        features: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Sum of both tracks' embeddings [batch, length, hidden_size] in ``dtype``.

        audio_ids, text_ids int64 [batch, length]; at the positions where ``is_continuous``
        (bool, same shape) holds, the adapted ``features`` [positions, adaptor_input_dim], in
        their order, are added to the audio embedding and the sum is scaled by sqrt(2). They may
        be on another device, from which they are copied here. ``dtype`` is that of the embedding
        by default; in training parameters may have another one.

        As published, a row whose text ids are all 0 gets no text embedding at all; during
        decoding that affects every step whose text id is 0 (``!`` in the published
        vocabulary), so tokens depend on it.
        """
        dtype = dtype or self.dtype
        audio = self.embedding(audio_ids).to(dtype)
        if features is not None:
            assert is_continuous is not None
            adapted = self.adaptor(features.to(self.device, self.dtype)).to(dtype)
            continuous = is_continuous[..., None]
            spread = torch.zeros_like(audio).masked_scatter(continuous, adapted)
            # Rounded to the working dtype first, as the published code does.
            scale = torch.full((), math.sqrt(2.0), dtype=dtype, device=audio.device)
            audio = torch.where(continuous, (audio + spread) * scale, audio)
        has_text = (text_ids != 0).any(dim=1)[:, None, None]
        return torch.where(has_text, audio + self.embedding(text_ids).to(dtype), audio)

    def forward(self, x: Tensor, attend: Attend, text: bool = True, audio: bool = True) -> Hidden:
        """Run embeddings x [batch, length, hidden_size]; ``attend`` computes attention.

        Only what the wanted tracks need is computed: without ``text`` the trunk ends at the
        fork, without ``audio`` the MIMO branch is not entered.
        """
        config = self.config
        stream: tuple[Tensor, Tensor | None] = (x, None)
        fork = stream
        for index in range(config.trunk_layers if text else config.fork_layer + 1):
            stream = self.layers[index](*stream, attend, index)
            if index == config.fork_layer:
                fork = stream
        if audio:
            for index, layer in enumerate(self.mimo_layers, config.trunk_layers):
                fork = layer(*fork, attend, index)
        return Hidden(
            self.norm(*stream)[1] if text else None, self.mimo_norm(*fork)[1] if audio else None
        )

    def new_cache(
        self,
        places: int,
        positions: int,
        cache_dtype: torch.dtype | None = None,
        mimo: bool = True,
    ) -> KeyValueCache:
        """A key/value cache of ``places`` for requests of at most ``positions``.

        ``cache_dtype`` is the dtype of what is stored, None for the dtype of the model. Without
        ``mimo`` it has only the layers of the trunk, which is enough for text.
        """
        config = self.config
        return KeyValueCache(
            config.total_layers if mimo else config.trunk_layers,
            config.kv_heads,
            config.head_dim,
            places,
            positions,
            rope_theta=config.rope_theta,
            device=self.device,
            dtype=self.dtype,
            cache_dtype=cache_dtype,
        )

    def with_cut_heads(self) -> LanguageModel:
        """This model, sharing its weights, with each head cut to the rows of its own track.

        Text: the ids below ``token_offset``. Audio: those from ``base_tokens`` up, as a copy,
        so that the rest of the published matrix can be freed. If they are cut: this model itself.
        """
        if self.first_audio_id:
            return self
        with torch.device("meta"):
            cut = LanguageModel(self.config)
        for name, child in self.named_children():
            setattr(cut, name, child)
        cut.first_audio_id, cut.quantization = self.config.base_tokens, self.quantization
        cut.text_head = _head(self.text_head.weight[: self.config.token_offset])
        cut.audio_head = _head(self.audio_head.weight[cut.first_audio_id :].clone())
        return cut.eval()


def use_packed(model: LanguageModel) -> None:
    """Let a CPU read the matrices of ``model`` as they are quantized; the heads in 8 bits.

    In place, see :mod:`kimia_infer.layers.packed`. A model stays as it is on other devices, and
    if it is packed already, and unless its scheme is one of ``PACKED``.
    """
    if isinstance(model.text_head, PackedLinear) or not packs(model.quantization, model.device):
        return
    pack_layers(model.layers, model.mimo_layers)
    for name in ("text_head", "audio_head"):
        model.set_submodule(name, packed(model.get_submodule(name)))


def causal_attention(config: LanguageModelConfig) -> Attend:
    """Causal attention of sequences that begin at position 0, for one forward pass.

    The projections are [batch, length, rows]. Samples that are padded at their end need no
    mask: only padding sees padding.
    """
    tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def attend(qkv: Tensor, layer: int) -> Tensor:
        kind = (qkv.shape[1], qkv.device, qkv.dtype)
        if kind not in tables:
            tables[kind] = rotary_tables(config.head_dim, config.rope_theta, *kind)
        cos, sin = tables[kind]
        query, keys, values = split_heads(qkv, config.kv_heads, config.head_dim)
        query, keys = rotate(query, cos, sin), rotate(keys, cos, sin)
        if query.is_cpu:
            mixed = _causal_on_cpu(query, keys, values)
        else:
            mixed = F.scaled_dot_product_attention(
                query, keys, values, is_causal=True, enable_gqa=True
            )
        return mixed.transpose(1, 2).flatten(2)

    return attend


def _causal_on_cpu(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same in plain products, as the fused kernel's backward pass takes longer there.

    With samples of 80 positions a whole training step took 1.6 times as long with it.
    """
    batch, heads, length, _ = query.shape
    keys, values = (
        x.repeat_interleave(heads // x.shape[1], 1).flatten(0, 1) for x in (keys, values)
    )
    hidden = query.new_full((1, length, length), -torch.inf).triu(1)
    scale = 1 / math.sqrt(query.shape[-1])
    scores = torch.baddbmm(hidden, query.flatten(0, 1), keys.mT, alpha=scale)
    return torch.bmm(scores.softmax(-1), values).unflatten(0, (batch, heads))


def _head(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = nn.Parameter(weight, requires_grad=False)
    return head


def _layer_slots(stored: str, ours: str, config: LanguageModelConfig) -> list[Slot]:
    hidden, inner = config.hidden_size, config.intermediate_size
    key_rows = config.kv_heads * config.head_dim
    slots = []
    row = 0
    for name, rows in (("q", hidden), ("k", key_rows), ("v", key_rows)):
        span, source = (row, row + rows), f"{stored}.self_attn.{name}_proj"
        target = f"{ours}.attention.qkv"
        slots.append(Slot(f"{target}.weight", {f"{source}.weight": (rows, hidden)}, span))
        slots.append(Slot(f"{target}.bias", {f"{source}.bias": (rows,)}, span))
        row += rows
    for index, name in enumerate(("gate", "up")):
        span = (index * inner, (index + 1) * inner)
        source = {f"{stored}.mlp.{name}_proj.weight": (inner, hidden)}
        slots.append(Slot(f"{ours}.feed_forward.gate_up.weight", source, span))
    single = {
        "attention.output": ("self_attn.o_proj", (hidden, hidden)),
        "feed_forward.down": ("mlp.down_proj", (hidden, inner)),
        "attention_norm": ("input_layernorm", (hidden,)),
        "feed_forward_norm": ("post_attention_layernorm", (hidden,)),
    }
    for target, (source, shape) in single.items():
        slots.append(Slot(f"{ours}.{target}.weight", {f"{stored}.{source}.weight": shape}))
    return slots


def language_model_slots(config: LanguageModelConfig) -> list[Slot]:
    """Every learned tensor of the published checkpoint (419 at full size) and its place."""
    hidden, vocabulary = config.hidden_size, (config.vocab_size, config.hidden_size)
    single = {
        "embedding.weight": ("model.embed_tokens.weight", vocabulary),
        "norm.weight": ("model.norm.weight", (hidden,)),
        "mimo_norm.weight": ("model.mimo_norm.weight", (hidden,)),
        "text_head.weight": ("lm_head.weight", vocabulary),
        "audio_head.weight": ("mimo_output.weight", vocabulary),
        "adaptor.input.weight": (
            "model.vq_adaptor.layers.0.weight",
            (hidden, config.adaptor_input_dim),
        ),
        "adaptor.input.bias": ("model.vq_adaptor.layers.0.bias", (hidden,)),
        "adaptor.output.weight": ("model.vq_adaptor.layers.3.weight", (hidden, hidden)),
        "adaptor.output.bias": ("model.vq_adaptor.layers.3.bias", (hidden,)),
        "adaptor.norm.weight": ("model.vq_adaptor.layers.4.weight", (hidden,)),
        "adaptor.norm.bias": ("model.vq_adaptor.layers.4.bias", (hidden,)),
    }
    slots = [Slot(target, {source: shape}) for target, (source, shape) in single.items()]
    for index in range(config.trunk_layers):
        slots += _layer_slots(f"model.layers.{index}", f"layers.{index}", config)
    for index in range(config.mimo_layers):
        slots += _layer_slots(f"model.mimo_layers.{index}", f"mimo_layers.{index}", config)
    return slots


def language_model_component(directory: Path, quantized: bool = False) -> Component[LanguageModel]:
    """The language model of a checkpoint directory.

    Fine-tuned checkpoints also hold the Whisper encoder under ``whisper_model.``; serving
    reads it from its own folder. ``quantized`` says whether weights that were quantized when
    the checkpoint was prepared are of use. Raises CheckpointError where they are not.
    """
    config = LanguageModelConfig.from_directory(directory)
    scheme = stored_scheme(directory)
    if scheme != "none" and not quantized:
        raise CheckpointError(
            f"{directory}: the weights are quantized ({scheme}), and can only be served; use the "
            "checkpoint that they were made from"
        )
    store = open_directory(directory)
    if scheme == "none" and any(name.endswith("_proj.weight_scale") for name in store.tensors):
        raise CheckpointError(
            f"{directory}: quantized weights need the {MANIFEST_NAME} that they were written with; "
            "put it there, or prepare them again from the unquantized checkpoint"
        )
    return Component(
        name="language model",
        build=stored_build(lambda: LanguageModel(config), scheme),
        slots=stored_slots(language_model_slots(config), scheme),
        store=store,
        ignored=("*.self_attn.rotary_emb.inv_freq", "whisper_model.*"),
    )
