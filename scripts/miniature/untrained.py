"""Write an untrained miniature: the whole architecture at a few MB, in the published layout.

Every value follows from the seed, the tensor's name and its shape through exact arithmetic,
so a seed gives the same bytes on every machine. The tensors are those of the components' slots,
the configuration files have the published fields.
"""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from kimia_infer.models.kimi_audio.checkpoint import (
    DETOKENIZER_FOLDER,
    SPEECH_TOKENIZER_FOLDER,
    VOCODER_FOLDER,
    WHISPER_FOLDER,
)
from kimia_infer.models.kimi_audio.config import DiTConfig, LanguageModelConfig, VocoderConfig
from kimia_infer.models.kimi_audio.dit import dit_slots
from kimia_infer.models.kimi_audio.language_model import language_model_slots
from kimia_infer.models.kimi_audio.speech_tokenizer import (
    SpeechTokenizerConfig,
    speech_tokenizer_slots,
)
from kimia_infer.models.kimi_audio.text_tokenizer import SpecialTokens, special_names
from kimia_infer.models.kimi_audio.vocoder import vocoder_slots
from kimia_infer.models.kimi_audio.whisper import (
    FRAMES_PER_CODE,
    LOG_MEL,
    encoder_config,
    whisper_slots,
)
from kimia_infer.training.tasks import detokenizer, speech_tokenizer, vocoder
from kimia_infer.training.tasks.config import (
    DiTSize,
    EncoderSize,
    GeneratorSize,
    TokenizerTrainingConfig,
    VocoderTrainingConfig,
)
from kimia_infer.weights.component import Slot, expected_tensors
from scripts.miniature import whisper_encoder
from scripts.miniature.whisper_encoder import WhisperSize, WhisperTrainingConfig

CORPUS = """
Please write down what you hear. Please transcribe the spoken content into written text.
What does the person say? Is the speaker a man or a woman? Which sounds are in this recording?
Can you describe the audio? Please answer the question. How do you feel today? I am happy, sad,
angry, calm. Hello, good morning, good evening, thank you, goodbye. Yes, no, maybe, of course.
The train leaves the station at nine. The bus stops at the market. The small red house stands by
the old bridge. A blue bird sings in the green garden. One, two, three, four, five, six, seven,
eight, nine, ten, eleven, twelve. Where is the key? The key lies under the black chair. Turn on
the light in the kitchen. Open the window and close the door. Call my brother at seven tonight.
It rains in the morning and the sun shines in the afternoon. Music, speech, noise, silence,
laughter, a dog barks, a bell rings, a car passes. I heard that you said: what time is it?
"""


SEED = 7
"""Greedy answers of this model usually end within a few seconds."""

NO_RUN = {"data": "", "output": ""}
"""For settings that only describe a component."""

QUERY_GAIN = 6.0
"""Makes untrained attention selective; otherwise greedy answers only repeat."""

END_GAIN = 1.5
"""Gain of the end tokens in the untrained heads."""

QUIET_GAIN = 0.1
"""Weight-norm gain of the vocoder's residual branches and output, so that nothing is clipped."""


WHISPER = WhisperSize(width=64, feed_forward=128)
SPEECH = EncoderSize(width=64, codes=256)
DIT = DiTSize(width=96, depth=3)
VOCODER = GeneratorSize(channels=64)


@dataclass(frozen=True)
class Sizes:
    """Every size of the miniature that can be chosen."""

    merges: int = 256
    hidden: int = 128
    feed_forward: int = 256
    trunk_layers: int = 6
    fork_layer: int = 3
    mimo_layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    whisper: WhisperSize = WHISPER
    speech: EncoderSize = SPEECH
    dit: DiTSize = DIT
    vocoder: GeneratorSize = VOCODER

    @property
    def base_tokens(self) -> int:
        return 256 + self.merges

    @property
    def token_offset(self) -> int:
        """First id of a speech code."""
        return self.base_tokens + len(special_names())


def write_miniature(
    directory: Path, seed: int = SEED, sizes: Sizes | None = None, corpus: str = CORPUS
) -> None:
    """Write a complete checkpoint to ``directory``, replacing files of the same names.

    The text tokenizer is trained on ``corpus``.
    """
    sizes = sizes or Sizes()
    writer = _Writer(directory, seed)
    _write_text_tokenizer(writer, sizes, corpus)
    _write_language_model(writer, sizes)
    _write_whisper(writer, sizes)
    _write_speech_tokenizer(writer, sizes)
    _write_detokenizer(writer, sizes)
    _write_vocoder(writer, sizes)


class _Writer:
    """Writes configuration files and seeded tensors to one directory."""

    def __init__(self, directory: Path, seed: int):
        self.directory = directory
        self.seed = seed

    def text(self, name: str, content: str) -> None:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")

    def json(self, name: str, values: dict) -> None:
        self.text(name, json.dumps(values, indent=1) + "\n")

    def tensors(
        self,
        name: str,
        slots: Iterable[Slot],
        dtype: torch.dtype,
        prefix: str = "",
        scaled_rows: dict[str, Tensor] | None = None,
    ) -> None:
        """Save the tensors of ``slots``, under ``prefix`` + their names.

        ``scaled_rows`` multiplies the rows of a tensor by the given factors [rows].
        """
        tensors = {}
        for source, shape in expected_tensors(slots).items():
            value = initial_value(prefix + source, shape, self.seed)
            if scaled_rows and source in scaled_rows:
                value = value * scaled_rows[source][:, None]
            tensors[prefix + source] = value.to(dtype)
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # the library makes it readable by its owner only


def initial_value(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """An untrained float32 tensor that keeps activations near 1 in size.

    Norm weights are one, biases and the log-scale parameters of the activations zero, tables
    have unit variance, all other tensors the variance 1 / fan-in. Weight-norm gains are the
    expected norm of their directions.
    """
    *parts, leaf = name.split(".")
    if leaf in ("bias", "alpha", "beta"):
        return torch.zeros(shape)
    if leaf == "weight_g":
        return torch.full(shape, QUIET_GAIN if {"convs2", "conv_post"} & set(parts) else 1.0)
    if len(shape) == 1:
        return torch.ones(shape)
    if any(part.startswith(("embed_", "codebook", "semantic_")) for part in parts):
        return _uniform(name, shape, seed, 1.0)
    gain = QUERY_GAIN if "q_proj" in parts and "encoder" not in parts else 1.0
    return _uniform(name, shape, seed, gain / math.sqrt(math.prod(shape[1:])))


def _uniform(name: str, shape: tuple[int, ...], seed: int, deviation: float) -> Tensor:
    """Uniform values of the given standard deviation, from the raw bits of PCG64."""
    bits = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(math.prod(shape))
    steps = (bits >> np.uint64(40)).astype(np.float64) / 2**23 - 1.0  # exact: 24 bits
    values = (steps * (deviation * math.sqrt(3.0))).astype(np.float32)
    return torch.from_numpy(values.reshape(shape))


def ranks_of(corpus: str, merges: int) -> str:
    """The lines of ``tiktoken.model``: all bytes, then the tokens of ``merges`` merges."""
    tokens = byte_order() + train_merges(corpus, merges)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    return "".join(lines)


def train_merges(text: str, count: int) -> list[bytes]:
    """Byte pair encoding: the tokens of ``count`` merges of the most frequent neighbors."""
    pieces = Counter(re.findall(r" ?[A-Za-z]+| ?[^\sA-Za-z]+", text))
    words = {tuple(bytes([b]) for b in piece.encode()): n for piece, n in pieces.items()}
    merged: list[bytes] = []
    while len(merged) < count:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        words = {_merge(word, best): times for word, times in words.items()}
        if best[0] + best[1] not in merged:
            merged.append(best[0] + best[1])
    return merged


def _merge(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    result: list[bytes] = []
    for token in word:
        if result and (result[-1], token) == pair:
            result[-1] += token
        else:
            result.append(token)
    return tuple(result)


def byte_order() -> list[bytes]:
    """The 256 bytes in the order of their published ranks: printable ones first, from "!"."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [bytes([byte]) for byte in printable + others]


def _write_text_tokenizer(writer: _Writer, sizes: Sizes, corpus: str) -> None:
    writer.text("tiktoken.model", ranks_of(corpus, sizes.merges))
    names = special_names()
    roles = {"bos_token": "[BOS]", "eos_token": "[EOS]"}
    roles |= {"pad_token": names[-1], "unk_token": names[-2]}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {
        str(sizes.base_tokens + position): {"content": name, **flags, "special": True}
        for position, name in enumerate(names)
    }
    writer.json("special_tokens_map.json", {"additional_special_tokens": names, **roles})
    writer.json(
        "tokenizer_config.json",
        {
            "added_tokens_decoder": added,
            "additional_special_tokens": names,
            **roles,
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "TikTokenTokenizer",
        },
    )


def _language_model_values(sizes: Sizes, special: SpecialTokens) -> dict:
    """The published fields of ``config.json``."""
    return {
        "architectures": ["MoonshotKimiaForCausalLM"],
        "model_type": "qwen2",
        "bos_token_id": sizes.base_tokens,
        "eos_token_ids": [sizes.base_tokens + 1, special.msg_end],
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.feed_forward,
        "kimia_adaptor_input_dim": FRAMES_PER_CODE * sizes.whisper.width,
        "kimia_audio_output_vocab": 512 + sizes.speech.codes,
        "kimia_media_begin": special.media_begin,
        "kimia_media_end": special.media_end,
        "kimia_mimo_audiodelaytokens": 6,
        "kimia_mimo_layers": sizes.mimo_layers,
        "kimia_mimo_transformer_from_layer_index": sizes.fork_layer,
        "kimia_text_output_vocab": sizes.token_offset,
        "kimia_token_offset": sizes.token_offset,
        "max_position_embeddings": 8192,
        "num_attention_heads": sizes.heads,
        "num_audio_special_tokens": 512,
        "num_base_tokens": sizes.base_tokens,
        "num_hidden_layers": sizes.trunk_layers,
        "num_key_value_heads": sizes.kv_heads,
        "pad_token_id": special.pad,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_whisper_feature": True,
        "vocab_size": sizes.token_offset + sizes.speech.codes,
    }


def _write_language_model(writer: _Writer, sizes: Sizes) -> None:
    special = SpecialTokens.after(sizes.base_tokens)
    values = _language_model_values(sizes, special)
    writer.json("config.json", values)
    writer.json(
        "generation_config.json",
        {
            "bos_token_id": sizes.base_tokens,
            "eos_token_id": special.msg_end,
            "pad_token_id": special.pad,
        },
    )
    # Otherwise untrained heads mostly choose ids that their track cannot use.
    rows = {name: torch.full((values["vocab_size"],), 0.25) for name in ("lm_head", "mimo_output")}
    rows["lm_head"][256 : sizes.base_tokens] = 1.0
    rows["lm_head"][special.text_eos] = END_GAIN
    rows["mimo_output"][sizes.token_offset :] = 1.0
    rows["mimo_output"][[special.msg_end, special.media_end]] = END_GAIN
    writer.tensors(
        "model.safetensors",
        language_model_slots(LanguageModelConfig.from_dict(values)),
        torch.bfloat16,
        scaled_rows={f"{name}.weight": factors for name, factors in rows.items()},
    )


def _preprocessor_values() -> dict:
    fields = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 128}
    lengths = {"n_samples": 480000, "nb_max_frames": 3000, "return_attention_mask": False}
    settings = {name: value for name, value in LOG_MEL.items() if name != "dither"}
    return {**fields, **settings, **lengths}


def _write_whisper(writer: _Writer, sizes: Sizes) -> None:
    folder = WHISPER_FOLDER
    values = whisper_encoder.new_config(WhisperTrainingConfig(**NO_RUN, size=sizes.whisper))
    writer.json(f"{folder}/config.json", values)
    writer.json(f"{folder}/preprocessor_config.json", _preprocessor_values())
    slots = whisper_slots(encoder_config(values, writer.directory / folder))
    writer.tensors(f"{folder}/model.safetensors", slots, torch.float16, "model.encoder.")


def _write_speech_tokenizer(writer: _Writer, sizes: Sizes) -> None:
    folder = SPEECH_TOKENIZER_FOLDER
    values = speech_tokenizer.new_config(TokenizerTrainingConfig(**NO_RUN, size=sizes.speech))
    # As published, the configuration describes the encoder that the layers were taken from.
    values["encoder_layers"] = 2 * sizes.speech.layers
    writer.json(f"{folder}/config.json", values)
    writer.json(f"{folder}/preprocessor_config.json", _preprocessor_values())
    config = SpeechTokenizerConfig.from_json(values, writer.directory / folder)
    slots = speech_tokenizer_slots(config)
    writer.tensors(f"{folder}/model.safetensors", slots, torch.float32)


def _write_detokenizer(writer: _Writer, sizes: Sizes) -> None:
    dit = detokenizer.dit_values(sizes.dit, sizes.speech.codes, sizes.vocoder.mel_bins)
    values = {
        "mel_mean": -4.479605,
        "mel_std": 3.4584913,
        "normalize_mel": True,
        "model": {"dit": dit},
    }
    writer.text(f"{DETOKENIZER_FOLDER}/config.yaml", yaml.safe_dump(values))
    slots = dit_slots(DiTConfig.from_dict(values))
    name = f"{DETOKENIZER_FOLDER}/model.safetensors"
    writer.tensors(name, slots, torch.float16, "speech_model.")


def _write_vocoder(writer: _Writer, sizes: Sizes) -> None:
    values = vocoder.new_config(VocoderTrainingConfig(**NO_RUN, size=sizes.vocoder))
    writer.json(f"{VOCODER_FOLDER}/config.json", values)
    slots = vocoder_slots(VocoderConfig.from_dict(values))
    writer.tensors(f"{VOCODER_FOLDER}/model.safetensors", slots, torch.float16)
