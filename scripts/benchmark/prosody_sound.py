"""How adapted prosody sounds, for scripts/bench_adapters: words by Whisper, and naturalness."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kimia_infer.audio.files import SAMPLE_RATE as HEARD_RATE
from kimia_infer.audio.native import resample
from kimia_infer.data.manifests import WER
from kimia_infer.evaluation.items import Item
from kimia_infer.evaluation.score import score, summarize
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kokoro.config import HARMONICS, SAMPLE_RATE
from kimia_infer.models.kokoro.network import batch_of
from scripts.benchmark import ear
from scripts.benchmark.prosody_figures import TEXTS, Candidate, Figures

SPOKEN = {"short": 12, "longest": 1}
"""How many of the sentences are spoken; speaking takes most of the time."""

PACKAGES = {**ear.PACKAGES, "speechmos.dnsmos": "speechmos==0.0.1.1 librosa requests"}


class Listener:
    """Whisper tiny.en, and DNSMOS, a score of speech without a reference (1 .. 5).

    Raises CheckpointError naming the packages that are missing; they are in none of the
    requirements.
    """

    def __init__(self) -> None:
        self._mos = ear.imported(PACKAGES, "the stage sound")["speechmos.dnsmos"]
        self.words = ear.Ear("the stage sound").words

    def naturalness(self, wave: np.ndarray) -> float:
        """Mean opinion score of ITU-T P.808 that DNSMOS predicts, of samples at 16 kHz."""
        return float(self._mos.run(wave, HEARD_RATE, return_df=False)["p808_mos"])


def listen(figures: Figures, listener: Listener, candidate: Candidate) -> dict[str, Any]:
    """The row of a candidate: word errors in percent and scores, by length of the sentences."""
    network = figures.trainings.network
    plain = network.predictor
    network.predictor = figures.predictor(candidate)
    row: dict[str, Any] = candidate.labels
    try:
        for name, count in SPOKEN.items():
            scores, opinions = [], []
            pairs = zip(TEXTS[name][:count], figures.phonemes[name], strict=False)
            for index, (text, phonemes) in enumerate(pairs):
                wave = resample(
                    _speak(figures, candidate, phonemes, index), SAMPLE_RATE, HEARD_RATE
                )
                samples = wave.clamp(-1, 1).numpy()
                item = Item("sentences", name, str(index), WER, [], text, "en")
                scores.append(score(item, listener.words(samples)))
                opinions.append(listener.naturalness(samples))
            summary = summarize(WER, scores)
            words = {"word_errors": summary["score"], "words": summary["reference_length"]}
            row[name] = {**words, "naturalness": statistics.mean(opinions)}
    finally:
        network.predictor = plain
    return row


@torch.inference_mode()
def _speak(figures: Figures, candidate: Candidate, phonemes: str, index: int) -> Tensor:
    """The wave of a sentence, float32 [samples] at 24 kHz.

    Of ``teacher``, the prosody is that of the teacher's voice and the timbre the learner's.
    """
    trainings, study = figures.trainings, figures.study
    network = trainings.network
    ids, rows = batch_of([[network.config.vocab[s] for s in phonemes]], network.device)
    replacing = candidate.task == "replace"
    voice = study.unheard if replacing else study.voice
    style = trainings.voices.style(voice, len(phonemes))
    if candidate.kind == "teacher":
        taught = trainings.voices.style(study.teacher, len(phonemes))
        style = torch.cat([style.chunk(2)[0], taught.chunk(2)[1]])
    prosody = network.prosody(ids, style[None], torch.ones(1), rows)
    randomness = SeededRandomness(0)
    (wave,) = network.waves(
        prosody, style[None], lambda _, samples: randomness.noise(index, samples, HARMONICS)
    )
    return wave
