"""What a model needs in memory, and how many requests at a time fit, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kimia_infer.api.parameters import BUDGETS, MAX_SLOTS
from kimia_infer.engine.decode import PIECE, recorded_batches
from kimia_infer.layers.attention import KV_CACHES, check_kv_cache
from kimia_infer.layers.packed import PackedLinear
from kimia_infer.layers.quantization import SCHEMES, check_quantization, stored_build
from kimia_infer.models.kimi_audio.config import POSITIONS, LanguageModelConfig
from kimia_infer.models.kimi_audio.detokenizer import recorded_rows
from kimia_infer.models.kimi_audio.dit import DiT
from kimia_infer.models.kimi_audio.encoders import BATCH_SEGMENTS, SpeechTokenizer
from kimia_infer.models.kimi_audio.flow import CONDITIONED, StreamConfig
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.models.kimi_audio.vocoder import Vocoder
from kimia_infer.utils.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

GB = 10**9
RESERVE = 1 * GB
"""Bytes on each device for recorded graphs, workspaces of libraries and fragmentation of the
allocator."""

LONGEST, CONVERSATION = max(BUDGETS.values()), BUDGETS["both"]
"""Positions of the longest request, and of the longest one with speech."""

HOST_SLOTS = 8
"""Requests at a time by default where the language model is in the memory of the host."""

STREAMS = 6
"""Tensors [positions, hidden_size] that are alive in a feed-forward: the residual stream and what
is added to it, at the fork and below, its norm and the result."""

EMBEDDINGS = 5
"""Tensors [positions, hidden_size] that are alive while a prompt is embedded."""

DRAWING = 47
"""Bytes for each id of a row while one is drawn from the whole vocabulary: penalized logits,
float32 weights, the same in order with their int64 ids, and float64 sums."""

SHARED = ("cpu", "mps")
"""Devices that use the memory of the host, whose free size is not checked."""


@dataclass(frozen=True)
class Capacity:
    """How many requests run at a time, and how many positions of keys and values they share."""

    slots: int
    positions: int


DEFAULT_CAPACITY = Capacity(HOST_SLOTS, HOST_SLOTS * LONGEST)


@dataclass(frozen=True)
class SpeechSizes:
    """Bytes of what hears and speaks, which may be on a device of its own.

    ``encoders`` are the weights of each encoder and ``encoding`` what the larger one works with.
    The others are 0 without speech: ``detokenizer`` are the weights of DiT and vocoder, ``past``
    is the frames that a stream has seen, ``row`` what chunks that are computed together need each,
    and ``conditioning`` what they need together.
    """

    encoders: tuple[int, ...]
    encoding: int
    detokenizer: int = 0
    past: int = 0
    row: int = 0
    conditioning: int = 0

    @classmethod
    def of(
        cls,
        speech_tokenizer: SpeechTokenizer,
        whisper: WhisperEncoder,
        dit: DiT | None = None,
        vocoder: Vocoder | None = None,
    ) -> SpeechSizes:
        """Of modules in the dtype in which they are served; they need no values."""
        encoding = 0
        for module, config in (
            (speech_tokenizer, speech_tokenizer.config.encoder),
            (whisper, whisper.config),
        ):
            row = 2 * config.encoder_ffn_dim + 4 * config.d_model  # the widest place of a layer
            values = BATCH_SEGMENTS * POSITIONS * row
            encoding = max(encoding, values * module.conv1.weight.dtype.itemsize)
        encoders = weight_bytes(speech_tokenizer), weight_bytes(whisper)
        if dit is None or vocoder is None:
            return cls(encoders, encoding)
        speech, config, size = StreamConfig(), dit.config, dit.dtype.itemsize
        frame = 2 * config.depth * config.hidden_size * size
        modulation = 6 * config.hidden_size * size  # of a code in a layer
        return cls(
            encoders,
            encoding,
            weight_bytes(dit) + weight_bytes(vocoder),
            speech.cache_frames * frame,
            speech.recorded_frames * frame + speech.largest_chunk_codes * config.depth * modulation,
            CONDITIONED * (config.depth + 3) * modulation,  # 3: what a layer's is made from
        )

    def speaking(self, slots: int) -> tuple[int, int]:
        """What ``slots`` streams keep, and what synthesis works with.

        A stream may have a reference voice, to which it goes back: a second past.
        """
        rows = recorded_rows(slots)[-1]
        return slots * 2 * self.past + rows * self.row, rows * self.past + self.conditioning


@dataclass(frozen=True)
class MemoryPlan:
    """What is to be loaded, and where.

    The language model, keys and values are on ``device``, all of ``sizes`` is on
    ``speech_device``, which may be the same. With ``offload`` one encoder at a time is there, and
    none while a prompt is read. ``stored`` is how the weights of the checkpoint are quantized,
    which is how they are loaded.
    """

    config: LanguageModelConfig
    dtype: torch.dtype
    kv_cache: str
    sizes: SpeechSizes
    device: torch.device
    speech_device: torch.device
    offload: bool = False
    stored: str = "none"

    def needed(self, scheme: str, speech: bool, slots: int = 1) -> dict[torch.device, int]:
        """Bytes on each device for ``slots`` requests at a time, RESERVE included.

        Every slot can hold a conversation, and the longest request fits.
        """
        sizes = self.sizes
        model = language_model_bytes(self.config, scheme, self.dtype)
        model += least_positions(slots) * self.position_bytes(speech)
        model += self.choosing_bytes(slots)
        kept, synthesis = sizes.speaking(slots) if speech else (0, 0)
        kept += sizes.detokenizer if speech else 0
        kept += 0 if self.offload else sum(sizes.encoders)
        encoding = sizes.encoding + (max(sizes.encoders) if self.offload else 0)
        reading = self.reading_bytes(scheme)
        # The stages of a single request follow one another.
        together = max if slots == 1 else sum
        if self.speech_device == self.device:
            work = together([synthesis, max(encoding, reading)])
            return {self.device: model + kept + work + RESERVE}
        return {
            self.device: model + reading + RESERVE,
            self.speech_device: kept + together([synthesis, encoding]) + RESERVE,
        }

    def position_bytes(self, speech: bool) -> int:
        """Bytes of keys and values per position; the MIMO layers are for speech only."""
        config, stored = self.config, KV_CACHES[self.kv_cache] or self.dtype
        layers = config.total_layers if speech else config.trunk_layers
        return 2 * layers * config.kv_heads * config.head_dim * stored.itemsize

    def choosing_bytes(self, slots: int) -> int:
        """Bytes of the logits of both tracks, one row being a prompt's, and to choose ids."""
        rows = recorded_batches(slots)[-1]
        return ((rows + 1) * 2 * self.dtype.itemsize + rows * DRAWING) * self.config.vocab_size

    def reading_bytes(self, scheme: str) -> int:
        """Bytes to embed the longest prompt with its features, or to read a piece of it.

        Of a piece, the largest feed-forward: gate and up joined, their product, and the input.
        """
        config, size = self.config, self.dtype.itemsize
        embedded = LONGEST * config.hidden_size
        embedding = EMBEDDINGS * embedded + LONGEST * config.adaptor_input_dim
        row = 4 * config.intermediate_size + STREAMS * config.hidden_size
        matrix = 0
        if scheme != "none":  # gate and up in the working dtype; int4 is unpacked to bytes first
            values = 2 * config.intermediate_size * config.hidden_size
            matrix = values * (size + (scheme == "int4"))
        return max(embedding * size, (embedded + PIECE * row) * size + matrix)

    def capacity(
        self, scheme: str, speech: bool, free: Mapping[torch.device, int], slots: int | None = None
    ) -> Capacity | None:
        """What fits in the ``free`` bytes of devices; others are not limited.

        None if ``slots`` do not fit, or not even one where that is None. The positions fill what
        is left, up to the longest request in every slot.
        """
        left = free.get(self.device)
        most = HOST_SLOTS if left is None else MAX_SLOTS
        for count in range(most, 0, -1) if slots is None else [slots]:
            needed = self.needed(scheme, speech, count)
            if _lacking(needed, free) is not None:
                continue
            positions = count * LONGEST
            if left is not None:
                spare = (left - needed[self.device]) // self.position_bytes(speech)
                positions = min(positions, least_positions(count) + spare)
            return Capacity(count, positions)
        return None

    def check(
        self, scheme: str, speech: bool, free: Mapping[torch.device, int], slots: int | None = None
    ) -> Capacity:
        """:meth:`capacity`; raises ConfigurationError, naming what would fit, if nothing does."""
        found = self.capacity(scheme, speech, free, slots)
        if found is not None:
            return found
        if slots is not None and (fitting := self.capacity(scheme, speech, free)) is not None:
            raise ConfigurationError(
                f"slots: {self._shortage(scheme, speech, free, slots)}, for {slots} requests at "
                f"a time; {fitting.slots} fit"
            )
        others = " or ".join(self._alternatives(scheme, speech, free))
        raise ConfigurationError(
            f"memory: {self._shortage(scheme, speech, free)}; "
            f"{f'use {others}' if others else 'nothing smaller fits'}"
        )

    def _shortage(
        self, scheme: str, speech: bool, free: Mapping[torch.device, int], slots: int = 1
    ) -> str:
        needed = self.needed(scheme, speech, slots)
        device = _lacking(needed, free)
        assert device is not None, "what is free is not enough"
        return (
            f"{self._described(scheme, speech)} needs {needed[device] / GB:.1f} GB on {device}, "
            f"where {free[device] / GB:.1f} GB are free"
        )

    def _alternatives(
        self, scheme: str, speech: bool, free: Mapping[torch.device, int]
    ) -> list[str]:
        """What would fit: with speech if asked for, else without.

        A second device comes first, as it costs no quality. Then the stored quantization, then a
        narrow cache, then offloading, then both.
        """
        schemes = [
            scheme
            for scheme in SCHEMES
            if _possible(check_quantization, scheme, self.device)
            and _possible(language_model, self.config, scheme)
        ]
        narrow = ["fp8"] if _possible(check_kv_cache, "fp8", self.device) else []
        given = product(
            (True, False) if speech else (False,),
            [schemes] if self.stored == "none" else [[self.stored], schemes],
            [
                replace(self, offload=off, kv_cache=cache)
                for off in (False, True)
                for cache in (self.kv_cache, *narrow)
            ],
        )
        found = list(self._on_two_devices(dict.fromkeys([scheme, *schemes]), speech, free))[:1]
        for spoken, loaded, plan in given:
            fitting = [
                f"{plan._described(scheme, spoken)} ({_sum(plan.needed(scheme, spoken))})"
                for scheme in loaded
                if plan.capacity(scheme, spoken, free, slots=1) is not None
            ]
            if fitting:
                return found + fitting
        return found

    def _on_two_devices(
        self, schemes: Iterable[str], speech: bool, free: Mapping[torch.device, int]
    ) -> Iterator[str]:
        if self.speech_device != self.device:
            return
        others = free_memory(other_devices(self.device))
        for scheme, other in product(schemes, others):
            plan = replace(self, speech_device=other)
            if plan.capacity(scheme, speech, {**free, **others}, slots=1) is not None:
                needed = _sum(plan.needed(scheme, speech))
                yield f"{plan._described(scheme, speech)} ({needed})"

    def _described(self, scheme: str, speech: bool) -> str:
        words = [f"quantization {scheme!r}"]
        if self.stored not in ("none", scheme):
            words.append("of the checkpoint that this one was made from")
        if self.kv_cache != "none":
            words.append(f"and kv_cache {self.kv_cache!r}")
        if self.offload:
            words.append("and offload 'encoders'")
        if self.speech_device != self.device:
            words.append(f"and speech_device '{self.speech_device}'")
        alone = "text alone (load_detokenizer=False, in a service KIMI_AUDIO_OUTPUT=text)"
        return " ".join([*words, "with", "text and speech" if speech else alone])


def least_positions(slots: int) -> int:
    """Positions for the longest request, and for a conversation in each of ``slots``."""
    return max(LONGEST, slots * CONVERSATION)


def language_model(config: LanguageModelConfig, scheme: str) -> LanguageModel:
    """The model quantized with ``scheme``, without values."""
    with torch.device("meta"):
        return stored_build(lambda: LanguageModel(config), scheme)()


@cache
def language_model_bytes(config: LanguageModelConfig, scheme: str, dtype: torch.dtype) -> int:
    """Bytes of the weights of :func:`language_model` served in ``dtype``."""
    return weight_bytes(language_model(config, scheme), dtype)


def weight_bytes(module: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of what ``module`` reads, served in ``dtype``, which replaces float32 only."""
    packed = (layer for layer in module.modules() if isinstance(layer, PackedLinear))
    return sum(layer.bytes for layer in packed) + sum(
        p.numel() * (dtype if p.dtype is torch.float32 else p.dtype).itemsize
        for p in module.parameters()
    )


def free_memory(devices: Iterable[torch.device]) -> dict[torch.device, int]:
    """Free bytes of each device that does not use the memory of the host."""
    found = {}
    for device in devices:
        if device.type not in SHARED:
            torch.accelerator.empty_cache()  # of a model that was loaded before
            found[device] = torch.accelerator.get_memory_info(device)[0]
    return found


def other_devices(device: torch.device) -> list[torch.device]:
    """The accelerators besides ``device``."""
    if device.type in SHARED:
        return []
    count = torch.accelerator.device_count()
    return [torch.device(device.type, i) for i in range(count) if i != device.index]


def check_slots(value: int) -> None:
    """Raise ConfigurationError unless so many requests can run at a time."""
    if type(value) is not int or not 1 <= value <= MAX_SLOTS:
        raise ConfigurationError(f"slots: expected 1 to {MAX_SLOTS}, found {value!r}")


def _lacking(
    needed: Mapping[torch.device, int], free: Mapping[torch.device, int]
) -> torch.device | None:
    """The first device without room for what is needed on it."""
    return next((d for d, size in needed.items() if size > free.get(d, math.inf)), None)


def _sum(needed: Mapping[torch.device, int]) -> str:
    """``21.4 GB``, or ``21.4 GB and 8.3 GB`` on two devices."""
    return " and ".join(f"{size / GB:.1f} GB" for size in needed.values())


def _possible(check: Callable[..., object], *given: Any) -> bool:
    try:
        check(*given)
    except ConfigurationError:
        return False
    return True
