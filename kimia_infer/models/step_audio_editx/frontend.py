"""A recording to what the model is given of it: the wave of the tokenizers, spectrograms.

Steps, constants and their order are those of the published implementation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.audio.fbank import kaldi_fbank, povey_window
from kimia_infer.audio.mel import MelConfig, log_mel, mel_filters
from kimia_infer.audio.native import resample

RATE = 16_000
"""Hz of what the tokenizers and the speaker encoder hear."""

LOUDEST = 0.6
FULL_LEVEL, LOWEST_PEAK = 0.999, 0.01

TRIM_FRAME, TRIM_HOP = 512, 128
TRIM_DB = 20.0
POWER_FLOOR = 1e-10
LEAD = 800
"""Samples that are kept before the first sound: 50 ms."""
TAIL = 4320
"""Samples that the trimmed wave is longer than its sound: 50 ms before and 220 ms behind it."""
TRIM_STEP = 240
"""The length of the sound is rounded up to multiples of these 15 ms."""

PROMPT_MEL = MelConfig(24_000, 1920, 1920, 480, 80, 0, 8000)
"""What the flow continues: 50 frames a second."""

WHISPER_MEL = MelConfig(RATE, 400, 400, 160, 128, 0, RATE / 2)


def limit_level(wave: Tensor) -> Tensor:
    """``wave`` [samples] with no peak above 0.6."""
    peak = wave.abs().max()
    return wave / peak * LOUDEST if peak > LOUDEST else wave


def prompt_mel(wave: Tensor, rate: int) -> Tensor:
    """float32 [frames, bins] of a wave at ``rate`` Hz, whose level is limited; not trimmed."""
    return log_mel(resample(wave, rate, PROMPT_MEL.sample_rate), PROMPT_MEL)


def speaker_features(wave: Tensor, rate: int) -> Tensor:
    """float32 [frames, 80] for the speaker encoder: their mean over time is zero; not trimmed."""
    found = kaldi_fbank(resample(wave, rate, RATE), povey_window(wave.device))
    return found - found.mean(0, keepdim=True)


def tokenizer_wave(wave: Tensor, rate: int) -> Tensor:
    """The wave at 16 kHz that both tokenizers read: at full level, without silent ends."""
    wave = resample(wave, rate, RATE)
    return trim(wave / wave.abs().max().clamp(min=LOWEST_PEAK) * FULL_LEVEL)


def trim(wave: Tensor) -> Tensor:
    """The sound of a wave at 16 kHz, with fixed margins; zeros where the wave has no more.

    The sound is where frames are at most 20 dB below the loudest one.
    """
    begin, end = _sound(wave)
    length = -(-(end - begin) // TRIM_STEP) * TRIM_STEP + TAIL
    start = begin - LEAD
    kept = wave[max(start, 0) : start + length]
    before = max(-start, 0)
    return F.pad(kept, (before, length - before - len(kept)))


def _sound(wave: Tensor) -> tuple[int, int]:
    """The half-open range of samples with sound; of silence, all."""
    padded = F.pad(wave, (TRIM_FRAME // 2, TRIM_FRAME // 2))
    power = padded.unfold(0, TRIM_FRAME, TRIM_HOP).square().mean(1).clamp(min=POWER_FLOOR)
    level = 10 * (power / power.max()).log10()
    loud = (level > -TRIM_DB).nonzero()
    first, last = int(loud[0]), int(loud[-1])
    return first * TRIM_HOP, min(len(wave), (last + 1) * TRIM_HOP)


def whisper_mel(wave: Tensor) -> Tensor:
    """float32 [128, samples // 160] of a wave at 16 kHz, as Whisper computes it, without padding.

    Values more than 8 decades below the largest are raised.
    """
    window = torch.hann_window(WHISPER_MEL.win_size, device=wave.device)
    spectrum = torch.stft(
        wave, WHISPER_MEL.n_fft, WHISPER_MEL.hop_size, window=window, return_complex=True
    )
    power = spectrum[:, :-1].abs().square()
    found = (mel_filters(WHISPER_MEL, wave.device).T @ power).clamp(min=1e-10).log10()
    return (found.maximum(found.max() - 8) + 4) / 4
