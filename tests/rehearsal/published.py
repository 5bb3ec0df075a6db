"""The published size: a checkpoint directory that takes no space, as its tensors are holes; and a
question to the model loaded from it. Without ``--long`` there are fewer layers of that size, whose
operations are the same."""

from __future__ import annotations

import base64
import copy
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml
from torch import Tensor

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.loading import Components
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.checkpoint import (
    DETOKENIZER_FOLDER,
    SPEECH_TOKENIZER_FOLDER,
    VOCODER_FOLDER,
    WHISPER_FOLDER,
)
from kimia_infer.models.kimi_audio.components import speech_tokenizer_slots, whisper_slots
from kimia_infer.models.kimi_audio.config import (
    DiTConfig,
    LanguageModelConfig,
    SpeechTokenizerConfig,
    VocoderConfig,
    encoder_config,
)
from kimia_infer.models.kimi_audio.dit import dit_slots
from kimia_infer.models.kimi_audio.language_model import language_model_slots
from kimia_infer.models.kimi_audio.prompt import EncodedMessage
from kimia_infer.models.kimi_audio.vocoder import vocoder_slots
from kimia_infer.weights.component import Slot, expected_tensors
from scripts.benchmark.sizes import FIELDS, encoder_fields
from tests.rehearsal.fake_cuda import Call, FakeCuda

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

SECONDS = 20
WAVE = np.zeros(SECONDS * 16_000, dtype=np.float32)
CODES = SECONDS * 25 // 2
SAMPLED = {
    "output_type": "both",
    "audio_temperature": 0.8,
    "audio_top_k": 0,
    "text_temperature": 0.5,
    "audio_repetition_penalty": 1.1,
    "text_repetition_penalty": 1.1,
}


@dataclass
class Loaded:
    """A model with speech, as it is served by default, and the most memory that loading took."""

    components: Components
    model: KimiAudio
    peak: int


class NoFeatures:
    """In place of the feature extractor, whose spectrograms come from the host."""

    padding_seconds = None

    def __call__(
        self, given: np.ndarray | Sequence[np.ndarray], **asked: object
    ) -> SimpleNamespace:
        waves = [given] if isinstance(given, np.ndarray) else given
        frames = 3000
        if asked.get("padding") == "longest":
            frames = -(-max(len(wave) for wave in waves) // 1280) * 8
        return SimpleNamespace(
            input_features=torch.zeros(len(waves), 128, frames),
            attention_mask=torch.ones(len(waves), frames, dtype=torch.int32),
        )


def answer(card: FakeCuda, model: KimiAudio, features: Tensor, steps: int = 20) -> list[Call]:
    """A spoken question read and answered for a few steps; the operations of it."""
    with card.active() as ledger, ledger.calls() as calls:
        output = "text" if model.detokenizer is None else "both"
        question = EncodedMessage("user", "audio", codes=[0] * CODES)
        prompt = model.prompt_builder.build([question], output)
        asked = SAMPLED | {"output_type": output, "max_new_tokens": steps}
        parameters = parse_parameters(**asked)
        generation = model.generation(prompt, features, parameters, SeededRandomness(1))
        assert [progress.finished for progress in generation.run()][-1]
    return calls


FEW_LAYERS = {
    "num_hidden_layers": 6,
    "kimia_mimo_layers": 2,
    "kimia_mimo_transformer_from_layer_index": 3,
}


def fields_of(long: bool) -> dict[str, dict]:
    """The published configuration files by component; unless ``long`` with few layers."""
    if long:
        return FIELDS
    speech_tokenizer, whisper = encoder_fields(1280, 20, 8, 16384)
    language_model, dit = FIELDS["language_model"] | FEW_LAYERS, copy.deepcopy(FIELDS["dit"])
    dit["model"]["dit"]["depth"] = 6
    few = {"language_model": language_model, "dit": dit}
    return FIELDS | few | {"speech_tokenizer": speech_tokenizer, "whisper": whisper}


def write_checkpoint(directory: Path, fields: dict[str, dict]) -> None:
    """Every file that loading reads, with complete headers and without values."""
    exact, language_model = torch.float32, LanguageModelConfig.from_dict(fields["language_model"])
    speech_tokenizer = SpeechTokenizerConfig.from_json(fields["speech_tokenizer"], directory)
    _write_ranks(directory / "tiktoken.model", language_model.base_tokens)
    for folder, name in (
        ("", "language_model"),
        (WHISPER_FOLDER, "whisper"),
        (SPEECH_TOKENIZER_FOLDER, "speech_tokenizer"),
        (VOCODER_FOLDER, "vocoder"),
    ):
        _write(directory / folder / "config.json", json.dumps(fields[name]))
    # What only reference voices read: the analysis that the vocoder was trained with.
    voice = {"n_fft": 1920, "win_size": 1920, "fmin": 0, "fmax": 12000}
    _write(directory / VOCODER_FOLDER / "config.json", json.dumps(fields["vocoder"] | voice))
    _write(directory / DETOKENIZER_FOLDER / "config.yaml", yaml.safe_dump(fields["dit"]))
    whisper = encoder_config(fields["whisper"], directory)
    for folder, slots, dtype, prefix in (
        ("", language_model_slots(language_model), torch.bfloat16, ""),
        (WHISPER_FOLDER, whisper_slots(whisper), torch.float16, "model.encoder."),
        (SPEECH_TOKENIZER_FOLDER, speech_tokenizer_slots(speech_tokenizer), exact, ""),
        (DETOKENIZER_FOLDER, dit_slots(DiTConfig.from_dict(fields["dit"])), exact, "speech_model."),
        (VOCODER_FOLDER, vocoder_slots(VocoderConfig.from_dict(fields["vocoder"])), exact, ""),
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
