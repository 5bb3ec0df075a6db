"""Vocoder, its activation and the mel analysis against the recorded published implementation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from kimia_infer.audio.mel import MelConfig, log_mel
from kimia_infer.models.kimi_audio.config import VocoderConfig
from kimia_infer.models.kimi_audio.vocoder import (
    AntiAliasedSnake,
    Vocoder,
    downsample,
    low_pass_filter,
    upsample,
    vocoder_component,
    vocoder_slots,
)
from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.component import expected_tensors, fold_weight_norm

TOLERANCE = 1e-4
CPU = torch.device("cpu")
Recorded = dict[str, torch.Tensor]

# The published vocoder/config.json, as far as the generator reads it.
FULL_SIZE = {
    "resblock": "1",
    "activation": "snakebeta",
    "snake_logscale": True,
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
    "upsample_rates": [5, 2, 2, 2, 2, 3, 2],
    "upsample_kernel_sizes": [9, 4, 4, 4, 4, 5, 4],
    "upsample_initial_channel": 2048,
    "resblock_kernel_sizes": [3, 5, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5]] * 4,
    "num_mels": 80,
    "sampling_rate": 24000,
    "hop_size": 480,
}
PUBLISHED_FILE_BYTES = 964_918_850
PUBLISHED_TENSORS = 1206


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def recorded(golden: Path) -> Recorded:
    return load_file(golden / "vocoder" / "golden.safetensors")


def mel_names(recorded: Recorded) -> list[str]:
    return [name for name in recorded if name.startswith("mel.")]


@torch.no_grad()
def test_wave(vocoder: Vocoder, recorded: Recorded) -> None:
    names = mel_names(recorded)
    assert names
    for name in names:
        wave = vocoder(recorded[name])
        assert len(wave) == len(recorded[name]) * vocoder.config.hop_size
        close(wave, recorded[name.replace("mel", "wav")])


@torch.no_grad()
def test_stages(vocoder: Vocoder, recorded: Recorded) -> None:
    """Every stage of the mel whose stages were recorded (the one with as many frames).

    Rounding grows with the values, which reach 75 here, so the bound is relative to them.
    """
    seen: Recorded = {}
    hooks = [
        vocoder.conv_pre.register_forward_hook(
            lambda _m, _a, output: seen.update({"stage.conv_pre": output})
        )
    ]
    for stage, up in enumerate(vocoder.ups):

        def after(_module, _args, output, name=f"stage.up{stage}"):
            seen[name] = output

        hooks.append(up.register_forward_hook(after))
    for stage, following in enumerate([*list(vocoder.ups)[1:], vocoder.activation_post]):

        def before(_module, args, name=f"stage.res{stage}"):
            seen[name] = args[0]

        hooks.append(following.register_forward_pre_hook(before))
    frames = recorded["stage.conv_pre"].shape[1]
    vocoder(recorded[f"mel.{frames}"])
    for hook in hooks:
        hook.remove()
    stages = {name for name in recorded if name.startswith("stage.")}
    assert stages == seen.keys()
    for name in stages:
        close(seen[name], recorded[name], 1e-5 * recorded[name].abs().max().item())


def test_filter(recorded: Recorded) -> None:
    taps = torch.tensor(low_pass_filter())
    close(taps, recorded["filter"], 1e-7)
    close(taps, recorded["filter_down"], 1e-7)


@torch.no_grad()
def test_activation(golden: Path, recorded: Recorded) -> None:
    """The recorded activation is one of the checkpoint's with as many channels."""
    even, odd = upsample(recorded["act.x"])
    close(torch.stack([even, odd], dim=-1).flatten(-2), recorded["act.upsampled"], 1e-5)
    stored = load_file(golden / "vocoder" / "generator.safetensors")
    activation = AntiAliasedSnake(len(recorded["act.x"]))
    for name in ("alpha", "beta"):
        activation.act.get_parameter(name).copy_(stored[f"resblocks.0.activations.0.act.{name}"])
    close(activation(recorded["act.x"]), recorded["act.y"], 1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 6, 13])
def test_rate_changes_equal_filtering_by_convolution(length: int) -> None:
    """Against the textbook form: replicated edges and per-channel strided convolutions."""
    x = torch.randn(3, length, generator=torch.Generator().manual_seed(length))
    taps = torch.tensor(low_pass_filter()).expand(3, 1, -1)
    wide = F.conv_transpose1d(F.pad(x, (5, 5), mode="replicate"), taps * 2, stride=2, groups=3)
    wide = wide[:, 15:-15]
    even, odd = upsample(x)
    close(even, wide[:, 0::2], 1e-6)
    close(odd, wide[:, 1::2], 1e-6)
    narrow = F.conv1d(F.pad(wide, (5, 6), mode="replicate"), taps, stride=2, groups=3)
    close(downsample(wide[:, 0::2], wide[:, 1::2]), narrow, 1e-6)


def test_gradients_of_the_activation() -> None:
    """Training needs them; against the textbook form under automatic differentiation."""
    activation = AntiAliasedSnake(3)
    generator = torch.Generator().manual_seed(0)
    for parameter in activation.parameters():
        nn.init.normal_(parameter, generator=generator)
    x = torch.randn(3, 9, generator=generator, requires_grad=True)
    variables = [x, *activation.parameters()]
    taps = torch.tensor(low_pass_filter()).expand(3, 1, -1)
    wide = F.conv_transpose1d(F.pad(x, (5, 5), mode="replicate"), taps * 2, stride=2, groups=3)
    alpha, beta = activation.act.alpha[:, None], activation.act.beta[:, None]
    wide = wide[:, 15:-15]
    wide = wide + torch.sin(wide * alpha.exp()) ** 2 / beta.exp()
    expected = F.conv1d(F.pad(wide, (5, 6), mode="replicate"), taps, stride=2, groups=3)
    weights = torch.randn(x.shape, generator=generator)
    gradients = torch.autograd.grad((activation(x) * weights).sum(), variables)
    for actual, reference in zip(
        gradients, torch.autograd.grad((expected * weights).sum(), variables), strict=True
    ):
        close(actual, reference, 1e-5)


def test_weight_norm_is_folded_as_torch_applies_it() -> None:
    generator = torch.Generator().manual_seed(0)
    v, g = torch.randn(4, 3, 5, generator=generator), torch.rand(4, 1, 1, generator=generator)
    close(fold_weight_norm(g, v), torch._weight_norm(v, g, 0), 1e-6)
    assert fold_weight_norm(g.bfloat16(), v.bfloat16()).dtype == torch.float32


def test_full_size_manifest() -> None:
    """Names before folding and bytes of the published file, from the configuration alone."""
    config = VocoderConfig.from_dict(FULL_SIZE)
    slots = vocoder_slots(config)
    shapes = expected_tensors(slots)
    assert len(shapes) == 868
    filters = PUBLISHED_TENSORS - len(shapes)
    stored = 4 * (sum(math.prod(s) for s in shapes.values()) + filters * len(low_pass_filter()))
    overhead = PUBLISHED_FILE_BYTES - stored  # of the zip container, some bytes per tensor
    assert 0 < overhead < 512 * PUBLISHED_TENSORS
    with torch.device("meta"):
        module = Vocoder(config)
    filled = sorted(slot.parameter for slot in slots)
    assert filled == sorted(name for name, _ in module.named_parameters())
    assert not list(module.buffers())


def test_every_stored_tensor_is_expected_or_a_filter(checkpoint: Path) -> None:
    part = vocoder_component(checkpoint / "vocoder")
    surplus = part.store.tensors.keys() - expected_tensors(part.slots).keys()
    assert surplus and all(part.store.tensors[name].shape[-1] == 12 for name in surplus)


def test_slim_checkpoint(vocoder: Vocoder, checkpoint: Path, tmp_path: Path) -> None:
    save_file(dict(vocoder.state_dict()), tmp_path / "model.safetensors")
    config = (checkpoint / "vocoder" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    slim = vocoder_component(tmp_path).load(CPU, torch.float32)
    for name, value in vocoder.state_dict().items():
        assert torch.equal(slim.get_parameter(name), value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("activation", "snake", "activation = 'snake' is not supported"),
        ("use_tanh_at_final", None, "use_tanh_at_final = None is not supported"),
        ("num_mels", "80", "num_mels must be a positive integer"),
        ("upsample_rates", 5, "upsample_rates must be a list of sizes"),
        ("upsample_rates", [5, 2, 2], "must be equally long"),
        ("upsample_kernel_sizes", [9, 4, 4, 4, 4, 6, 4], "exceed its rate by an even number"),
        ("upsample_initial_channel", 96, "leave a channel when halved"),
        ("hop_size", 240, "product of upsample_rates must be hop_size"),
        ("resblock_kernel_sizes", [3, 5, 7], "resblock_dilation_sizes must be equally long"),
        ("resblock_kernel_sizes", [3, 5, 7, 10], "resblock_kernel_sizes must be odd"),
        ("resblock_dilation_sizes", [1, 3, 5, 7], "resblock_dilation_sizes must be a list"),
    ],
)
def test_bad_configuration(field: str, value: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FULL_SIZE | {field: value}))
    with pytest.raises(CheckpointError, match=message) as error:
        VocoderConfig.from_directory(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_mel_analysis(golden: Path, recorded: Recorded) -> None:
    mel = log_mel(recorded["melspec.wav"], MelConfig.from_directory(golden / "vocoder"))
    close(mel, recorded["melspec.mel"])


def test_mel_configuration(golden: Path, tmp_path: Path) -> None:
    values = json.loads((golden / "vocoder" / "config.json").read_text())
    assert MelConfig.from_dict(values | {"fmax": None}).fmax == values["sampling_rate"] / 2
    with pytest.raises(CheckpointError, match="win_size must be a number"):
        MelConfig.from_dict(values | {"win_size": None})
    with pytest.raises(CheckpointError, match="file missing"):
        MelConfig.from_directory(tmp_path)


@pytest.mark.parametrize("shape", [(2, 24000), (10,), (0,)])
def test_mel_of_an_unsuitable_wave(shape: tuple[int, ...], golden: Path) -> None:
    with pytest.raises(ValueError, match="mono wave of more than"):
        log_mel(torch.zeros(shape), MelConfig.from_directory(golden / "vocoder"))
