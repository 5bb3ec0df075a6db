"""Checkpoints that are prepared for a CPU: the same model, mapped from their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.loading import Components, load_components
from kimia_infer.audio.files import load_audio
from kimia_infer.layers.packed import PackedLinear
from kimia_infer.models.kimi_audio.language_model import use_packed
from kimia_infer.models.kimi_audio.slim import prepare_weights
from kimia_infer.utils.errors import CheckpointError, ConfigurationError, WeightsError
from kimia_infer.weights.manifest import PACKED_FOLDER
from tests.command_line import run_here
from tests.layers.helpers import logits, miniature
from tests.paths import ROOT

MINI, QUESTION = ROOT / "weights" / "mini", ROOT / "scripts" / "question.wav"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "mini"
    assert run_here("prepare", MINI, target, "--for", "cpu") == 0
    return target


@pytest.fixture(scope="module")
def components(directory: Path) -> Components:
    return load_components(directory, True, CPU, torch.float32)


def test_the_language_model_is_that_packed_in_memory(components: Components) -> None:
    """Bit for bit, but for the embedding, which is stored in bfloat16."""
    expected = load_components(MINI, False, CPU, torch.float32, quantization="int4").language_model
    rounded = expected.embedding.weight.bfloat16().float()
    expected.embedding.weight = torch.nn.Parameter(rounded, requires_grad=False)
    expected = expected.with_cut_heads()
    use_packed(expected)
    for name, value in expected.named_parameters():
        if name.endswith(("norm.weight", "bias")) or name.startswith("adaptor"):
            value.copy_(value.bfloat16())
    prompt = miniature()[1]
    found = components.language_model
    for ours, theirs in zip(logits(found, prompt), logits(expected, prompt), strict=True):
        assert torch.equal(ours, theirs)
    assert found.with_cut_heads() is found


def test_encoders_hear_nearly_the_same(components: Components) -> None:
    whole = load_components(MINI, False, CPU, torch.float32)
    wave = load_audio(QUESTION)
    found, expected = (c.whisper.encode(wave) for c in (components, whole))
    assert (found - expected).norm() < 0.06 * expected.norm()
    codes = [c.speech_tokenizer.encode(wave) for c in (components, whole)]
    assert (codes[0] == codes[1]).float().mean() > 0.9


def test_an_answer_has_the_same_words(directory: Path) -> None:
    ours, plain = (
        KimiAudio(str(path), device="cpu", dtype="float32") for path in (directory, MINI)
    )
    assert (ours.quantization, ours.head_rows, plain.head_rows) == ("int4", "track", "full")
    chat = [{"role": "user", "message_type": "audio", "content": str(QUESTION)}]
    (wave, text), (_, expected) = (
        model.generate(chat, output_type="both", max_new_tokens=30) for model in (ours, plain)
    )
    assert text == expected and wave is not None and wave.isfinite().all()


def test_matrices_are_pages_of_their_files(directory: Path, components: Components) -> None:
    """So that a second process has the same ones; nothing of them was copied."""
    networks = components.language_model, components.whisper.module
    assert all(any(isinstance(m, PackedLinear) for m in n.modules()) for n in networks)
    assert not isinstance(components.language_model.text_head, torch.nn.Linear)
    own: dict[str, int] = {}
    name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split(maxsplit=5)
        if not first.endswith(":"):
            name = rest[-1] if len(rest) == 5 else ""
        elif first == "Anonymous:" and name.startswith(str(directory)):
            own[name] = own.get(name, 0) + int(rest[0])
    files = {str(path) for path in (directory / PACKED_FOLDER).iterdir()}
    assert files <= own.keys() and str(directory / "model.safetensors") in own
    assert not any(own.values())


def test_a_damaged_file_is_named(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in directory.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(directory)).parent.mkdir(exist_ok=True)
            (copy / path.relative_to(directory)).write_bytes(path.read_bytes())
    heads = copy / PACKED_FOLDER / "language_model.heads"
    size = heads.stat().st_size
    heads.write_bytes(np.zeros(size, np.uint8).tobytes())
    with pytest.raises(CheckpointError, match=f"{heads}: not a file of packed matrices"):
        load_components(copy, False, CPU, torch.float32)
    heads.write_bytes(b"")
    with pytest.raises(CheckpointError, match="0 bytes instead of"):
        load_components(copy, False, CPU, torch.float32)
    prepare_weights(MINI, copy, quantization="int4", packed=True)
    load_components(copy, False, CPU, torch.float32)


def test_text_alone_takes_no_detokenizer(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for path in MINI.iterdir():
        if path.name not in ("audio_detokenizer", "vocoder"):
            (source / path.name).symlink_to(path)
    assert run_here("prepare", source, target, "--for", "cpu", "--text-only") == 0
    names = {path.name for path in (target / PACKED_FOLDER).iterdir()}
    assert not (target / "vocoder" / "model.safetensors").exists()
    assert not any(name.startswith("dit") for name in names)
    assert load_components(target, False, CPU, torch.float32).detokenizer is None


def test_what_a_cpu_cannot_read_is_refused(directory: Path, tmp_path: Path) -> None:
    for scheme in ("none", "fp8"):
        with pytest.raises(ConfigurationError, match="a checkpoint for a CPU is int8 or int4"):
            prepare_weights(MINI, tmp_path / "new", quantization=scheme, packed=True)
    with pytest.raises(WeightsError, match="was begun with --for cpu"):
        prepare_weights(MINI, directory, quantization="int4")
    with pytest.raises(CheckpointError, match="can only be served"):
        prepare_weights(directory, tmp_path / "again")
