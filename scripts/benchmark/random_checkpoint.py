"""A checkpoint with random weights, packed for a CPU: what it costs to load and run is measured."""

from __future__ import annotations

import base64
import itertools
import json
import math
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kimia_infer.layers.quantization import Storage, description
from kimia_infer.models.kimi_audio.checkpoint import (
    DETOKENIZER_FOLDER,
    SPEECH_TOKENIZER_FOLDER,
    VOCODER_FOLDER,
    WHISPER_FOLDER,
)
from kimia_infer.models.kimi_audio.components import (
    StoredComponent,
    StoredComponents,
    speech_tokenizer_slots,
    whisper_slots,
)
from kimia_infer.models.kimi_audio.dit import DiT, dit_slots
from kimia_infer.models.kimi_audio.encoders import SpeechTokenizer
from kimia_infer.models.kimi_audio.language_model import LanguageModel, language_model_slots
from kimia_infer.models.kimi_audio.packing import packed_component
from kimia_infer.models.kimi_audio.slim import SHARD_BYTES, plan_files, with_packed_parts
from kimia_infer.models.kimi_audio.vocoder import Vocoder, vocoder_slots
from kimia_infer.weights.component import Component, Slot
from kimia_infer.weights.layout import UNFINISHED_NAME
from kimia_infer.weights.manifest import CheckpointManifest
from kimia_infer.weights.tensors import Reader, StoredTensor, TensorStore
from kimia_infer.weights.writing import NewFile, SmallFile, require_usable, write_checkpoint
from scripts.benchmark.sizes import FIELDS, PUBLISHED

NOISE = 2**22
"""Random values, of which all matrices are made, each part beginning at another of them."""

SENTENCE = 12
"""One token in so many ends a sentence."""


class RandomStore(TensorStore):
    """Random bfloat16 tensors for ``slots``, of variance 1 / fan-in; norms are 1, biases 0."""

    def __init__(self, slots: Iterable[Slot]):
        source = Path("random weights")
        shapes = {name: shape for slot in slots for name, shape in slot.sources.items()}
        super().__init__(
            {
                name: StoredTensor(source, name, shape, torch.bfloat16, 0)
                for name, shape in shapes.items()
            },
            source,
        )
        self.noise = torch.randn(2 * NOISE, generator=torch.Generator().manual_seed(0))

    def blocks(self, name: str, buffer: Tensor) -> Iterator[Tensor]:
        stored = self.tensors[name]
        shape, count = stored.shape, math.prod(stored.shape)
        if len(shape) < 2:
            yield torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16)
            return
        deviation = (shape[0] / count) ** 0.5
        scaled = (self.noise * deviation).bfloat16()
        starts = random.Random(zlib.crc32(name.encode()))
        width = count // shape[0]
        rows = max(1, NOISE // width)
        for first in range(0, shape[0], rows):
            size = min(rows, shape[0] - first) * width
            start = starts.randrange(len(scaled) - size) if size < len(scaled) else 0
            yield scaled[start : start + size]


def random_stored_components() -> StoredComponents:
    """All components at the published size, of random stores."""
    sizes = PUBLISHED
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    def component(name: str, build: Callable[[], Any], slots: list[Slot]) -> Component:
        return Component(name, build, slots, RandomStore(slots))

    config = sizes.language_model
    tokenizer, whisper = sizes.speech_tokenizer, sizes.whisper
    return StoredComponents(
        StoredComponent(
            component(
                "speech tokenizer",
                lambda: SpeechTokenizer(tokenizer),
                speech_tokenizer_slots(tokenizer),
            ),
            SPEECH_TOKENIZER_FOLDER,
            exact=True,
        ),
        StoredComponent(
            component("Whisper encoder", lambda: WhisperEncoder(whisper), whisper_slots(whisper)),
            WHISPER_FOLDER,
            "model.encoder.",
        ),
        StoredComponent(
            component(
                "language model",
                lambda: LanguageModel(config),
                language_model_slots(config),
            ),
            "",
        ),
        StoredComponent(
            component("detokenizer", lambda: DiT(sizes.dit), dit_slots(sizes.dit)),
            DETOKENIZER_FOLDER,
            "speech_model.",
        ),
        StoredComponent(
            component(
                "vocoder",
                lambda: Vocoder(sizes.vocoder),
                vocoder_slots(sizes.vocoder, folded=True),
            ),
            VOCODER_FOLDER,
        ),
    )


def write_random_checkpoint(target: Path, scheme: str) -> None:
    """Write a checkpoint of the published size, packed for a CPU; one that is complete is kept.

    Tokens are words of no language, so that an answer can be spoken.
    """
    if (target / "manifest.json").is_file() and not (target / UNFINISHED_NAME).exists():
        return
    require_usable(Path("random weights"), target)
    stored = random_stored_components()
    packed = packed_component(stored.language_model.component, scheme)
    stored = with_packed_parts(stored.changed(language_model=packed))
    stored = stored.changed(**{n: _random_codes(part.component) for n, part in stored.items()})
    planned = CheckpointManifest(
        "served", SHARD_BYTES, {}, {}, {}, quantization=description(scheme), packed=True
    )
    files = _small_files() | plan_files(stored, "served", SHARD_BYTES, packed=True)
    write_checkpoint(target, planned, files, Reader(), lambda: None)


def _random_codes(component: Component) -> Component:
    """``component`` whose quantized matrices are not quantized, but random codes from the start."""

    def slot_of(slot: Slot) -> Slot:
        if slot.quantize is None:
            return slot
        assert isinstance(slot.quantize, partial)
        storage = slot.quantize.keywords["storage"]
        return replace(slot, quantize=partial(_codes, storage=storage))

    return replace(component, slots=[slot_of(slot) for slot in component.slots])


def _codes(weight: Tensor, storage: Storage) -> dict[str, Tensor]:
    rows, columns = weight.shape
    stored = storage.empty(rows, columns, device=weight.device)
    if weight.is_meta:
        return stored
    bits = 8 // storage.packed
    part = torch.randint(0, 256, (min(rows, 64), columns // storage.packed), dtype=torch.uint8)
    for first in range(0, rows, len(part)):
        span = stored["weight"][first : first + len(part)]
        span.copy_(part[: len(span)].view(span.dtype))
    spread = 2**bits / math.sqrt(12)  # the deviation of what is equally likely
    stored["scale"].fill_(columns**-0.5 / spread)
    return stored


def _small_files() -> dict[str, NewFile]:
    """Configurations and the text tokenizer."""
    contents = {
        "config.json": FIELDS["language_model"],
        f"{SPEECH_TOKENIZER_FOLDER}/config.json": FIELDS["speech_tokenizer"],
        f"{WHISPER_FOLDER}/config.json": FIELDS["whisper"],
        f"{DETOKENIZER_FOLDER}/config.yaml": FIELDS["dit"],  # JSON is YAML
        f"{VOCODER_FOLDER}/config.json": FIELDS["vocoder"],
    }
    files: dict[str, NewFile] = {
        name: SmallFile(json.dumps(values, indent=1).encode()) for name, values in contents.items()
    }
    return files | {"tiktoken.model": SmallFile(_vocabulary(PUBLISHED.language_model.base_tokens))}


def _vocabulary(tokens: int) -> bytes:
    """All bytes, then words of three syllables, of which one in SENTENCE ends with a full stop."""
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
    words = ("".join(parts) for parts in itertools.product(syllables, repeat=3))
    pieces = [bytes([value]) for value in range(256)]
    for number, word in enumerate(itertools.islice(words, tokens - len(pieces))):
        pieces.append(f" {word}{'.' * (number % SENTENCE == 0)}".encode())
    lines = (f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(pieces))
    return ("\n".join(lines) + "\n").encode()
