"""Every defect of a checkpoint is one error that names file and tensor, before any is loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.utils.errors import CheckpointError, WeightsError


@pytest.fixture
def checkpoint(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the recorded checkpoint to damage; loading any part of it fails the test."""

    def load(*_: object) -> None:
        pytest.fail("weights were loaded from a bad checkpoint")

    monkeypatch.setattr("kimia_infer.api.loading.load_modules", load)
    return Path(shutil.copytree(golden / "e2e" / "checkpoint", tmp_path / "checkpoint"))


def refusal(checkpoint: Path) -> str:
    with pytest.raises((CheckpointError, WeightsError)) as error:
        KimiAudio(str(checkpoint), device="cpu")
    return str(error.value)


def safetensors_of(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.rglob("*.safetensors"))


def needed_tensor(path: Path) -> str:
    """The last tensor of a file that loading asks for."""
    unused = ("inv_freq", "decoder.", "ema_", "embed_positions2")
    return max(name for name in load_file(path) if not any(word in name for word in unused))


def test_missing_files(checkpoint: Path) -> None:
    for path in [*safetensors_of(checkpoint), *checkpoint.rglob("*.pt")]:
        aside = path.rename(path.with_suffix(".aside"))
        assert str(path.relative_to(checkpoint)) in refusal(checkpoint)
        aside.rename(path)


@pytest.mark.parametrize("defect", ["missing", "shape", "dtype"])
def test_bad_tensors_in_every_safetensors_file(checkpoint: Path, defect: str) -> None:
    for path in safetensors_of(checkpoint):
        tensors, name = load_file(path), needed_tensor(path)
        changed = dict(tensors)
        value = changed.pop(name)
        if defect == "shape":
            changed[name] = value.new_zeros(*value.shape[:-1], value.shape[-1] + 1)
        if defect == "dtype":
            changed[name] = value.to(torch.int32)
        save_file(changed, path)
        message = refusal(checkpoint)
        short = name.removeprefix("model.encoder.")
        assert str(path.parent if defect == "missing" else path) in message
        assert short in message
        save_file(tensors, path)


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999])
def test_truncated_safetensors(checkpoint: Path, keep: float) -> None:
    for path in safetensors_of(checkpoint):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])
        message = refusal(checkpoint)
        assert str(path) in message
        assert "truncated" in message
        if keep > 0.4:
            assert any(name in message for name in _header(content))
        path.write_bytes(content)


def _header(content: bytes) -> list[str]:
    length = int.from_bytes(content[:8], "little")
    return list(json.loads(content[8 : 8 + length]))


class _Trap:
    """What a hostile pickle does when it is opened carelessly."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("folder", ["audio_detokenizer", "vocoder"])
def test_pickles(checkpoint: Path, folder: str, tmp_path: Path) -> None:
    path = checkpoint / folder / "model.pt"
    content = torch.load(path, weights_only=True)
    section = "state_dict" if folder == "audio_detokenizer" else "generator"
    name = next(n for n, t in content[section].items() if t.ndim > 1 and "filter" not in n)
    marker = tmp_path / "code-ran"
    good = content[section][name]
    for damaged in (
        {n: t for n, t in content[section].items() if n != name},
        content[section] | {name: good[..., :-1].clone()},
    ):
        torch.save(content | {section: damaged}, path)
        message = refusal(checkpoint)
        assert str(path) in message
        assert name.removeprefix("speech_model.") in message
    torch.save(content | {"extra": _Trap(marker)}, path)
    assert str(path) in refusal(checkpoint)
    assert not marker.exists()
    torch.save(content, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert str(path) in refusal(checkpoint)


def test_tokenizer_of_another_checkpoint(checkpoint: Path) -> None:
    lines = (checkpoint / "tiktoken.model").read_text().splitlines(keepends=True)
    (checkpoint / "tiktoken.model").write_text("".join(lines[:-1]))
    (checkpoint / "tokenizer_config.json").unlink()
    message = refusal(checkpoint)
    assert "tiktoken.model" in message
    assert "num_base_tokens" in message


def test_a_detokenizer_that_lacks_codes(checkpoint: Path) -> None:
    folder = checkpoint / "audio_detokenizer"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["dit"]["semantic_vocab_size"] -= 1
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    content = torch.load(folder / "model.pt", weights_only=True)
    state = content["state_dict"]
    name = next(n for n in state if n.endswith("semantic_token_embedding.weight"))
    state[name] = state[name][:-1].clone()
    torch.save(content, folder / "model.pt")
    message = refusal(checkpoint)
    assert "semantic_vocab_size" in message and "speech codes" in message
