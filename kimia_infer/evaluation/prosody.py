"""How near the prosody of an adapted Kokoro is to that of its teacher."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kimia_infer.models.kokoro.layers import Rows
from kimia_infer.models.kokoro.prosody import ProsodyPredictor, repeat_phonemes, round_durations
from kimia_infer.training.tasks.kokoro_data import Example

VOICED = 10.0
"""Hz above which the source of the decoder has a pitch."""


@dataclass(frozen=True)
class ProsodyAgreement:
    """Means over all phonemes or frames; pitch and energy with the durations of the teacher.

    ``equal`` and ``within_one`` are shares of durations after rounding, the latter in frames;
    ``length`` is the length of everything, relative to the teacher's. ``cents`` is the mean
    difference of pitch where both are voiced, ``voicing`` the share of equal decisions, ``energy``
    the mean difference of energy, whose standard deviation is ``energy_deviation``.
    """

    equal: float
    within_one: float
    length: float
    cents: float
    voicing: float
    energy: float
    energy_deviation: float


@torch.no_grad()
def prosody_agreement(predictor: ProsodyPredictor, examples: Iterable[Example]) -> ProsodyAgreement:
    """Of what ``predictor`` says to examples, against the teacher's answers in them."""
    durations: list[Tensor] = []
    curves: list[Tensor] = []
    for example in examples:
        encoded, style = example.encoded[None], example.style[None]
        d = predictor.text_encoder(encoded, style, Rows())
        logits = predictor.durations(d, Rows())
        found = round_durations(logits, logits.new_ones(1), Rows())[0]
        durations.append(torch.stack([found, example.durations]))
        frames = repeat_phonemes(d, example.durations[None], int(example.durations.sum()))
        pitch, energy = predictor.curves(frames, style, Rows())
        curves.append(torch.stack([pitch[0], example.pitch, energy[0], example.energy]))
    found, taught = torch.cat(durations, dim=1)
    pitch, pitch_taught, energy, energy_taught = torch.cat(curves, dim=1)
    voiced, voiced_taught = pitch > VOICED, pitch_taught > VOICED
    both = voiced & voiced_taught
    cents = 1200 * torch.log2(pitch[both] / pitch_taught[both])
    values = (
        (found == taught).float().mean(),
        ((found - taught).abs() <= 1).float().mean(),
        found.sum() / taught.sum(),
        cents.abs().mean(),
        (voiced == voiced_taught).float().mean(),
        (energy - energy_taught).abs().mean(),
        energy_taught.std(),
    )
    return ProsodyAgreement(*(float(value) for value in values))
