"""The order of samples and the course of the learning rate."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimia_infer.training.plan import POOL_STEPS, StepPlan, learning_rate_factor

sizes = st.integers(1, 4)


@given(st.integers(1, 40), sizes, sizes, sizes, st.integers(0, 9))
def test_an_epoch_uses_every_sample_once(
    samples: int, batch_size: int, accumulation: int, processes: int, seed: int
):
    plan = StepPlan(samples, batch_size, accumulation, processes, seed)
    counted: Counter[int] = Counter()
    for step in range(plan.steps_per_epoch):
        ranks = [plan.micro_batches(step, rank) for rank in range(processes)]
        assert len({len(passes) for passes in ranks}) == 1  # all take part in all passes
        share = 0.0
        for passes in ranks:
            for part in passes:
                assert 0 < len(part.indices) <= batch_size
                share += sum(part.weights)
                counted.update(i for i, w in zip(part.indices, part.weights, strict=True) if w)
        assert share == pytest.approx(processes)
    assert counted == Counter(range(samples))


@given(st.integers(1, 40), sizes, sizes)
def test_a_step_does_not_depend_on_how_it_is_divided(samples: int, size: int, parts: int):
    whole = StepPlan(samples, size * parts, 1, 1, 3)
    for divided in (StepPlan(samples, size, parts, 1, 3), StepPlan(samples, size, 1, parts, 3)):
        for step in range(2 * whole.steps_per_epoch):
            (expected,) = whole.micro_batches(step, 0)
            found = [
                index
                for rank in range(divided.processes)
                for part in divided.micro_batches(step, rank)
                for index, weight in zip(part.indices, part.weights, strict=True)
                if weight
            ]
            assert sorted(found) == sorted(expected.indices)


@given(st.integers(1, 400), sizes, sizes, st.integers(0, 9))
def test_samples_of_similar_length_share_a_step(
    samples: int, batch_size: int, accumulation: int, seed: int
):
    lengths = [(7 * index) % 101 for index in range(samples)]
    plan = StepPlan(samples, batch_size, accumulation, 1, seed, lengths=lengths)
    steps = [
        sorted(lengths[i] for part in plan.micro_batches(step, 0) for i in part.indices)
        for step in range(plan.steps_per_epoch)
    ]
    assert sorted(length for step in steps for length in step) == sorted(lengths)
    assert [len(step) for step in steps[:-1]] == [plan.step_size] * (len(steps) - 1)
    for first in range(0, len(steps), POOL_STEPS):  # nothing lies between those of a step
        spans = sorted((step[0], step[-1]) for step in steps[first : first + POOL_STEPS])
        assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_short_steps_do_not_come_first():
    plan = StepPlan(400, 4, 1, 1, 0, lengths=range(400))
    firsts = [min(plan.micro_batches(step, 0)[0].indices) for step in range(2 * POOL_STEPS)]
    assert firsts != sorted(firsts)
    assert firsts == [
        min(StepPlan(400, 2, 2, 1, 0, lengths=range(400)).micro_batches(step, 0)[0].indices)
        for step in range(2 * POOL_STEPS)
    ]


def test_epochs_and_seeds_differ():
    plan = StepPlan(50, 50, 1, 1, 0)
    first, second = (plan.micro_batches(step, 0)[0].indices for step in (0, 1))
    other = StepPlan(50, 50, 1, 1, 7).micro_batches(0, 0)[0].indices
    assert len({first, second, other, tuple(range(50))}) == 4
    kept = StepPlan(50, 50, 1, 1, 0, shuffle=False)
    assert kept.micro_batches(0, 0)[0].indices == tuple(range(50))


def test_the_learning_rate_rises_and_falls():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:11] == pytest.approx([*(i / 10 for i in range(1, 11)), 1.0])
    assert all(a > b > 0 for a, b in pairwise(factors[10:]))
    assert factors[55] == pytest.approx(0.5)
    assert learning_rate_factor(0, 1, 0.0) == 1.0
    assert learning_rate_factor(0, 1, 1.0) == 1.0
