"""Half an hour of conversations of two to four of Kokoro's voices, with --long."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kimia_infer.data.pipeline.diarization import Diarizer
from kimia_infer.data.pipeline.speech import SpeechDetector
from kimia_infer.data.pipeline.turns import merge_turns
from scripts.benchmark.ear_sentences import SENTENCES
from tests.data.pipeline.made import Utterance, conversation, trimmed
from tests.data.pipeline.scoring import boundary_distances, errors

VOICES = (
    "af_heart", "am_michael", "bf_emma", "bm_george", "af_bella", "am_fenrir", "bf_isabella",
    "bm_fable",
)  # fmt: skip
"""Those that follow each other are different people; some further apart are mixtures alike."""
EACH, MINUTES = 4, 3
RECORDINGS = 10


@pytest.fixture(scope="module")
def spoken(long: bool) -> list[Utterance]:
    """Two sentences each, EACH times in every voice."""
    if not long:
        pytest.skip("Kokoro speaks for two minutes, with --long")
    pytest.importorskip("onnx")
    from kimia_infer.api.events import AudioChunk
    from kimia_infer.api.kokoro import Kokoro
    from kimia_infer.audio.native import resample
    from kimia_infer.models.kokoro.config import SAMPLE_RATE as KOKORO_RATE
    from kimia_infer.models.kokoro.packages import build_from_packages
    from kimia_infer.utils.errors import WeightsError

    try:
        kokoro = Kokoro(build_from_packages())
    except WeightsError as error:
        pytest.skip(f"the packages with Kokoro's weights cannot be had here: {error}")
    found = []
    for index in range(EACH * len(VOICES)):
        voice, text = VOICES[index % len(VOICES)], " ".join(SENTENCES[2 * index : 2 * index + 2])
        parts = [e.wav for e in kokoro.stream(text, voice=voice) if isinstance(e, AudioChunk)]
        wave = resample(torch.cat(parts).float().reshape(-1), KOKORO_RATE, 16_000)
        found.append(trimmed(Utterance(wave.numpy(), voice, text)))
    return found


def test_speakers_and_boundaries(spoken: list[Utterance], models: Path) -> None:
    detector, diarizer = SpeechDetector(), Diarizer(models)
    wrong, speech, distances = 0.0, 0.0, []
    for seed in range(RECORDINGS):
        first, count = seed % len(VOICES), 2 + seed % 3
        voices = (*VOICES, *VOICES)[first : first + count]
        mine = [utterance for utterance in spoken if utterance.voice in voices]
        made = conversation(mine, seed, 60 * MINUTES, noise_db=(-30.0, -20.0)[seed % 2])
        found = diarizer.turns(made.wave, detector.speech(made.wave))
        score = errors(made.turns, found)
        wrong, speech = wrong + score.rate * score.speech, speech + score.speech
        distances.append(boundary_distances(merge_turns(made.turns), merge_turns(found)))
    assert wrong / speech < 0.15
    assert np.mean(np.concatenate(distances) <= 0.3) > 0.95
