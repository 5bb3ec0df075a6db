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
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kimia_infer.models.kimi_audio.checkpoint import (
    DETOKENIZER_FOLDER,
    SPEECH_TOKENIZER_FOLDER,
    VOCODER_FOLDER,
    WHISPER_FOLDER,
)
from kimia_infer.models.kimi_audio.components import speech_tokenizer_slots, whisper_slots
from kimia_infer.models.kimi_audio.config import (
    FRAMES_PER_CODE,
    DiTConfig,
    LanguageModelConfig,
    SpeechTokenizerConfig,
    VocoderConfig,
    encoder_config,
)
from kimia_infer.models.kimi_audio.dit import dit_slots
from kimia_infer.models.kimi_audio.encoders import LOG_MEL, SEGMENT_SAMPLES
from kimia_infer.models.kimi_audio.language_model import language_model_slots
from kimia_infer.models.kimi_audio.text_tokenizer import SpecialTokens, special_names
from kimia_infer.models.kimi_audio.vocoder import vocoder_slots
from kimia_infer.training.tasks.config import (
    DiTSize,
    EncoderSize,
    GeneratorSize,
    TokenizerTrainingConfig,
    VocoderTrainingConfig,
)
from kimia_infer.training.tasks.detokenizer import dit_values
from kimia_infer.training.tasks.speech_tokenizer import new_config as new_tokenizer_config
from kimia_infer.training.tasks.vocoder import new_config as new_vocoder_config
from kimia_infer.utils.files import write_text
from kimia_infer.weights.component import Slot, expected_tensors
from scripts.miniature.whisper import MELS, WhisperSize
from scripts.miniature.whisper import new_config as new_whisper_config

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

MEL_STATISTICS = {"mel_mean": -4.479605, "mel_std": 3.4584913, "normalize_mel": True}

PREPROCESSOR = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": MELS,
    **{name: value for name, value in LOG_MEL.items() if name != "dither"},
    "n_samples": SEGMENT_SAMPLES,
    "nb_max_frames": 3000,
    "return_attention_mask": False,
}
"""Spectrograms of both audio encoders, as published."""


class Sizes(NamedTuple):
    """Every size of the miniature that can be chosen."""

    merges: int = 256
    hidden: int = 128
    feed_forward: int = 256
    trunk_layers: int = 6
    fork_layer: int = 3
    mimo_layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    whisper: WhisperSize = WhisperSize(width=64, feed_forward=128)
    speech: EncoderSize = EncoderSize(width=64, codes=256)
    dit: DiTSize = DiTSize(width=96, depth=3)
    vocoder: GeneratorSize = GeneratorSize(channels=64)

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
    _write_text_tokenizer(directory, sizes, corpus)
    _write_language_model(directory, seed, sizes)

    folder = directory / WHISPER_FOLDER
    values = new_whisper_config(sizes.whisper)
    write_json(folder / "config.json", values)
    preprocessor = PREPROCESSOR | {"feature_size": sizes.whisper.mels}
    write_json(folder / "preprocessor_config.json", preprocessor)
    slots = whisper_slots(encoder_config(values, folder))
    _write_tensors(folder, seed, slots, torch.float16, "model.encoder.")

    folder = directory / SPEECH_TOKENIZER_FOLDER
    values = new_tokenizer_config(TokenizerTrainingConfig(**NO_RUN, size=sizes.speech))
    # As published, the configuration describes the encoder that the layers were taken from.
    values["encoder_layers"] = 2 * sizes.speech.layers
    write_json(folder / "config.json", values)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    slots = speech_tokenizer_slots(SpeechTokenizerConfig.from_json(values, folder))
    _write_tensors(folder, seed, slots, torch.float32)

    folder = directory / DETOKENIZER_FOLDER
    dit = dit_values(sizes.dit, sizes.speech.codes, sizes.vocoder.mel_bins)
    values = {**MEL_STATISTICS, "model": {"dit": dit}}
    write_text(folder / "config.yaml", yaml.safe_dump(values))
    slots = dit_slots(DiTConfig.from_dict(values))
    _write_tensors(folder, seed, slots, torch.float16, "speech_model.")

    folder = directory / VOCODER_FOLDER
    values = new_vocoder_config(VocoderTrainingConfig(**NO_RUN, size=sizes.vocoder))
    write_json(folder / "config.json", values)
    _write_tensors(folder, seed, vocoder_slots(VocoderConfig.from_dict(values)), torch.float16)


def write_json(path: Path, values: dict) -> None:
    write_text(path, json.dumps(values, indent=1) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Replace a safetensors file."""
    path.unlink(missing_ok=True)  # it may be a link to the file of another folder
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(stored, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library makes it readable by its owner only


def _write_tensors(
    folder: Path,
    seed: int,
    slots: Iterable[Slot],
    dtype: torch.dtype,
    prefix: str = "",
    row_gains: Mapping[str, Tensor] | None = None,
) -> None:
    """Write untrained values for ``slots``, under ``prefix`` + their names.

    ``row_gains`` [rows] by name multiply the rows of a tensor.
    """
    tensors = {
        prefix + name: initial_value(prefix + name, shape, seed)
        for name, shape in expected_tensors(slots).items()
    }
    for name, gains in (row_gains or {}).items():
        tensors[name] *= gains[:, None]
    save_tensors(folder / "model.safetensors", tensors, dtype)


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
        deviation = 1.0
    else:
        gain = QUERY_GAIN if "q_proj" in parts and "encoder" not in parts else 1.0
        deviation = gain / math.sqrt(math.prod(shape[1:]))
    # Uniform values, from the raw bits of PCG64.
    bits = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(math.prod(shape))
    steps = (bits >> np.uint64(40)).astype(np.float64) / 2**23 - 1.0  # exact: 24 bits
    values = (steps * (deviation * math.sqrt(3.0))).astype(np.float32)
    return torch.from_numpy(values.reshape(shape))


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


def _write_text_tokenizer(directory: Path, sizes: Sizes, corpus: str) -> None:
    # The published ranks of bytes are those of GPT-2.
    tokens = [bytes([b]) for b in bytes_to_unicode()] + train_merges(corpus, sizes.merges)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    write_text(directory / "tiktoken.model", "".join(lines))
    names = special_names()
    special = {
        "additional_special_tokens": names,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": names[-1],
        "unk_token": names[-2],
    }
    write_json(directory / "special_tokens_map.json", special)
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {
        str(sizes.base_tokens + position): {"content": name, **flags, "special": True}
        for position, name in enumerate(names)
    }
    values = {"clean_up_tokenization_spaces": False, "tokenizer_class": "TikTokenTokenizer"}
    write_json(
        directory / "tokenizer_config.json", {"added_tokens_decoder": added, **special, **values}
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


def _write_language_model(directory: Path, seed: int, sizes: Sizes) -> None:
    special = SpecialTokens.after(sizes.base_tokens)
    values = _language_model_values(sizes, special)
    write_json(directory / "config.json", values)
    ids = {
        "bos_token_id": sizes.base_tokens,
        "eos_token_id": special.msg_end,
        "pad_token_id": special.pad,
    }
    write_json(directory / "generation_config.json", ids)
    # Otherwise untrained heads mostly choose ids that their track cannot use.
    text, audio = torch.full((2, values["vocab_size"]), 0.25)
    text[256 : sizes.base_tokens] = 1.0
    text[special.text_eos] = END_GAIN
    audio[sizes.token_offset :] = 1.0
    audio[[special.msg_end, special.media_end]] = END_GAIN
    gains = {"lm_head.weight": text, "mimo_output.weight": audio}
    slots = language_model_slots(LanguageModelConfig.from_dict(values))
    _write_tensors(directory, seed, slots, torch.bfloat16, row_gains=gains)
