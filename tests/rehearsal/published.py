"""A checkpoint directory of the published size that takes no space: its tensors are holes."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable
from itertools import islice, product
from pathlib import Path

import torch
import yaml

from kimia_infer.models.kimi_audio.checkpoint import (
    DETOKENIZER_FOLDER,
    SPEECH_TOKENIZER_FOLDER,
    VOCODER_FOLDER,
    WHISPER_FOLDER,
)
from kimia_infer.models.kimi_audio.dit import dit_slots
from kimia_infer.models.kimi_audio.language_model import language_model_slots
from kimia_infer.models.kimi_audio.speech_tokenizer import speech_tokenizer_slots
from kimia_infer.models.kimi_audio.vocoder import vocoder_slots
from kimia_infer.models.kimi_audio.whisper import whisper_slots
from kimia_infer.weights.component import Slot, expected_tensors
from scripts.benchmark.sizes import FIELDS, PUBLISHED

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def write_checkpoint(directory: Path) -> None:
    """Every file that loading reads, with complete headers and without values."""
    sizes, exact = PUBLISHED, torch.float32
    _write_ranks(directory / "tiktoken.model", sizes.language_model.base_tokens)
    for folder, name in (
        ("", "language_model"),
        (WHISPER_FOLDER, "whisper"),
        (SPEECH_TOKENIZER_FOLDER, "speech_tokenizer"),
        (VOCODER_FOLDER, "vocoder"),
    ):
        _write(directory / folder / "config.json", json.dumps(FIELDS[name]))
    # What only reference voices read: the analysis that the vocoder was trained with.
    voice = {"n_fft": 1920, "win_size": 1920, "fmin": 0, "fmax": 12000}
    _write(directory / VOCODER_FOLDER / "config.json", json.dumps(FIELDS["vocoder"] | voice))
    _write(directory / DETOKENIZER_FOLDER / "config.yaml", yaml.safe_dump(FIELDS["dit"]))
    for folder, slots, dtype, prefix in (
        ("", language_model_slots(sizes.language_model), torch.bfloat16, ""),
        (WHISPER_FOLDER, whisper_slots(sizes.whisper), torch.float16, "model.encoder."),
        (SPEECH_TOKENIZER_FOLDER, speech_tokenizer_slots(sizes.speech_tokenizer), exact, ""),
        (DETOKENIZER_FOLDER, dit_slots(sizes.dit), exact, "speech_model."),
        (VOCODER_FOLDER, vocoder_slots(sizes.vocoder), exact, ""),
    ):
        _write_tensors(directory / folder / "model.safetensors", slots, dtype, prefix)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_ranks(path: Path, count: int) -> None:
    """A vocabulary of ``count`` distinct byte strings, the single bytes first."""
    tokens = (bytes(t) for length in (1, 2, 3) for t in product(range(256), repeat=length))
    lines = [
        f"{base64.b64encode(token).decode()} {rank}"
        for rank, token in enumerate(islice(tokens, count))
    ]
    _write(path, "\n".join(lines))


def _write_tensors(path: Path, slots: Iterable[Slot], dtype: torch.dtype, prefix: str) -> None:
    """A safetensors file whose header is complete and whose data is a hole in the file."""
    header, end = {}, 0
    for name, shape in expected_tensors(slots).items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        offsets = [start, end]
        header[prefix + name] = {
            "dtype": NAMES[dtype], "shape": list(shape), "data_offsets": offsets
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
