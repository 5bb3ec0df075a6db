"""Semantic codes against recorded ones, and checkpoints that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from kimia_infer.audio.files import SAMPLE_RATE, load_audio
from kimia_infer.models.kimi_audio.components import (
    speech_tokenizer_component,
    speech_tokenizer_slots,
)
from kimia_infer.models.kimi_audio.config import SpeechTokenizerConfig
from kimia_infer.models.kimi_audio.encoders import SpeechCodes, SpeechTokenizer, split_segments
from kimia_infer.utils.errors import CheckpointError
from kimia_infer.utils.graphs import Direct, Graphs
from kimia_infer.weights.component import expected_tensors
from tests.paths import GOLDEN
from tests.traced import FixedShapes, TracedGraphs

COMPONENT = GOLDEN / "glm4"
CHECKPOINT = GOLDEN / "e2e" / "checkpoint" / "glm-4-voice-tokenizer"
CODES = json.loads((COMPONENT / "codes.json").read_text())
# asr_example.wav belongs to the published repository and is not among the recorded files.
NAMES = [name for name in CODES if (GOLDEN / "audio" / f"{name}.wav").is_file()]
REFERENCE = load_file(COMPONENT / "golden.safetensors")
FILES = json.loads((GOLDEN / "e2e" / "cases.json").read_text())["audio_files"]
CPU = torch.device("cpu")
TOLERANCE = 1e-4


def load_codes(directory: Path, dtype: torch.dtype = torch.float32) -> SpeechCodes:
    return SpeechCodes(speech_tokenizer_component(directory).load(CPU, dtype), directory)


def recorded_wave(name: str) -> np.ndarray:
    return load_audio(GOLDEN / "audio" / f"{name}.wav")


@pytest.fixture(scope="module")
def codes() -> SpeechCodes:
    return load_codes(COMPONENT)


@pytest.fixture(scope="module")
def checkpoint_codes() -> SpeechCodes:
    return load_codes(CHECKPOINT)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_codes(name: str, codes: SpeechCodes) -> None:
    encoded = codes.encode(recorded_wave(name))
    assert encoded.dtype == torch.int64
    assert encoded.tolist() == CODES[name]["codes"]


@pytest.mark.parametrize("name", FILES)
def test_recorded_codes_of_the_checkpoint(name: str, checkpoint_codes: SpeechCodes) -> None:
    wave = load_audio(GOLDEN / "e2e" / "audio" / name)
    assert checkpoint_codes.encode(wave).tolist() == FILES[name]["codes"]


def test_recorded_codes_with_recorded_graphs() -> None:
    """All lengths of one segment are recorded before the first request."""
    graphs = TracedGraphs(CPU)
    part = speech_tokenizer_component(COMPONENT)
    codes = SpeechCodes(part.load(CPU, torch.float32), COMPONENT, graphs)
    codes.warm_up()
    assert graphs.recorded == 15
    for name in NAMES:
        assert codes.encode(recorded_wave(name)).tolist() == CODES[name]["codes"]
    assert graphs.recorded == 15 and graphs.replayed


@pytest.mark.parametrize("graphs", [Direct(), FixedShapes(CPU)])
def test_sounds_encoded_together(graphs: Graphs, codes: SpeechCodes) -> None:
    together = SpeechCodes(codes.module, COMPONENT, graphs)
    found = together.encode_all([recorded_wave(name) for name in NAMES])
    assert [row.tolist() for row in found] == [CODES[name]["codes"] for name in NAMES]


@given(lengths=st.lists(st.integers(1, 5 * SAMPLE_RATE), min_size=2, max_size=8), data=st.data())
@settings(max_examples=10, deadline=None)
def test_company_changes_no_code(
    lengths: list[int], data: st.DataObject, codes: SpeechCodes
) -> None:
    """Short sounds of a few lengths, so that most of them share a batch."""
    graphs = data.draw(st.sampled_from([Direct(), FixedShapes(CPU)]))
    together, batches = SpeechCodes(codes.module, COMPONENT, graphs), []
    waves = [np.random.default_rng(n).uniform(-0.5, 0.5, n).astype(np.float32) for n in lengths]
    hook = codes.module.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    found = together.encode_all(waves)
    hook.remove()
    assert len(batches) <= 3  # lengths of 2, 4 and 6 s
    for wave, row in zip(waves, found, strict=True):
        assert row.tolist() == codes.encode(wave).tolist()


@given(samples=st.integers(1, 30 * SAMPLE_RATE))
@settings(max_examples=10, deadline=None)
def test_padding_to_recorded_shapes_changes_no_code(samples: int, codes: SpeechCodes) -> None:
    wave = np.random.default_rng(samples).uniform(-0.5, 0.5, samples).astype(np.float32)
    padded = SpeechCodes(codes.module, COMPONENT, FixedShapes(CPU))
    assert padded.encode(wave).tolist() == codes.encode(wave).tolist()


def test_tensors_are_waves_too(codes: SpeechCodes) -> None:
    wave = recorded_wave(NAMES[0])
    encoded = codes.encode(torch.from_numpy(wave).double())
    assert encoded.tolist() == CODES[NAMES[0]]["codes"]


class Spy(torch.nn.Module):
    """Keeps what passes through a speech tokenizer, segment by segment."""

    def __init__(self, module: SpeechTokenizer):
        super().__init__()
        self.config, self.conv1, self.quantize = module.config, module.conv1, module.quantize
        self.inner = [module]
        self.mel, self.mask, self.vectors = [], [], []

    def forward(self, mel: Tensor, mask: Tensor) -> Tensor:
        vectors = self.inner[0](mel, mask)
        self.mel += mel
        self.mask += mask
        self.vectors += vectors
        return vectors


@pytest.fixture
def spy(codes: SpeechCodes) -> tuple[Spy, SpeechCodes]:
    spy = Spy(codes.module)
    return spy, SpeechCodes(spy, COMPONENT)


@pytest.mark.parametrize("key", [key for key in REFERENCE if ".pre_vq" in key])
def test_recorded_vectors_before_quantization(key: str, spy: tuple[Spy, SpeechCodes]) -> None:
    spy[1].encode(recorded_wave(key.split(".")[0]))
    expected = REFERENCE[key]
    found = torch.stack(spy[0].vectors) if expected.dim() == 3 else spy[0].vectors[0]
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("key", [k for k in REFERENCE if "input_features" in k or "mask" in k])
def test_recorded_spectrograms_and_masks(key: str, spy: tuple[Spy, SpeechCodes]) -> None:
    name, *middle, field = key.split(".")
    spy[1].encode(recorded_wave(name))
    segment = int(middle[0].removeprefix("seg")) if middle else 0
    found = (spy[0].mel if "input_features" in field else spy[0].mask)[segment]
    expected = REFERENCE[key]
    if "_first_" in field:
        found = found[..., : expected.shape[-1]]
    assert found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=TOLERANCE)


def test_nearest_code_is_the_one_of_least_distance(codes: SpeechCodes) -> None:
    book = codes.module.codebook.weight
    vectors = torch.randn(3, 50, book.shape[1], generator=torch.Generator().manual_seed(0))
    distances = (vectors[:, :, None].double() - book.double()).square().sum(dim=-1)
    assert torch.equal(codes.module.quantize(vectors), distances.argmin(dim=-1))
    assert torch.equal(codes.module.quantize(book[None]), torch.arange(len(book))[None])


def test_sound_after_a_block_changes_no_earlier_code(codes: SpeechCodes) -> None:
    """Causality ends at blocks of 4 seconds, and starts there too."""
    wave = recorded_wave(max(NAMES, key=lambda name: CODES[name]["n"]))
    wave = split_segments(wave)[0]
    block = codes.module.config.block_frames * 320
    changed = wave.copy()
    changed[2 * block + 800 :] *= -0.5
    before, after = codes.encode(wave), codes.encode(changed)
    first = 2 * block // 1280
    assert torch.equal(before[:first], after[:first])
    assert not torch.equal(before[first:], after[first:])


def test_other_dtypes_run() -> None:
    codes = load_codes(COMPONENT, torch.bfloat16)
    encoded = codes.encode(recorded_wave(NAMES[0]))
    assert encoded.shape == (CODES[NAMES[0]]["n"],)


def test_only_parameters_and_only_slots(codes: SpeechCodes) -> None:
    """Nothing beside the slots is filled, so nothing else may carry state."""
    module = codes.module
    assert not dict(module.named_buffers())
    names = [slot.parameter for slot in speech_tokenizer_slots(module.config)]
    assert sorted(names) == sorted(name for name, _ in module.named_parameters())


def _rewrite(source: Path, target: Path, rename, config: dict | None = None) -> Path:
    for name in ("config.json", "preprocessor_config.json"):
        values = json.loads((source / name).read_text())
        (target / name).write_text(json.dumps(values | (config or {})))
    tensors = load_file(source / "model.safetensors")
    save_file({rename(n): t for n, t in tensors.items()}, target / "model.safetensors")
    return target


def test_prefixed_names_are_accepted(tmp_path: Path) -> None:
    directory = _rewrite(COMPONENT, tmp_path, lambda name: f"model.encoder.{name}")
    encoded = load_codes(directory).encode(recorded_wave(NAMES[0]))
    assert encoded.tolist() == CODES[NAMES[0]]["codes"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantize_causal_encoder", True),
        ("quantize_encoder_only", False),
        ("encoder_causal_attention", True),
        ("encoder_causal_convolution", False),
        ("pooling_type", "max"),
        ("pooling_kernel_size", 2),
        ("pooling_position", 10_000),
        ("quantize_position", None),
        ("quantize_vocab_size", 0),
        ("quantize_causal_block_size", "200"),
        ("encoder_attention_heads", 7),
        ("activation_function", "relu"),
        ("d_model", None),
    ],
)
def test_other_networks_are_refused(field: str, value: object) -> None:
    path = COMPONENT / "config.json"
    values = json.loads(path.read_text()) | {field: value}
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{field}"):
        SpeechTokenizerConfig.from_json(values, path)


def test_another_spectrogram_is_refused(tmp_path: Path) -> None:
    directory = _rewrite(COMPONENT, tmp_path, str, {"hop_length": 80})
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: hop_length = 80 "):
        speech_tokenizer_component(directory)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    directory = _rewrite(COMPONENT, tmp_path, lambda n: n.replace("codebook", "book"))
    with pytest.raises(CheckpointError, match=r"codebook\.weight is missing"):
        speech_tokenizer_component(directory)


def test_full_size() -> None:
    """The published tokenizer: 16 layers of the large encoder and 16384 codes."""
    values = json.loads((COMPONENT / "config.json").read_text()) | {
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "quantize_position": 16,
        "pooling_position": 16,
        "quantize_vocab_size": 16384,
    }
    config = SpeechTokenizerConfig.from_json(values, COMPONENT)
    shapes = expected_tensors(speech_tokenizer_slots(config))
    assert len(shapes) == 16 * 15 + 6
    assert shapes["codebook.weight"] == (16384, 1280)
    assert shapes["conv1.weight"] == (1280, 128, 3)
    assert shapes["layers.15.fc1.weight"] == (5120, 1280)
    assert "layers.0.self_attn.k_proj.bias" not in shapes
