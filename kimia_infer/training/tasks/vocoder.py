"""Training of the vocoder on recordings alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimia_infer.audio.mel import MelConfig, log_mel
from kimia_infer.models.kimi_audio.checkpoint import VOCODER_FOLDER
from kimia_infer.models.kimi_audio.config import VocoderConfig
from kimia_infer.models.kimi_audio.vocoder import (
    AntiAliasedSnake,
    SnakeBeta,
    Vocoder,
    vocoder_component,
)
from kimia_infer.training.network import Losses
from kimia_infer.training.tasks.codec import (
    AveragedNetwork,
    Data,
    load_trainable,
    mixed_precision,
    train_component,
    write_component,
)
from kimia_infer.training.tasks.config import VocoderTrainingConfig
from kimia_infer.training.tasks.recordings import Example, Examples, Recording
from kimia_infer.training.tasks.vocoder_losses import (
    RESOLUTIONS,
    Discriminators,
    discriminator_loss,
    generator_losses,
    log_mels,
    stft_loss,
)
from kimia_infer.training.trainer import TrainingResult
from kimia_infer.utils.errors import ConfigurationError
from kimia_infer.weights.component import read_json

N_FFT = 1024  # published configuration
SAMPLE_RATE = 24_000  # published configuration
ADVERSARIAL = ("adversarial", "features", "discriminator")
FEATURE_WEIGHT = 2.0  # of the discriminators' features against their scores, as in HiFi-GAN


def train_vocoder(settings: VocoderTrainingConfig, resume: bool = False) -> TrainingResult:
    """:func:`train_component`; the result is in ``output/final/vocoder``."""
    initial = settings.initial and Path(settings.initial)
    source = initial / "config.json" if initial else Path("size")
    config = read_json(source) if initial else new_config(settings)
    sizes = VocoderConfig.from_dict(config, str(source))
    mel = MelConfig.from_dict(config, str(source))
    if settings.crop_frames * mel.hop_size <= max(RESOLUTIONS) // 2:  # reflected by the losses
        raise ConfigurationError(f"crop_frames: {settings.crop_frames} is less than half a window")

    def build(data: Data, folder: Path | None, device: torch.device) -> VocoderNetwork:
        if folder is not None:
            vocoder = load_trainable(vocoder_component(folder), device)
        else:
            vocoder = new_vocoder(sizes).to(device)
        return VocoderNetwork(vocoder, config, settings)

    read = partial(read_wave, mel=mel, crop_frames=settings.crop_frames)
    return train_component(settings, resume, VOCODER_FOLDER, read, build)


def read_wave(recording: Recording, mel: MelConfig, crop_frames: int) -> Example:
    """``mel`` fp32 [frames, mel_bins] and ``wave`` fp32 [frames * hop] of a recording.

    Silence fills a short one up to ``crop_frames``.
    """
    wave = torch.from_numpy(recording.load(mel.sample_rate))
    wave = F.pad(wave, (0, max(0, crop_frames * mel.hop_size - len(wave))))
    frames = log_mel(wave, mel)
    seconds = len(wave) / mel.sample_rate
    return {"mel": frames, "wave": wave[: len(frames) * mel.hop_size], "seconds": seconds}


class VocoderNetwork(AveragedNetwork[Vocoder]):
    """Random crops of recordings to losses; the average of the weights is validated and written.

    Generator and discriminators take their steps together, from one pass over both.
    """

    def __init__(self, vocoder: Vocoder, config: dict, settings: VocoderTrainingConfig):
        super().__init__(vocoder, settings.average)
        self.config, self.settings = config, settings
        self.mel = MelConfig.from_dict(config)
        self.discriminators = Discriminators() if settings.adversarial else None

    def forward(self, batch: Examples) -> Losses:
        mel, real = self._crops(batch, self.generator(batch))
        for module in self.trained.modules():
            if isinstance(module, AntiAliasedSnake):
                module.anti_aliased = self.progress >= self.settings.anti_aliased_from
        with mixed_precision(self.settings, mel.device):
            fake = self.module.generate(mel).float()
            found = dict.fromkeys(ADVERSARIAL, torch.zeros(len(fake), device=fake.device))
            if self.discriminators is not None:
                weight = self.settings.adversarial or 0.0
                adversarial, features = generator_losses(self.discriminators, fake, real)
                found["adversarial"] = weight * adversarial
                found["features"] = weight * FEATURE_WEIGHT * features
                found["discriminator"] = discriminator_loss(self.discriminators, fake, real)
        distance = (log_mels(fake, self.mel) - log_mels(real, self.mel)).abs().mean((1, 2))
        mel_loss = self.settings.mel_weight * distance
        return {"stft": stft_loss(fake, real), "mel": mel_loss, **found}

    def _crops(self, batch: Examples, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Mel [batch, frames, mel_bins] and wave [batch, samples] of a piece of every recording."""
        hop, size = self.mel.hop_size, self.settings.crop_frames
        mels, pieces = [], []
        for item in batch.items:
            last = len(item["mel"]) - size
            start = int(torch.randint(0, last + 1, (), generator=generator))
            mels.append(item["mel"][start : start + size])
            pieces.append(item["wave"][start * hop : (start + size) * hop])
        return torch.stack(mels), torch.stack(pieces)

    def blocks(self) -> Iterator[nn.Module]:
        yield from self.trained.resblocks

    def write(self, folder: Path) -> None:
        tensors = {}
        for name, value in self.means().items():
            if name.endswith(".weight"):
                # The published form, weight norm: length and direction.
                norm = torch.linalg.vector_norm(value, dim=(1, 2), keepdim=True)
                tensors |= {f"{name}_g": norm, f"{name}_v": value}
            else:
                tensors[name] = value
        write_component(folder / VOCODER_FOLDER, "config.json", self.config, tensors)


def new_config(settings: VocoderTrainingConfig) -> dict:
    """The published structure of ``config.json``."""
    size = settings.size
    return {
        "activation": "snakebeta",
        "fmax": size.fmax,
        "fmin": size.fmin,
        "hop_size": math.prod(size.rates),
        "n_fft": N_FFT,
        "num_freq": N_FFT + 1,
        "num_mels": size.mel_bins,
        "resblock": "1",
        "resblock_dilation_sizes": [list(size.dilations)] * len(size.block_kernels),
        "resblock_kernel_sizes": list(size.block_kernels),
        "sampling_rate": SAMPLE_RATE,
        "snake_logscale": True,
        "upsample_initial_channel": size.channels,
        "upsample_kernel_sizes": list(size.kernels),
        "upsample_rates": list(size.rates),
        "use_bias_at_final": False,
        "use_tanh_at_final": False,
        "win_size": N_FFT,
    }


def new_vocoder(config: VocoderConfig) -> Vocoder:
    """Untrained: activations begin with frequency and amplitude 1."""
    vocoder = Vocoder(config)
    for module in vocoder.modules():
        if isinstance(module, SnakeBeta):
            nn.init.zeros_(module.alpha)
            nn.init.zeros_(module.beta)
    return vocoder
