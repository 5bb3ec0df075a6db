"""The self-test of a set-up: what it lets through, and what it calls by which name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.layers.quantization import SCHEMES
from kimia_infer.serving.cog import probe
from kimia_infer.serving.cog.self_test import SelfTestError, self_test
from tests.paths import ROOT
from tests.serving.helpers import serve_bare

MINI = ROOT / "weights" / "mini"


def load(checkpoint: Path) -> KimiAudio:
    return KimiAudio(str(checkpoint), device="cpu", dtype="float32", head_rows="track")


def damage(folder: Path, component: str, name: str) -> Path:
    """A copy of the miniature in which the last value of one tensor is not a number."""
    checkpoint = Path(shutil.copytree(MINI, folder / "checkpoint"))
    path = checkpoint / component / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = torch.nan
    save_file(tensors, path)
    return checkpoint


@pytest.fixture(scope="module")
def model(golden: Path) -> KimiAudio:
    return load(golden / "e2e" / "checkpoint")


def test_working_model_passes(model: KimiAudio) -> None:
    for _ in range(2):
        self_test(model)


def test_published_dtype_passes(golden: Path) -> None:
    self_test(KimiAudio(str(golden / "e2e" / "checkpoint"), device="cpu", dtype="bfloat16"))


def test_a_model_that_does_not_speak_passes(golden: Path) -> None:
    silent = KimiAudio(str(golden / "e2e" / "checkpoint"), False, device="cpu")
    self_test(silent)
    with torch.no_grad():
        silent.language_model.norm.weight[0] = torch.nan
    with pytest.raises(SelfTestError, match=r"language model: the weight norm\.weight"):
        self_test(silent)


# File of the checkpoint, a name in it, and what the error must say.
WEIGHTS = {
    "trunk": ("", "model.layers.1.mlp.down_proj.weight", "language model: .* layers.1.feed_f"),
    "mimo": ("", "model.mimo_layers.0.self_attn.q_proj.bias", "language model: .* mimo_layers.0"),
    "embedding": ("", "model.embed_tokens.weight", "language model: .* embedding.weight"),
    "audio head": ("", "mimo_output.weight", "language model: .* audio_head.weight"),
    "whisper": ("whisper-large-v3", "model.encoder.conv1.weight", "Whisper encoder: .* conv1"),
    "speech": ("glm-4-voice-tokenizer", "conv1.weight", "speech tokenizer: .* conv1.weight"),
    "dit": (
        "audio_detokenizer",
        "speech_model.blocks.0.attn.qkv.weight",
        "DiT: .* blocks.0.attn.qkv.weight",
    ),
    "vocoder": ("vocoder", "conv_pre.weight_v", "vocoder: .* conv_pre.weight"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_one_weight_that_is_not_finite(case: str, tmp_path: Path) -> None:
    """The last value of one tensor, which is of an id or a position that may never be used."""
    folder, name, message = WEIGHTS[case]
    checkpoint = damage(tmp_path, folder, name)
    with pytest.raises(SelfTestError, match=f"^self-test: {message}.* download or prepare"):
        self_test(load(checkpoint))


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "none"])
def test_quantized_weights(scheme: str, tmp_path: Path) -> None:
    """A weight that is not finite is seen after it was quantized, too."""
    quantized = KimiAudio(str(MINI), device="cpu", quantization=scheme)
    self_test(quantized)
    checkpoint = damage(tmp_path, "", "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(SelfTestError, match=r"language model: .* layers\.1\.feed_forward\.down"):
        self_test(KimiAudio(str(checkpoint), device="cpu", quantization=scheme))


# Where a kernel goes wrong, and the stage that must be named.
PLACES: dict[str, tuple[Callable[[KimiAudio], nn.Module], str]] = {
    "speech": (lambda m: m.speech_codes.module.layers[0], "speech tokenizer"),
    "whisper": (lambda m: m.whisper_features.module.conv2, "Whisper encoder"),
    "adaptor": (lambda m: m.language_model.adaptor, "language model, text track"),
    "trunk": (lambda m: m.language_model.layers[-1].feed_forward, "language model, text track"),
    "text head": (lambda m: m.decoder.model.text_head, "language model, text track"),
    "mimo": (lambda m: m.language_model.mimo_layers[0].attention, "language model, audio track"),
    "audio head": (lambda m: m.decoder.model.audio_head, "language model, audio track"),
    "dit": (lambda m: m.detokenizer.dit.blocks[0].attn, "DiT"),
    "vocoder": (lambda m: m.detokenizer.vocoder.conv_post, "vocoder"),
}


@pytest.mark.parametrize("case", PLACES)
def test_one_result_that_is_not_finite(
    model: KimiAudio, request: pytest.FixtureRequest, case: str
) -> None:
    place, stage = PLACES[case]

    def spoil(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        spoiled = output.clone()
        spoiled.view(-1)[0] = torch.nan
        return spoiled

    request.addfinalizer(place(model).register_forward_hook(spoil).remove)
    message = f"^self-test: {stage}: [1-9][0-9]* of [0-9]+ values .* on cpu .*KIMI_AUDIO_DTYPE"
    with pytest.raises(SelfTestError, match=message):
        self_test(model)


def test_sound_that_only_answers_have(model: KimiAudio, request: pytest.FixtureRequest) -> None:
    """The last sample of speech, which the chunk that is tried alone does not release."""

    def spoil(module: nn.Module, inputs: tuple, wave: torch.Tensor) -> torch.Tensor:
        return torch.cat([wave[..., :-1], torch.full_like(wave[..., :1], torch.inf)], -1)

    request.addfinalizer(model.detokenizer.vocoder.register_forward_hook(spoil).remove)
    with pytest.raises(SelfTestError, match=r"speech of an answer: 1 of [0-9]+ values"):
        self_test(model)


def test_speech_without_samples(model: KimiAudio, request: pytest.FixtureRequest) -> None:
    def spoil(module: nn.Module, inputs: tuple, wave: torch.Tensor) -> torch.Tensor:
        return wave[..., :0]

    request.addfinalizer(model.detokenizer.vocoder.register_forward_hook(spoil).remove)
    with pytest.raises(SelfTestError, match="vocoder: 0 of 0 values"):
        self_test(model)


def test_error_of_a_stage_is_passed_on(model: KimiAudio, request: pytest.FixtureRequest) -> None:
    def missing(module: nn.Module, inputs: tuple) -> None:
        raise RuntimeError("no kernel image is available")

    request.addfinalizer(model.decoder.model.audio_head.register_forward_pre_hook(missing).remove)
    with pytest.raises(SelfTestError, match="output_type='both': RuntimeError: no kernel image"):
        self_test(model)


def test_failed_self_test_fails_the_set_up(golden: Path, tmp_path: Path) -> None:
    checkpoint = damage(tmp_path, "", "model.norm.weight")
    weights = {"KIMI_AUDIO_WEIGHTS": str(checkpoint)}
    with serve_bare(golden, tmp_path, until="SETUP_FAILED", **weights) as server:
        _, state = server.request("GET", "/health-check")
        assert "SelfTestError: self-test: language model: " in state["setup"]["logs"]
        assert probe.main([server.url]) == probe.main(["--alive", server.url]) == 1
