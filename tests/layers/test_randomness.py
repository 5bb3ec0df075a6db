"""Randomness is a function of its address alone."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kimia_infer.layers.sampler import MAX_SEED, SeededRandomness

seeds = st.integers(0, MAX_SEED)


@given(seeds, st.integers(0, 50), st.integers(51, 200))
def test_draws_do_not_depend_on_how_many_are_made(seed: int, few: int, many: int) -> None:
    for track in ("text", "audio"):
        longer = SeededRandomness(seed).uniforms(track, many)
        assert longer.dtype == torch.float64
        assert ((longer >= 0) & (longer < 1)).all()
        assert torch.equal(SeededRandomness(seed).uniforms(track, few), longer[:few])


@given(seeds)
def test_addresses_are_independent(seed: int) -> None:
    randomness = SeededRandomness(seed)
    text, audio = (randomness.uniforms(track, 64) for track in ("text", "audio"))
    noises = [randomness.noise(chunk, 8, 10) for chunk in range(3)]
    assert not torch.equal(text, audio)
    assert all(not torch.equal(noises[0], other) for other in noises[1:])
    assert torch.equal(SeededRandomness(seed).noise(2, 8, 10), noises[2])


def test_noise_is_standard_normal() -> None:
    noise = SeededRandomness(5).noise(1, 1000, 80)
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_a_seed_is_drawn_where_none_is_given() -> None:
    drawn = {SeededRandomness().seed for _ in range(4)}
    assert len(drawn) > 1
    assert all(0 <= seed <= MAX_SEED for seed in drawn)
