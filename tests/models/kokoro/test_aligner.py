"""Phonemes found in recordings of Kokoro's own speech, whose durations are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kimia_infer.audio.files import load_audio
from kimia_infer.models.kokoro.aligner import Aligner, best_durations, load_aligner
from kimia_infer.models.kokoro.config import SAMPLE_RATE
from kimia_infer.models.kokoro.measures import energy_of, mel_power, pitch_of
from tests.models.kokoro.spoken import SPOKEN, Spoken


@pytest.fixture(scope="module")
def aligner() -> Aligner:
    return load_aligner()


@pytest.mark.parametrize("spoken", SPOKEN, ids=lambda spoken: spoken.voice)
@pytest.mark.parametrize("level", [1.0, 0.02])
def test_symbols_begin_where_kokoro_began_them(
    aligner: Aligner, spoken: Spoken, level: float
) -> None:
    wave = load_audio(spoken.path, sample_rate=SAMPLE_RATE)
    found = aligner.align(mel_power(level * wave), spoken.phonemes)
    errors = (found.durations.cumsum(0) - spoken.durations.cumsum(0)).abs()
    assert found.durations.min() >= 1
    assert errors[-1] == 0
    assert errors.median() == 0
    assert (errors <= 2).float().mean() > 0.9


def test_a_wrong_text_does_not_fit(aligner: Aligner) -> None:
    for spoken, other in itertools.permutations(SPOKEN, 2):
        power = mel_power(load_audio(spoken.path, sample_rate=SAMPLE_RATE))
        right = aligner.align(power, spoken.phonemes).fit
        wrong = aligner.align(power, other.phonemes[: len(power) // 2 - 2]).fit
        assert 1.5 * wrong < right


@pytest.mark.parametrize("seed", range(5))
def test_durations_are_the_best_of_all(seed: int) -> None:
    """Against every way through the symbols."""
    scores = np.random.default_rng(seed).standard_normal((7, 4))
    ways = [
        (*cuts, 7)
        for cuts in itertools.combinations(range(1, 7), 3)
    ]  # fmt: skip
    durations = [np.diff((0, *way)) for way in ways]
    sums = [scores[range(7), np.repeat(range(4), each)].sum() for each in durations]
    assert best_durations(scores).tolist() == durations[int(np.argmax(sums))].tolist()


def test_fewer_frames_than_symbols_are_refused() -> None:
    assert best_durations(np.zeros((3, 3))).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="4 symbols, but 3 frames"):
        best_durations(np.zeros((3, 4)))


@pytest.mark.parametrize("spoken", SPOKEN, ids=lambda spoken: spoken.voice)
def test_pitch_and_energy_are_those_that_kokoro_spoke(spoken: Spoken) -> None:
    wave = load_audio(spoken.path, sample_rate=SAMPLE_RATE)
    pitch, energy = pitch_of(wave), energy_of(mel_power(wave))
    assert len(pitch) == len(energy) == 2 * spoken.durations.sum()
    both = (pitch > 0) & (spoken.pitch > 50)
    assert both.sum() > 0.5 * (spoken.pitch > 50).sum()
    cents = 1200 * torch.log2(pitch[both] / spoken.pitch[both])
    assert cents.abs().median() < 40
    assert energy[both].mean() == pytest.approx(spoken.energy[both].mean(), abs=1.0)
    assert (energy - spoken.energy)[both].std() < 1.2
    longer, quieter = np.pad(wave, (0, 5 * 600)), 0.1 * wave
    assert len(pitch_of(longer)) == len(pitch) + 10
    shift = energy_of(mel_power(quieter))[both] - energy[both]
    assert shift.mean() == pytest.approx(2 * np.log(0.1), abs=0.05)
