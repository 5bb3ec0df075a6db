"""What a decode step reads, and how steps are timed and compared."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kimia_infer.layers.operators import use_onednn
from kimia_infer.models.kimi_audio.language_model import (
    LanguageModel,
    language_model_component,
)
from scripts.benchmark import decoding
from scripts.benchmark.measuring import BOTH, MODES, step_bytes

STEPS = 64


@pytest.fixture(scope="module")
def model(golden: Path) -> LanguageModel:
    return language_model_component(golden / "llm").load(torch.device("cpu"), torch.float32)


class ReadWeights(TorchDispatchMode):
    """Records every part of a parameter that an operation reads."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.table = model.embedding.weight.untyped_storage().data_ptr()
        self.parts: dict[tuple[int, int], int] = {}
        self.embedded = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in filter(torch.is_tensor, torch.utils._pytree.tree_leaves((args, kwargs))):
                storage = tensor.untyped_storage().data_ptr()
                if storage == self.table:
                    self.embedded += result.nbytes
                elif storage in self.parameters:
                    self.parts[storage, tensor.storage_offset()] = tensor.nbytes
        return result


@pytest.mark.parametrize("head_rows", ["track", "full"])
@pytest.mark.parametrize("mode", MODES)
def test_step_bytes_are_what_a_step_reads(mode: str, head_rows: str, model: LanguageModel) -> None:
    steps = decoding.first_timed_step(model.device) + 1
    model = model.with_cut_heads() if head_rows == "track" else model
    loop = decoding.library_loop(decoding.library_decoder(model, steps), mode, steps)
    run = loop.run()
    while loop.launched < steps - 1:
        next(run)
    with ReadWeights(model) as read:
        next(run)
    assert loop.launched == steps
    weights = sum(read.parts.values()) + read.embedded
    assert step_bytes(model, mode, filled=0) == weights
    # Only layers that run read their cache; with both tracks all of it.
    cache = step_bytes(model, mode, filled=10) - weights
    config = model.config
    values = 2 * config.total_layers * config.kv_heads * config.head_dim * 10
    whole_bytes = values * model.dtype.itemsize
    assert (cache == whole_bytes) == (mode == BOTH) and 0 < cache <= whole_bytes
    narrow = step_bytes(model, mode, 10, torch.float8_e4m3fn) - weights
    assert narrow * model.dtype.itemsize == cache


def test_step_bytes_count_with_onednn_layers(model: LanguageModel) -> None:
    with_onednn = copy.deepcopy(model)
    use_onednn(with_onednn, min_elements=0)
    for mode in MODES:
        assert step_bytes(with_onednn, mode, filled=10) == step_bytes(model, mode, filled=10)


def test_all_loops_are_timed_and_the_plain_one_agrees(model: LanguageModel) -> None:
    table = decoding.compare_decoding(model, STEPS, runs=1)
    assert len(table.rows) == 1 + 2 * len(MODES)
    assert f"in the first {STEPS} of {STEPS} steps" in table.notes[1]
    plain = table.rows[0]
    assert plain["ratio"] == 1
    for row in table.rows:
        assert row["GB/s"] == pytest.approx(row["MB/step"] / row["ms/step"])
        assert row["ratio"] == pytest.approx(plain["ms/step"] / row["ms/step"], rel=1e-6)


def every_contender(model: LanguageModel) -> list[decoding.Contender]:
    cut = model.with_cut_heads()
    return [
        decoding.plain_contender(model, STEPS),
        *decoding.contenders("library", cut, "track", STEPS),
        *decoding.contenders("library", model, "full", STEPS),
    ]


def test_turns_cover_a_run_once(model: LanguageModel) -> None:
    """Every step after the first few is timed once, however the run is cut in turns."""
    for contender in every_contender(model):
        for turn in (3, None):
            contender.seconds.clear()
            contender.begin()
            turns = 1
            while contender.take_turn(turn):
                turns += 1
            assert turns == (1 if turn is None else -(-(STEPS + 1) // turn))
            assert contender.loop.launched == STEPS
            assert len(contender.seconds) == STEPS - decoding.first_timed_step(model.device)


def test_generations_together_are_those_alone(model: LanguageModel) -> None:
    """One of three stands for all: they have the same prompt."""
    decoder = decoding.Decoder(
        model, decoding.random_prompt(model)[1], decoding.PROMPT_LENGTH + STEPS, slots=3
    )
    loops = [decoding.library_loop(decoder, BOTH, STEPS) for _ in range(4)]
    together = decoding.Together(decoder, loops[:3])
    launched = [together.launched for _ in together.run()]
    assert launched == [1, *range(2, STEPS + 1)] and decoder.running == []
    for _ in loops[3].run():
        pass
    for loop in loops[:3]:
        assert loop.text_ids == loops[3].text_ids and loop.audio_ids == loops[3].audio_ids


def test_steps_of_a_batch_are_those_of_all_its_rows(model: LanguageModel) -> None:
    rows = decoding.compare_batches(model, [1, 2], STEPS, runs=1).rows
    assert [row["rows"] for row in rows] == [1, 2] and rows[0]["ratio"] == 1
    for row in rows:
        assert row["steps/s in all"] == pytest.approx(row["rows"] * row["steps/s of each"])
        assert row["steps/s of each"] == pytest.approx(1000 / row["ms/step"])
    assert rows[1]["ratio"] == pytest.approx(rows[1]["steps/s in all"] / rows[0]["steps/s in all"])


def test_equal_steps_stops_at_the_first_difference(model: LanguageModel) -> None:
    decoder, delay = decoding.library_decoder(model, STEPS), model.config.audio_delay
    loops = [decoding.library_loop(decoder, BOTH, STEPS) for _ in range(2)]
    for loop in loops:
        for _ in loop.run():
            pass
    assert decoding.equal_steps(*loops, delay) == STEPS
    loops[0].audio_ids[5] += 1
    assert decoding.equal_steps(*loops, delay) == delay + 5
    loops[1].text_ids[3] += 1
    assert decoding.equal_steps(*loops, delay) == 3
