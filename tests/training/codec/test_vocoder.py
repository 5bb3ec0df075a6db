"""Training of the vocoder: what is trained is what is served, it learns, goes on, is served."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kimia_infer.audio.files import load_audio
from kimia_infer.audio.mel import MelConfig, log_mel
from kimia_infer.data.conversations import DataError
from kimia_infer.models.kimi_audio.config import VocoderConfig
from kimia_infer.models.kimi_audio.vocoder import (
    AntiAliasedSnake,
    Vocoder,
    downsample,
    upsample,
    vocoder_component,
)
from kimia_infer.training.config import read_config
from kimia_infer.training.run_directory import FINAL
from kimia_infer.training.tasks.config import VocoderTrainingConfig
from kimia_infer.training.tasks.recordings import Examples, Recording, find_recordings
from kimia_infer.training.tasks.vocoder import (
    VocoderNetwork,
    new_config,
    new_vocoder,
    read_wave,
    train_vocoder,
)
from kimia_infer.training.tasks.vocoder_losses import (
    Discriminators,
    discriminator_loss,
    generator_losses,
    log_mels,
    stft_loss,
)
from kimia_infer.utils.errors import CheckpointError, ConfigurationError
from tests.training.runs import interrupt, losses, write_sound, write_sounds

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    write_sounds(folder, 5, 0.4, 0.1)
    return folder


def settings(sounds: Path, output: Path, *assignments: str) -> VocoderTrainingConfig:
    known = [
        f"data={sounds}", f"output={output}", "device=cpu", "size.channels=32", "batch_size=2",
        "crop_frames=8", "size.dilations=[1, 3]", *assignments,
    ]  # fmt: skip
    return read_config(VocoderTrainingConfig, None, known)


def config_of(run: VocoderTrainingConfig) -> VocoderConfig:
    return VocoderConfig.from_dict(new_config(run))


@pytest.fixture
def vocoder(sounds: Path, tmp_path: Path) -> Vocoder:
    torch.manual_seed(0)
    built = new_vocoder(config_of(settings(sounds, tmp_path)))
    with torch.no_grad():
        for module in built.modules():
            if isinstance(module, AntiAliasedSnake):
                module.act.alpha.normal_(std=0.3)
                module.act.beta.normal_(std=0.3)
    return built


@pytest.mark.parametrize("samples", [1, 2, 9])
def test_gradients_of_the_activation(samples: int):
    """Those of the filters, written by hand, are those of finite differences."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, samples, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: downsample(*upsample(y)), x)
    activation = AntiAliasedSnake(3)
    torch.nn.init.constant_(activation.act.alpha, 0.2)
    torch.nn.init.constant_(activation.act.beta, -0.3)
    leaf, weight = x.detach().float().requires_grad_(), torch.randn(2, 3, samples)
    activated = activation(leaf)
    (activated * weight).sum().backward()
    step = torch.randn_like(leaf)
    with torch.no_grad():
        ahead, behind = (activation(leaf + sign * 1e-2 * step) for sign in (1, -1))
    slope = ((ahead - behind) * weight).sum() / 2e-2
    torch.testing.assert_close((leaf.grad * step).sum(), slope, rtol=1e-3, atol=1e-3)
    assert activation.act.alpha.grad.any() and activation.act.beta.grad.any()


@torch.no_grad()
def test_a_batch_gives_what_is_served(vocoder: Vocoder):
    mel = torch.randn(3, 10, 80) - 4
    expected = torch.stack([vocoder(part) for part in mel])
    torch.testing.assert_close(vocoder(mel), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(vocoder.generate(mel).clamp(-1, 1), expected, rtol=0, atol=1e-6)
    for module in vocoder.modules():
        if isinstance(module, AntiAliasedSnake):
            module.anti_aliased = False
    assert (vocoder(mel) - expected).abs().max() > 1e-4


def test_the_mel_of_the_loss_is_that_of_the_vocoder(sounds: Path, tmp_path: Path):
    config = MelConfig.from_dict(new_config(settings(sounds, tmp_path)))
    wave = torch.randn(2, 9_600) / 10
    expected = torch.stack([log_mel(part, config).T for part in wave])
    torch.testing.assert_close(log_mels(wave, config), expected, rtol=0, atol=1e-5)


def test_the_spectral_loss():
    time = torch.arange(6_000) / 24_000
    tone, other, silent = (
        torch.sin(2 * torch.pi * 440 * time)[None] / 3,
        torch.sin(2 * torch.pi * 1_000 * time)[None] / 3,
        torch.zeros(1, 6_000),
    )
    assert stft_loss(tone, tone).item() == 0
    near, far = stft_loss(0.9 * tone, tone).item(), stft_loss(other, tone).item()
    assert 0 < near < 0.3 < far
    assert stft_loss(-tone, tone).item() < 1e-3  # phase is not heard
    rounding = torch.rand(1, 6_000) / 32_768
    assert stft_loss(rounding, silent).item() < 0.1  # equally silent
    assert stft_loss(tone, silent).item() < 100


def batch_of(sounds: Path, tmp_path: Path, count: int = 3) -> Examples:
    mel = MelConfig.from_dict(new_config(settings(sounds, tmp_path)))
    items = tuple(read_wave(s, mel, 8) for s in find_recordings(sounds, tmp_path)[:count])
    return Examples(items, torch.full((count,), 1 / count), ["a"] * count)


@pytest.mark.parametrize("adversarial", ["null", "0.5"])
@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_gradients_reach_everything(
    sounds: Path, tmp_path: Path, vocoder: Vocoder, adversarial: str, progress: float
):
    run = settings(sounds, tmp_path, f"adversarial={adversarial}")
    network = VocoderNetwork(vocoder, new_config(run), run).train()
    network.progress = progress
    sum(network(batch_of(sounds, tmp_path)).values()).sum().backward()
    for name, parameter in network.named_parameters():
        if name.startswith("average."):
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert any("discriminators" in name for name, _ in network.named_parameters()) == (
        run.adversarial == 0.5
    )


def test_each_side_learns_from_its_own_loss():
    torch.manual_seed(0)
    discriminators, real = Discriminators(), torch.randn(2, 4_000)
    fake = torch.randn(2, 4_000, requires_grad=True)
    recognized, distance = generator_losses(discriminators, fake, real)
    (recognized + distance).sum().backward()
    assert fake.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in discriminators.parameters())
    fake.grad = None
    discriminator_loss(discriminators, fake, real).sum().backward()
    assert fake.grad is None
    assert all(parameter.grad.abs().max() > 0 for parameter in discriminators.parameters())


def test_a_run_learns_and_is_served(sounds: Path, tmp_path: Path):
    result = train_vocoder(settings(sounds, tmp_path, "max_steps=30", "eval_every=15"))
    found = losses(result)
    assert sum(found[-5:]) < 0.6 * sum(found[:5])
    assert len(losses(result, "eval_mel_loss")) == 2
    folder = tmp_path / FINAL / "vocoder"
    stored = load_file(folder / "model.safetensors")
    assert {"conv_pre.weight_g", "conv_pre.weight_v", "conv_post.weight_g"} <= stored.keys()
    vocoder = vocoder_component(folder).load(CPU, torch.float32)
    batch = batch_of(sounds, tmp_path, 1)
    mel, wave = batch.items[0]["mel"], batch.items[0]["wave"]
    with torch.no_grad():
        spoken = vocoder(mel)
    assert spoken.shape == wave.shape
    untrained = new_vocoder(vocoder.config).requires_grad_(False)
    assert stft_loss(spoken[None], wave[None]) < 0.7 * stft_loss(untrained(mel)[None], wave[None])
    further = settings(sounds, tmp_path / "more", f"initial={folder}", "max_steps=1",
                       "learning_rate=0", "size.channels=64")  # fmt: skip
    train_vocoder(further)
    again = vocoder_component(tmp_path / "more" / FINAL / "vocoder").load(CPU, torch.float32)
    for (name, expected), parameter in zip(
        vocoder.named_parameters(), again.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("adversarial", ["null", "1.0"])
def test_a_resumed_run_equals_an_uninterrupted_one(sounds: Path, tmp_path: Path, adversarial: str):
    # Activations change after step 2, where the run is interrupted.
    options = ["max_steps=4", "save_every=2", f"adversarial={adversarial}", "anti_aliased_from=0.5"]
    whole = train_vocoder(settings(sounds, tmp_path / "whole", *options))
    parts = settings(sounds, tmp_path / "parts", *options)
    interrupt(lambda: train_vocoder(parts), step=3)
    resumed = train_vocoder(parts, resume=True)
    for name in ("loss", "eval_loss", "discriminator_loss"):
        assert losses(resumed, name) == losses(whole, name)
    expected, found = (
        load_file(tmp_path / run / FINAL / "vocoder" / "model.safetensors")
        for run in ("whole", "parts")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ConfigurationError, match=r"^adversarial: 0.3, but"):
        train_vocoder(settings(sounds, tmp_path / "parts", *options, "adversarial=0.3"), True)


def test_a_short_sound_is_followed_by_silence(sounds: Path, tmp_path: Path):
    """A word of one syllable has to be learned, too."""
    path = write_sound(tmp_path / "short.wav", 0.1, 0)
    config = MelConfig.from_dict(new_config(settings(sounds, tmp_path)))
    example = read_wave(Recording("short", path), config, 16)
    wave = load_audio(path, sample_rate=24_000)
    assert len(example["mel"]) == 16 and len(example["wave"]) == 16 * config.hop_size
    assert np.array_equal(example["wave"][: len(wave)], wave)
    assert not example["wave"][len(wave) :].any()


def test_bad_data_and_settings_stop_before_training(sounds: Path, tmp_path: Path):
    data = tmp_path / "data.jsonl"
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no sound")
    lines = [{"audio": str(sounds / "0.wav")}, {"audio": str(broken)}]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"data.jsonl:2: .*broken.wav"):
        train_vocoder(settings(data, tmp_path / "run"))
    with pytest.raises(CheckpointError, match="size: upsample_rates and upsample_kernel_sizes"):
        train_vocoder(settings(sounds, tmp_path / "run", "size.rates=[8, 5, 12]"))
    with pytest.raises(ConfigurationError, match="crop_frames: 10 is less than half a window"):
        train_vocoder(
            settings(sounds, tmp_path / "run", "crop_frames=10", "size.rates=[8, 5]",
                     "size.kernels=[16, 9]")
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
