"""Waveform to mel frames, as the vocoder was trained on them; only reference voices need it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.component import read_json

# Floors of the magnitude (squared) and of the mel energy; published implementation.
POWER_FLOOR = 1e-9
MEL_FLOOR = 1e-5


@dataclass(frozen=True)
class MelConfig:
    """Analysis of the spectrogram; window and hop in samples, band limits in Hz."""

    sample_rate: int
    n_fft: int
    win_size: int
    hop_size: int
    mel_bins: int
    fmin: float
    fmax: float

    @classmethod
    def from_dict(cls, values: dict, source: str = "config.json") -> MelConfig:
        """Build from the vocoder's fields; raises CheckpointError naming a bad field.

        ``fmax`` may be null, which means half the sampling rate.
        """

        def number(name: str, lowest: float = 1, kinds: Any = int) -> Any:
            value = values.get(name)
            if isinstance(value, bool) or not isinstance(value, kinds) or value < lowest:
                raise CheckpointError(
                    f"{source}: {name} must be a number from {lowest} up, found {value!r}"
                )
            return value

        rate = number("sampling_rate")
        return cls(
            sample_rate=rate,
            n_fft=number("n_fft"),
            win_size=number("win_size"),
            hop_size=number("hop_size"),
            mel_bins=number("num_mels"),
            fmin=number("fmin", 0, int | float),
            fmax=rate / 2 if values.get("fmax") is None else number("fmax", 1, int | float),
        )

    @classmethod
    def from_directory(cls, directory: Path) -> MelConfig:
        """Read ``config.json`` of the checkpoint's ``vocoder`` folder."""
        path = directory / "config.json"
        return cls.from_dict(read_json(path), str(path))


@functools.cache
def mel_filters(config: MelConfig, device: torch.device) -> Tensor:
    """Weights of the frequencies in every band, fp32 [n_fft // 2 + 1, mel_bins]."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=config.n_fft // 2 + 1,
        num_mel_filters=config.mel_bins,
        min_frequency=config.fmin,
        max_frequency=config.fmax,
        sampling_rate=config.sample_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    with torch.inference_mode(False):  # kept, and gradients may pass through it later
        return torch.from_numpy(filters).float().to(device)


def log_mel(wave: Tensor, config: MelConfig) -> Tensor:
    """Natural-log mel spectrogram, fp32 [samples // hop_size, mel_bins], of a wave [samples].

    The wave is mono at ``config.sample_rate``. Raises ValueError if it is shorter than the
    reflected edge.
    """
    edge = (config.n_fft - config.hop_size) // 2
    if wave.ndim != 1 or len(wave) <= edge:
        raise ValueError(
            f"the reference voice must be a mono wave of more than {edge} samples, "
            f"found shape {list(wave.shape)}"
        )
    padded = F.pad(wave.float()[None], (edge, edge), mode="reflect")[0]
    spectrum = torch.stft(
        padded,
        config.n_fft,
        hop_length=config.hop_size,
        win_length=config.win_size,
        window=torch.hann_window(config.win_size, device=wave.device),
        center=False,
        return_complex=True,
    )
    magnitude = (torch.view_as_real(spectrum).square().sum(-1) + POWER_FLOOR).sqrt()
    return (magnitude.T @ mel_filters(config, wave.device)).clamp(min=MEL_FLOOR).log()
