"""Who speaks when, in recordings that are made of Kokoro's voices."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kimia_infer.audio.files import load_audio
from kimia_infer.data.pipeline.diarization import Diarizer, cluster
from kimia_infer.data.pipeline.speech import SpeechDetector
from kimia_infer.data.pipeline.turns import merge_turns
from tests.data.pipeline.made import Utterance, conversation, trimmed
from tests.data.pipeline.scoring import boundary_distances, errors
from tests.models.kokoro.spoken import SPOKEN


def test_three_speakers(models: Path) -> None:
    voices = [trimmed(Utterance(load_audio(s.path), s.voice, s.text)) for s in SPOKEN]
    made = conversation(voices, 3, 45)
    found = Diarizer(models).turns(made.wave, SpeechDetector().speech(made.wave))
    assert {turn.speaker for turn in found} == {0, 1, 2}
    assert errors(made.turns, found).rate < 0.15
    distances = boundary_distances(merge_turns(made.turns), merge_turns(found))
    assert np.mean(distances <= 0.3) > 0.95


def test_nobody_speaks_in_silence(models: Path) -> None:
    silence = np.zeros(32_000, np.float32)
    assert SpeechDetector().speech(silence) == []
    assert Diarizer(models).turns(silence, []) == []


def test_unsure_voices_join_the_nearest_speaker() -> None:
    angles = np.radians([0, 5, 90, 95, 30])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    sure = np.array([True, True, True, True, False])
    assert cluster(vectors, sure).tolist() == [0, 0, 1, 1, 0]
    assert cluster(vectors[:1], sure[-1:]).tolist() == [0]
