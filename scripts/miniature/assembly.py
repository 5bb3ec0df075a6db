"""Checkpoints of the miniature: the one its language model is trained from, and the final one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from kimia_infer.models.kimi_audio.checkpoint import (
    DETOKENIZER_FOLDER,
    SPEECH_TOKENIZER_FOLDER,
    VOCODER_FOLDER,
    WHISPER_FOLDER,
)
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.encoders import PADDING_FIELD
from kimia_infer.models.kimi_audio.language_model import language_model_slots
from kimia_infer.models.kimi_audio.text_tokenizer import special_names
from kimia_infer.training.tasks.config import EncoderSize
from kimia_infer.utils.files import replacing_directory
from kimia_infer.weights.component import expected_tensors, read_json
from scripts.miniature.spoken_world import READ, REPEAT, TRANSCRIBE
from scripts.miniature.untrained import Sizes, save_tensors, write_json, write_miniature
from scripts.miniature.whisper import size_of
from scripts.miniature.world.whole import vocabulary

SEED = 1

MERGES = 1280
"""Merges of the text tokenizer, with which every word of the world is one token."""

PADDING_SECONDS = 3
"""Silence after a recording for the Whisper encoder, which takes a question a fifth of the time of
30 s. The frames of ``scripts/question.wav``, 2 s of speech, differ in 10 % of their variance."""

ROWS_OF_TOKENS = ("model.embed_tokens.weight", "lm_head.weight", "mimo_output.weight")

EMBEDDING_SCALE = 0.3
"""Standard deviation of untrained embeddings, and gain of the adapted features added to them."""


def write_base(
    target: Path, speech_tokenizer: Path, whisper: Path, start: Path | None = None
) -> None:
    """Write a complete checkpoint with trained encoders and a language model to train.

    ``speech_tokenizer`` and ``whisper`` are the folders of the trained encoders. The language model
    is untrained, but for what ``start``, a miniature, knows: tensors of the same shape, and the
    rows of tokens that both have. Speech codes are others, so their rows are untrained.
    """
    speech = EncoderSize(codes=read_json(speech_tokenizer / "config.json")["quantize_vocab_size"])
    features = size_of(read_json(whisper / "config.json"))
    sizes = Sizes(
        merges=MERGES, hidden=192, feed_forward=384, heads=6, speech=speech, whisper=features
    )
    write_miniature(target, SEED, sizes, corpus())
    _put(speech_tokenizer, target / SPEECH_TOKENIZER_FOLDER)
    _put(whisper, target / WHISPER_FOLDER)
    _halve(target / WHISPER_FOLDER / "model.safetensors")
    preprocessor = target / WHISPER_FOLDER / "preprocessor_config.json"
    write_json(preprocessor, read_json(preprocessor) | {PADDING_FIELD: PADDING_SECONDS})
    tensors = untrained_language_model(LanguageModelConfig.from_directory(target))
    if start is not None:
        tensors |= _known(start, target, tensors)
    save_tensors(target / "model.safetensors", tensors, torch.bfloat16)


def _known(start: Path, target: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``start`` as far as they fit those for ``target``."""
    trained = load_file(start / "model.safetensors")
    before, after = _token_ids(start), _token_ids(target)
    both = sorted(before.keys() & after.keys())
    old, new = ([ids[token] for token in both] for ids in (before, after))
    for name in ROWS_OF_TOKENS:
        rows = tensors[name].clone()
        rows[new] = trained[name][old].to(rows.dtype)
        trained[name] = rows
    return {name: t for name, t in trained.items() if t.shape == tensors[name].shape}


def _token_ids(folder: Path) -> dict[str, int]:
    """The ids of all text tokens, in base64, and of all special ones by their names."""
    lines = (folder / "tiktoken.model").read_text("utf-8").splitlines()
    ids = {token: int(rank) for token, rank in (line.split() for line in lines)}
    return ids | {name: len(ids) + place for place, name in enumerate(special_names())}


def corpus() -> str:
    """Training text of the tokenizer: every word, at the beginning of a line and after a space."""
    words = vocabulary()
    repeated = (f"{word} {word} {word}" for word in words)
    return "\n".join([*words, *repeated, *TRANSCRIBE, REPEAT, READ])


def untrained_language_model(config: LanguageModelConfig) -> dict[str, Tensor]:
    """Initial values for training, by published names.

    Normal with standard deviation 1 / sqrt(fan-in), smaller for projections into the residual
    stream; norms are one and biases zero.
    """
    generator = torch.Generator().manual_seed(SEED)
    depth = 1 / math.sqrt(2 * (config.trunk_layers + config.mimo_layers))
    tensors = {}
    for name, shape in sorted(expected_tensors(language_model_slots(config)).items()):
        if len(shape) == 1:
            gain = EMBEDDING_SCALE if "vq_adaptor" in name else 1.0
            tensors[name] = torch.zeros(shape) if name.endswith("bias") else torch.full(shape, gain)
            continue
        scale = 1 / math.sqrt(shape[1])
        if "embed_tokens" in name:
            scale = EMBEDDING_SCALE
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            scale *= depth
        tensors[name] = scale * torch.randn(shape, generator=generator)
    return tensors


def assemble(language_model: Path, detokenizer: Path, vocoder: Path, target: Path) -> None:
    """Write the final checkpoint to ``target``.

    ``language_model`` is the complete checkpoint that its training wrote; ``detokenizer`` and
    ``vocoder`` are the folders of these components, which are stored in half precision.
    """
    with replacing_directory(target) as folder:
        _put(language_model, folder)
        (folder / "README.md").unlink(missing_ok=True)  # describes the language model alone
        for source, name in ((detokenizer, DETOKENIZER_FOLDER), (vocoder, VOCODER_FOLDER)):
            _put(source, folder / name)
            _halve(folder / name / "model.safetensors")


def _put(source: Path, target: Path) -> None:
    """Copy the files of a trained component over untrained ones; other files stay."""
    shutil.copytree(source, target, dirs_exist_ok=True)


def _halve(path: Path) -> None:
    """Store weights in half precision."""
    save_tensors(path, load_file(path), torch.float16)
