"""Peak memory of a training step, counted without weights and without a GPU.

A real forward and backward pass runs on tensors that have shapes but no values; live tensors are
counted at every operation. Not counted: the CUDA context, workspaces of libraries and what the
caching allocator cannot reuse; together one to two GiB.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from kimia_infer.models.kimi_audio.config import POSITIONS
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.training.adapters import lora_config
from kimia_infer.training.config import ADAPTED, AdapterConfig, Trainable
from kimia_infer.training.dataset import Batch
from kimia_infer.training.model_files import plan_training, trained_parameters
from kimia_infer.training.network import TrainingNetwork
from scripts.benchmark.sizes import Sizes

QUANTIZED_BITS = 4.5  # per value, scales included
CODES = POSITIONS // 4
"""Codes of the audio in every sample: 30 s, the longest that is encoded in one piece."""


@dataclass(frozen=True)
class Plan:
    """A training step: ``method`` as in the settings, samples in a batch, positions of each.

    Half of the positions of each sample are learned in both tracks.
    """

    method: str
    batch_size: int
    length: int
    recompute: bool = True
    parts: tuple[Trainable, ...] = ADAPTED
    rank: int = 8


@dataclass(frozen=True)
class Memory:
    """Bytes of all weights, of the optimizer's state, and of the peak."""

    weights: int
    optimizer: int
    peak: int


def count_memory(plan: Plan, sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> Memory:
    """The memory of a step of ``plan`` with a model of ``sizes``."""
    with torch.device("meta"):
        model, whisper = LanguageModel(sizes.language_model), WhisperEncoder(sizes.whisper)
        network = TrainingNetwork(model, whisper, dtype)
    adapters = None
    if plan.method != "full":
        adapters = lora_config(AdapterConfig(rank=plan.rank), plan.parts, "")
    quantized = plan_training(network, plan.parts, adapters, plan.recompute, plan.method == "qlora")
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu")
        for owner in list(network.modules()):
            for name, layer in list(owner.named_children()):
                if any(layer is other for other in quantized.values()):
                    setattr(owner, name, _Quantized(layer, dtype))
        return measure(network, make_batch(plan, sizes))


class _Quantized(nn.Module):
    """Replaces a 4-bit matrix, which cannot be created without values, with the same size."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.shape, self.dtype = (layer.out_features, layer.in_features), dtype
        self.bias = layer.bias
        stored = torch.empty(int(math.prod(self.shape) * QUANTIZED_BITS / 8), dtype=torch.uint8)
        self.weight = nn.Parameter(stored, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.shape, self.dtype, self.bias)


class _Product(torch.autograd.Function):
    """The dequantized matrix exists temporarily, in the forward and the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, shape: tuple, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        ctx.shape = shape
        return F.linear(x.to(dtype), torch.empty(shape, dtype=dtype), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # pyrefly: ignore[bad-override]
        return gradient @ torch.empty(ctx.shape, dtype=gradient.dtype), None, None, None


def make_batch(plan: Plan, sizes: Sizes) -> Batch:
    """Samples of ``plan`` with one recording each."""
    shape = (plan.batch_size, plan.length)
    ids = torch.zeros(shape, dtype=torch.int64)
    heard, learned = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    count = min(CODES, plan.length // 2)
    heard[:, :count] = True
    learned[:, plan.length // 2 :] = True
    shape = sizes.whisper.num_mel_bins, 2 * POSITIONS
    return Batch(
        audio_ids=ids,
        text_ids=ids,
        is_continuous=heard,
        audio_labels=ids,
        text_labels=ids,
        audio_loss_mask=learned,
        text_loss_mask=learned,
        weights=torch.ones(plan.batch_size),
        mel=[torch.zeros(shape) for _ in range(plan.batch_size)],
        segment_codes=[count] * plan.batch_size,
        names=[],
    )


def measure(network: TrainingNetwork, batch: Batch) -> Memory:
    """Two passes over ``batch``; the first one's gradients are freed before the second."""
    learned = batch.audio_ids.numel() // 2
    counts = {
        batch.is_continuous: sum(batch.segment_codes),
        batch.audio_loss_mask: learned,
        batch.text_loss_mask: learned,
    }
    trained = trained_parameters(network).values()
    state = [torch.zeros_like(parameter) for parameter in trained for _ in range(2)]
    weights = list(network.parameters())
    network.train()
    network.whisper.eval()  # it has no dropout, but would draw a number to drop layers by
    with PeakMemory(counts) as peak:
        peak.see([*weights, *state, *tree_leaves(vars(batch))])
        for _ in range(2):
            losses = network(batch)
            (losses["audio"] + losses["text"]).sum().backward()
            peak.see([p.grad for p in trained])
            for parameter in trained:
                parameter.grad = None
    step = 4 * _bytes(trained) + _bytes(weights)  # gradients, state, one more copy
    return Memory(_bytes(weights), _bytes(state), max(peak.most, step))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all live storages.

    Tensors without values do not know how many elements of a mask are true; ``counts`` tells.
    """

    def __init__(self, counts: Mapping[Tensor, int]):
        super().__init__()
        self.counts = {mask.untyped_storage()._cdata: count for mask, count in counts.items()}
        self.alive: dict[int, weakref.ref] = {}
        self.now = self.most = 0

    def see(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.most = max(self.most, self.now)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        known = self.alive.get(key)
        if known is not None and known() is storage:
            return

        def freed(reference: weakref.ref) -> None:
            self.now -= size

        self.alive[key] = weakref.ref(storage, freed)
        self.now += size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = self._masked(func, args)
        if out is None:
            out = func(*args, **(kwargs or {}))
        self.see(tree_leaves(out))
        return out

    def _masked(self, function: Any, arguments: tuple) -> Tensor | None:
        """The result of an operation whose shape depends on the values of a mask."""
        if function is torch.ops.aten.nonzero.default and isinstance(arguments[0], FakeTensor):
            (mask,) = arguments
            return mask.new_zeros((self._true(mask), mask.ndim), dtype=torch.int64)
        if function is torch.ops.aten.index.Tensor:
            values, (mask, *rest) = arguments
            if isinstance(mask, FakeTensor) and mask.dtype == torch.bool and not rest:
                return values.new_zeros((self._true(mask), *values.shape[mask.ndim :]))
        return None

    def _true(self, mask: Tensor) -> int:
        return self.counts[mask.untyped_storage()._cdata]
