"""How well speech is recognized after each component of the codec."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soxr
import torch
from torch import Tensor
from tqdm import tqdm

from kimia_infer.api.response import SpeechPipeline
from kimia_infer.audio.files import SAMPLE_RATE, load_audio
from kimia_infer.audio.mel import MelConfig, log_mel
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.checkpoint import (
    DETOKENIZER_FOLDER,
    SPEECH_TOKENIZER_FOLDER,
    VOCODER_FOLDER,
)
from kimia_infer.models.kimi_audio.detokenizer import Detokenizer, Noise
from kimia_infer.models.kimi_audio.dit import dit_component
from kimia_infer.models.kimi_audio.speech_tokenizer import SpeechCodes, speech_tokenizer_component
from kimia_infer.models.kimi_audio.vocoder import vocoder_component
from kimia_infer.training.tasks.recordings import Recording
from scripts.miniature.recognizer import Heard, SpeechRecognizer

SEED = 0
CPU = torch.device("cpu")


class Codec:
    """Speech tokenizer, detokenizer and vocoder of a checkpoint, in float32 on the CPU.

    Args:
        directory: a checkpoint with the folders of these three components.
    """

    def __init__(self, directory: Path):
        tokenizer = directory / SPEECH_TOKENIZER_FOLDER
        module = speech_tokenizer_component(tokenizer).load(CPU, torch.float32)
        self.speech_codes = SpeechCodes(module, tokenizer)
        self.mel = MelConfig.from_directory(directory / VOCODER_FOLDER)
        self.vocoder = vocoder_component(directory / VOCODER_FOLDER).load(CPU, torch.float32)
        dit = dit_component(directory / DETOKENIZER_FOLDER).load(CPU, torch.float32)
        self.detokenizer = Detokenizer(dit, self.vocoder)

    @torch.inference_mode()
    def versions(self, sound: Recording) -> dict[str, np.ndarray]:
        """A recording and its reconstructions: float32 [samples] by name, at 16 kHz.

        "vocoded" is made from the spectrogram, those of :meth:`spoken` from speech codes.
        """
        original = load_audio(sound.path, sample_rate=SAMPLE_RATE)
        wave = torch.from_numpy(load_audio(sound.path, sample_rate=self.mel.sample_rate))
        vocoded = self._heard(self.vocoder(log_mel(wave, self.mel)))
        codes = self.speech_codes.encode(original)
        return {"original": original, "vocoded": vocoded} | self.spoken(codes)

    @torch.inference_mode()
    def spoken(self, codes: Tensor) -> dict[str, np.ndarray]:
        """Speech from codes int64 [n]: float32 [samples] at 16 kHz.

        "one-shot" uses the published chunks, "streamed" the small ones of the low-latency preset.
        """
        noise = self._noise()
        whole = self.detokenizer.synthesize(codes, noise)[0]
        pipeline = SpeechPipeline(self.detokenizer, noise, "low_latency", background=False)
        pipeline.feed(codes.tolist())
        pipeline.finish()
        pieces = torch.cat(list(pipeline.rest()))
        pipeline.close()
        return {"one-shot": self._heard(whole), "streamed": self._heard(pieces)}

    def _heard(self, wave: Tensor) -> np.ndarray:
        return soxr.resample(wave.numpy(), self.mel.sample_rate, SAMPLE_RATE)

    def _noise(self) -> Noise:
        randomness, bins = SeededRandomness(SEED), self.mel.mel_bins
        return lambda chunk, frames: randomness.noise(chunk, frames, bins)


def score_codec(
    codec: Codec, sounds: Iterable[Recording], recognizer: SpeechRecognizer
) -> dict[str, list[Heard]]:
    """Recognition results for every version of the recordings, which need texts."""
    heard: dict[str, list[Heard]] = {}
    for sound in tqdm(list(sounds), desc="Recognizing", unit=" sounds", disable=None):
        for name, wave in codec.versions(sound).items():
            heard.setdefault(name, []).append(recognizer.heard(sound.text, wave))
    return heard
