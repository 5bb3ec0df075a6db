"""Continuous features against recorded ones, and checkpoints that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kimia_infer.audio.files import load_audio
from kimia_infer.models.kimi_audio.components import whisper_component, whisper_slots
from kimia_infer.models.kimi_audio.encoders import (
    BATCH_SEGMENTS,
    SEGMENT_SAMPLES,
    WhisperFeatures,
    whisper_spectrograms,
)
from kimia_infer.utils.errors import CheckpointError
from kimia_infer.utils.graphs import Direct, Graphs
from tests.paths import GOLDEN
from tests.traced import FixedShapes, TracedGraphs

COMPONENT = GOLDEN / "whisper"
CHECKPOINT = GOLDEN / "e2e" / "checkpoint" / "whisper-large-v3"
META = json.loads((COMPONENT / "meta.json").read_text())
# asr_example.wav belongs to the published repository and is not among the recorded files.
NAMES = [name for name in META if (GOLDEN / "audio" / f"{name}.wav").is_file()]
REFERENCE = load_file(COMPONENT / "golden.safetensors")
FILES = json.loads((GOLDEN / "e2e" / "cases.json").read_text())["audio_files"]
FILE_FEATURES = load_file(GOLDEN / "e2e" / "cases.safetensors")
CPU = torch.device("cpu")
TOLERANCE = 1e-4


def load_features(directory: Path, dtype: torch.dtype = torch.float32) -> WhisperFeatures:
    return WhisperFeatures(whisper_component(directory).load(CPU, dtype), directory)


def recorded_wave(name: str) -> np.ndarray:
    return load_audio(GOLDEN / "audio" / f"{name}.wav")


@pytest.fixture(scope="module")
def features() -> WhisperFeatures:
    return load_features(COMPONENT)


@pytest.fixture(scope="module")
def checkpoint_features() -> WhisperFeatures:
    return load_features(CHECKPOINT)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_features(name: str, features: WhisperFeatures) -> None:
    encoded = features.encode(recorded_wave(name))
    torch.testing.assert_close(encoded, REFERENCE[f"{name}.features"], rtol=0, atol=TOLERANCE)


def test_recorded_features_with_recorded_graphs() -> None:
    graphs = TracedGraphs(CPU)
    encoder = whisper_component(COMPONENT).load(CPU, torch.float32)
    features = WhisperFeatures(encoder, COMPONENT, graphs)
    features.warm_up()
    for name in NAMES:
        encoded = features.encode(recorded_wave(name))
        torch.testing.assert_close(encoded, REFERENCE[f"{name}.features"], rtol=0, atol=TOLERANCE)
    assert graphs.recorded == 1 <= graphs.replayed


@pytest.mark.parametrize("graphs", [Direct(), FixedShapes(CPU)])
def test_sounds_encoded_together(graphs: Graphs, features: WhisperFeatures) -> None:
    together = WhisperFeatures(features.module, COMPONENT, graphs)
    batches = []
    hook = features.module.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    found = together.encode_all([recorded_wave(name) for name in NAMES])
    hook.remove()
    for name, encoded in zip(NAMES, found, strict=True):
        torch.testing.assert_close(encoded, REFERENCE[f"{name}.features"], rtol=0, atol=TOLERANCE)
    segments = sum(-(-META[name]["samples"] // SEGMENT_SAMPLES) for name in NAMES)
    assert sum(batches) == segments
    assert max(batches) == (min(BATCH_SEGMENTS, segments) if graphs.captures else 1)
    assert together.encode_all([]) == []


@pytest.mark.parametrize("name", FILES)
def test_recorded_features_of_the_checkpoint(
    name: str, checkpoint_features: WhisperFeatures
) -> None:
    encoded = checkpoint_features.encode(load_audio(GOLDEN / "e2e" / "audio" / name))
    assert list(encoded.shape) == FILES[name]["feature_shape"]
    stored = encoded[FILES[name]["feature_rows_stored"]]
    torch.testing.assert_close(stored, FILE_FEATURES[f"features.{name}"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("key", [key for key in REFERENCE if ".mel_" in key])
def test_recorded_spectrograms(key: str, features: WhisperFeatures) -> None:
    name, field = key.split(".")
    count = REFERENCE[key].shape[1]
    wave = recorded_wave(name)
    mel = features.extractor([wave], sampling_rate=16_000, return_tensors="pt").input_features[0]
    part = mel[:, :count] if "first" in field else mel[:, -count:]
    torch.testing.assert_close(part, REFERENCE[key], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("key", [key for key in REFERENCE if ".hidden." in key])
def test_recorded_hidden_states(key: str, features: WhisperFeatures) -> None:
    """What each layer gives: before the first, after each, the last one normalized."""
    wave, index = recorded_wave(key.split(".")[0]), int(key.split(".")[2].split("_")[0])
    layers = features.module.layers
    seen: list[torch.Tensor] = []
    hooks = [layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))]
    hooks += [layer.register_forward_hook(lambda *out: seen.append(out[2])) for layer in layers]
    hooks += [features.module.layer_norm.register_forward_hook(lambda *out: seen.append(out[2]))]
    features.encode(wave)
    for hook in hooks:
        hook.remove()
    del seen[-2]
    expected = REFERENCE[key]
    torch.testing.assert_close(seen[index][0, : len(expected)], expected, rtol=0, atol=TOLERANCE)


def test_bfloat16(checkpoint_features: WhisperFeatures) -> None:
    wave = load_audio(GOLDEN / "e2e" / "audio" / min(FILES))
    encoded = load_features(CHECKPOINT, torch.bfloat16).encode(torch.from_numpy(wave))
    exact = checkpoint_features.encode(wave)
    assert encoded.dtype == torch.bfloat16
    error = (encoded.float() - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.05


def test_attention_is_scaled_dot_product(features: WhisperFeatures) -> None:
    assert features.module.config._attn_implementation == "sdpa"


def test_only_parameters_and_only_slots(features: WhisperFeatures) -> None:
    """Nothing beside the slots is filled, so nothing else may carry state."""
    encoder = features.module
    assert not dict(encoder.named_buffers())
    names = [slot.parameter for slot in whisper_slots(encoder.config)]
    assert sorted(names) == sorted(name for name, _ in encoder.named_parameters())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A folder of the checkpoint, free to be changed."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "whisper"))


@pytest.mark.parametrize("prefix", ["encoder.", "whisper_model.speech_encoder."])
def test_names_after_fine_tuning(
    prefix: str, directory: Path, checkpoint_features: WhisperFeatures
) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file({n.replace("model.encoder.", prefix): t for n, t in tensors.items()}, path)
    wave = load_audio(GOLDEN / "e2e" / "audio" / min(FILES))
    expected = checkpoint_features.encode(wave)
    assert torch.equal(load_features(directory).encode(wave), expected)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("config.json", "d_model", None),
        ("config.json", "encoder_layers", "2"),
        ("config.json", "encoder_attention_heads", 7),
        ("config.json", "max_source_positions", 750),
        ("config.json", "activation_function", "relu"),
        ("preprocessor_config.json", "feature_size", 80),
        ("preprocessor_config.json", "chunk_length", 15),
        ("preprocessor_config.json", "sampling_rate", 24_000),
        ("preprocessor_config.json", "dither", 0.1),
    ],
)
def test_other_encoders_are_refused(file: str, field: str, value: object, directory: Path) -> None:
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=rf"{file}: .*{field}"):
        whisper_component(directory)


def test_missing_file_is_named(directory: Path) -> None:
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: file missing"):
        whisper_component(directory)


def padded(directory: Path, seconds: object) -> Path:
    """A copy of the recorded component whose segments are followed by ``seconds`` of silence."""
    shutil.copytree(COMPONENT, directory)
    path = directory / "preprocessor_config.json"
    values = {"feature_size": load_features(COMPONENT).module.config.num_mel_bins}
    path.write_text(json.dumps({**values, "padding_seconds": seconds}))
    return directory


@pytest.mark.parametrize("graphs", [Direct(), FixedShapes(CPU)])
def test_padding_of_the_checkpoint(graphs: Graphs, tmp_path: Path) -> None:
    """Segments are padded by at least what is asked; up to 30 s, where nothing changes."""
    encoder = whisper_component(COMPONENT).load(CPU, torch.float32)
    short = WhisperFeatures(encoder, padded(tmp_path / "short", 3), graphs)
    whole = WhisperFeatures(encoder, padded(tmp_path / "whole", 30), graphs)
    lengths = (1_600, 20_000, 48_000, 430_000, 480_000 + 90_000)
    waves = [np.random.default_rng(n).normal(0, 0.1, n).astype(np.float32) for n in lengths]
    together = short.encode_all(waves)
    for wave, found in zip(waves, together, strict=True):
        torch.testing.assert_close(found, short.encode(wave), rtol=0, atol=TOLERANCE)
    published = load_features(COMPONENT)
    for wave in waves[:1] + waves[3:4]:
        torch.testing.assert_close(whole.encode(wave), published.encode(wave))
    torch.testing.assert_close(together[3], published.encode(waves[3]))  # 30 s with 3 s of silence
    assert (together[0] - published.encode(waves[0])).abs().max() > 1e-3
    frames = {length: whisper_spectrograms(short.extractor, [wave])[0].shape[1]
              for length, wave in zip(lengths, waves, strict=True)}  # fmt: skip
    assert list(frames.values())[:4] == [400, 600, 600, 3000]


@pytest.mark.parametrize("seconds", [-1, 31, "3", True])
def test_padding_that_cannot_be(seconds: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: padding_seconds must"):
        load_features(padded(tmp_path / "bad", seconds))
