"""A checkpoint as the published one comes: shards, pickles, and much that is never served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CARD = ("README.md", "figures.json", "spectrograms.png")
"""What describes the miniature and is no part of it."""

SHARDS = ("model-1-of-2.safetensors", "model-2-of-2.safetensors", "model-36-of-36.safetensors")


def write_bloated(miniature: Path, directory: Path) -> Path:
    """``miniature`` with the same weights, sharded and pickled, and with what training left."""
    shutil.copytree(miniature, directory, ignore=shutil.ignore_patterns(*CARD))
    _shard(directory)
    _widen(directory / "whisper-large-v3", "model.decoder.layers.0.fc1.weight")
    _widen(directory / "glm-4-voice-tokenizer", "ema_weight", "embed_positions2.weight")
    dit = _pickle(directory / "audio_detokenizer")
    moments = [{"exp_avg": value.clone()} for value in dit.values()]
    extra = {"optimizer_states": moments, "epoch": 3, "global_step": 9}
    torch.save({"state_dict": dit, **extra}, directory / "audio_detokenizer" / "model.pt")
    vocoder = _pickle(directory / "vocoder")
    vocoder["activation_post.upsample.filter"] = torch.ones(1, 1, 12)
    torch.save({"generator": vocoder}, directory / "vocoder" / "model.pt")
    return directory


def _shard(directory: Path) -> None:
    whole = directory / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    layers = {name.partition(".self_attn")[0] for name in tensors if ".self_attn." in name}
    tensors |= {f"{layer}.self_attn.rotary_emb.inv_freq": torch.ones(16) for layer in layers}
    weight_map = {name: SHARDS[index % 3] for index, name in enumerate(sorted(tensors))}
    for shard in SHARDS:
        names = [name for name in tensors if weight_map[name] == shard]
        save_file({name: tensors[name] for name in names}, directory / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _widen(folder: Path, *names: str) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(64, 64) for name in names}, path)


def _pickle(folder: Path) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    tensors = {name: value.float() for name, value in load_file(path).items()}
    path.unlink()
    return tensors
