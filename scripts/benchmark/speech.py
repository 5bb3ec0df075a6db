"""Speech synthesis and the audio encoders, each alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import CODES_PER_SECOND
from kimia_infer.audio.decode import SAMPLE_RATE
from kimia_infer.layers.onednn import use_onednn
from kimia_infer.models.kimi_audio.detokenizer import Detokenizer
from kimia_infer.models.kimi_audio.flow import Noise
from kimia_infer.utils.randomness import SeededRandomness
from scripts.benchmark.plain_detokenizer import PlainVocoder, synthesize
from scripts.benchmark.timing import medians

SEED = 0
SPEECH_CODES = 60  # two published chunks
VOCODER_FRAMES = 120  # about what a chunk brings
FRAMES_PER_SECOND = 50


def utterance(detokenizer: Detokenizer) -> tuple[Tensor, Noise]:
    """Random codes int64 [SPEECH_CODES] and the noise to speak them from."""
    randomness, mel_bins = SeededRandomness(SEED), detokenizer.dit.config.mel_bins
    generator = torch.Generator().manual_seed(SEED)
    codes = torch.randint(detokenizer.dit.config.codes, (SPEECH_CODES,), generator=generator)
    return codes, lambda chunk, frames: randomness.noise(chunk, frames, mel_bins)


def compare_speech(detokenizer: Detokenizer, runs: int) -> list[dict]:
    """Codes to wave, and the vocoder alone, beside the plain implementation; interleaved."""
    use_onednn(detokenizer.dit)  # as KimiAudio does; the plain one reads parameters only
    device = detokenizer.dit.device
    codes, noise = utterance(detokenizer)
    mel = noise(0, VOCODER_FRAMES).to(device, detokenizer.vocoder.dtype)
    plain_vocoder = PlainVocoder(detokenizer.vocoder)
    pairs = {
        "detokenizer + vocoder": (
            SPEECH_CODES / CODES_PER_SECOND,
            lambda: synthesize(detokenizer, codes, noise),
            lambda: detokenizer.synthesize(codes, noise),
        ),
        "vocoder alone": (
            VOCODER_FRAMES / FRAMES_PER_SECOND,
            lambda: plain_vocoder(mel),
            lambda: detokenizer.vocoder(mel),
        ),
    }
    rows = []
    for name, (audio_seconds, plain, ours) in tqdm(pairs.items(), desc="Speech", disable=None):
        plain_seconds, seconds = medians([plain, ours], runs, device)
        rows.append(
            {
                "name": name,
                "audio_seconds": audio_seconds,
                "plain_seconds": plain_seconds,
                "seconds": seconds,
                "ratio_to_plain": plain_seconds / seconds,
                "real_time_factor": seconds / audio_seconds,
            }
        )
    return rows


def measure_encoders(model: KimiAudio, wave: np.ndarray, runs: int) -> list[dict]:
    """Both encoders alone and as a request runs them, on a wave [samples] at 16 kHz."""
    actions = {
        "speech codes": lambda: model.speech_codes.encode(wave),
        "Whisper": lambda: model.whisper_features.encode(wave),
        "both, as in a request": lambda: model.encoder.encode_waves({0: wave}, [0]),
    }
    audio_seconds = len(wave) / SAMPLE_RATE
    return [
        {
            "name": name,
            "audio_seconds": audio_seconds,
            "seconds": seconds,
            "real_time_factor": seconds / audio_seconds,
        }
        for name, seconds in zip(
            actions, medians(list(actions.values()), runs, model.device), strict=True
        )
    ]
