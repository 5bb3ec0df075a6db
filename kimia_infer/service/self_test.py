"""One short answer before the first request: a service that starts can speak."""

from __future__ import annotations

import logging
import math
import time

import torch

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.request import parse_options
from kimia_infer.audio.wav import wav_bytes

log = logging.getLogger(__name__)

STEPS = 24
SOUND_RATE = 16_000


class SelfTestError(RuntimeError):
    """The loaded model gives no usable answer; the message says what is wrong."""


def self_test(model: KimiAudio) -> None:
    """Have ``model`` answer a synthetic sound, with text alone and with speech.

    Raises SelfTestError if it fails or its wave is empty or not finite.
    """
    started = time.perf_counter()
    chat = [{"role": "user", "message_type": "audio", "content": _sound()}]
    try:
        model.complete(chat, parse_options(output_type="text", max_new_tokens=STEPS, seed=0))
        options = parse_options(output_type="both", max_new_tokens=STEPS, seed=0)
        wave = model.complete(chat, options).wav
        if wave is None:
            # A model may choose to say nothing; the detokenizer is tried all the same.
            wave = model.detokenize_audio(torch.zeros(1, STEPS, dtype=torch.long), seed=0)
    except Exception as error:
        raise SelfTestError(f"self-test: {type(error).__name__}: {error}") from error
    if wave.numel() == 0 or not torch.isfinite(wave).all():
        raise SelfTestError(
            f"self-test: the answer is no finite wave but {_describe(wave)}; the weights are "
            f"damaged, or {model.dtype} does not suit {model.device}"
        )
    log.info("Self-test passed in %.1f s", time.perf_counter() - started)


def _sound() -> bytes:
    """One second of a rising tone as a wav file."""
    time_axis = torch.linspace(0, 1, SOUND_RATE)
    wave = 0.3 * torch.sin(2 * math.pi * (200 + 150 * time_axis) * time_axis)
    return wav_bytes(wave, SOUND_RATE)


def _describe(wave: torch.Tensor) -> str:
    bad = int((~torch.isfinite(wave)).sum())
    return f"{wave.numel()} samples, {bad} of them not finite"
