"""Items answered together: the answers of one at a time, and each item's troubles its own."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from kimia_infer.api import response
from kimia_infer.api.engine import ChatEncoder
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import Parameters, parse_parameters
from kimia_infer.engine import batch as batch_module
from kimia_infer.engine import decode
from kimia_infer.engine.batch import TextBatch
from kimia_infer.engine.decode import Generation
from kimia_infer.evaluation import answering
from kimia_infer.evaluation.answering import (
    Finished,
    answer_items,
    answer_together,
    load_ahead,
)
from kimia_infer.evaluation.items import Defaults, Item, read_manifest
from kimia_infer.layers.sampler import sample
from kimia_infer.models.kimi_audio.prompt import parse_messages
from kimia_infer.utils.errors import ConfigurationError, RequestError
from kimia_infer.utils.graphs import Graphs, graphs_for
from tests.api.recorded_chats import CASES, SET, chat_of, options_of, randomness_of
from tests.evaluation.helpers import (
    CONFIG,
    SAMPLING,
    Run,
    Write,
    answers,
    assert_same,
    report,
    results,
)
from tests.traced import TracedGraphs
from tests.training.runs import write_sound

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")
TEXT_CASES = [case for case in CASES.values() if case["arguments"]["output_type"] == "text"]


@pytest.fixture(scope="module")
def recorded_model() -> KimiAudio:
    return KimiAudio(str(SET / "checkpoint"), False, device="cpu", dtype="float32")


@pytest.fixture
def items(tmp_path: Path, write: Write) -> list[Item]:
    """Seven sounds of different lengths, to which the miniature says different things."""
    for number in range(7):
        write_sound(tmp_path / f"{number}.wav", 0.3 + 0.4 * (number * 3 % 7), number)
    path = write(*({"audio": f"{number}.wav", "text": "x"} for number in range(7)))
    return read_manifest(path, Defaults(tmp_path, language="en")).items


def answered(
    model: KimiAudio, items: list[Item], options: Parameters, size: int, make_graphs=graphs_for
) -> list[Finished]:
    """The outcomes of several items at a time, in the order of the items."""
    found = {f.item.key: f for f in answer_items(items, model, options, size, make_graphs)}
    return [found[item.key] for item in items]


@pytest.mark.parametrize(("make_graphs", "interval"), [(graphs_for, 1), (TracedGraphs, 8)])
def test_recorded_greedy_answers(
    recorded_model: KimiAudio, monkeypatch: pytest.MonkeyPatch, make_graphs, interval: int
):
    cases = [case for case in TEXT_CASES if options_of(case) == options_of(TEXT_CASES[0])]
    assert len(cases) == 5
    items = [Item("e2e", "", case["name"], "none", chat_of(case), "") for case in cases]
    monkeypatch.setattr(recorded_model, "poll_interval", interval)
    found = answered(recorded_model, items, options_of(cases[0]), 3, make_graphs)
    for case, answer in zip(cases, found, strict=True):
        assert answer.outcome.text_ids == case["text_ids"]
        assert answer.outcome.text == case["text"]
        assert answer.outcome.metrics["decode_steps"] == case["steps"]


@pytest.mark.parametrize("make_graphs", [graphs_for, TracedGraphs])
def test_recorded_answers_with_other_sampling(
    recorded_model: KimiAudio, make_graphs: Callable[[torch.device], Graphs]
):
    """Penalties and recorded draws: each case twice in a batch with a chat of another length."""
    tensors = load_file(SET / "cases.safetensors")
    cases = [case for case in TEXT_CASES if options_of(case) != options_of(TEXT_CASES[0])]
    assert sum("draws" in case for case in cases) == 2
    for case in cases:
        options = options_of(case)
        batch = TextBatch(recorded_model.decoder, 3, 4, make_graphs)

        def begin(chat: dict, options: Parameters = options, case: dict = case) -> Generation:
            messages = parse_messages(chat_of(chat))
            encoded = recorded_model.encode_chat(messages, options)
            return recorded_model.generation(*encoded, options, randomness_of(case, tensors))

        generations = [begin(chat) for chat in (case, TEXT_CASES[0], case)]
        for generation in generations:
            batch.begin(generation)
        while not (generations[0].ended or generations[0].launched == generations[0].max_steps):
            batch.advance()
        assert generations[0].text_ids == generations[2].text_ids == case["text_ids"]
        assert generations[0].steps == case["steps"]


@pytest.mark.parametrize("size", [2, 3, 12])
def test_batch_size_changes_no_answer(finished: Path, tmp_path: Path, run: Run, size: int):
    assert run("several", batch_size=size).answered == 8
    assert_same(finished, tmp_path / "several")


def test_sampled_answers_are_the_same(model: KimiAudio, items: list[Item]):
    options = parse_parameters(
        text_temperature=1.2, text_top_k=0, text_repetition_penalty=1.2, max_new_tokens=12, seed=5
    )

    def texts(size: int) -> list[tuple[str, object]]:
        outcomes = [finished.outcome for finished in answered(model, items, options, size)]
        return [(outcome.text, outcome.metrics["stop_reason"]) for outcome in outcomes]

    assert texts(1) == texts(3)
    assert len(set(texts(1))) > 1


@pytest.mark.parametrize(("stop", "then"), [(0, 3), (1, 2), (4, 1)])
def test_interrupted_run_goes_on_with_any_size(
    finished: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, stop: int, then: int
):
    with monkeypatch.context() as patch:
        begun = itertools.count()
        original = TextBatch.advance

        def advance(batch: TextBatch):
            if results(tmp_path / "cut") >= stop and next(begun) > 1:
                raise KeyboardInterrupt
            return original(batch)

        patch.setattr(TextBatch, "advance", advance)
        with pytest.raises(KeyboardInterrupt):
            run("cut", batch_size=3)
    done = results(tmp_path / "cut")
    assert stop <= done < 9
    run("cut", batch_size=then)
    assert results(tmp_path / "cut") == 9
    assert_same(finished, tmp_path / "cut")
    sizes = report(tmp_path / "cut")["speed"]["items_by_batch_size"]
    assert sum(sizes.values()) == 9
    assert sizes.get("3", 0) >= done


def test_an_item_out_of_time_concerns_only_itself(
    model: KimiAudio, items: list[Item], monkeypatch: pytest.MonkeyPatch
):
    """Every step takes a second; the longer answers are refused, the shorter ones given."""
    options = parse_parameters(max_new_tokens=60, seed=0)
    expected = [model.complete(item.messages, options) for item in items]
    steps = sorted(completion.metrics["decode_steps"] for completion in expected)
    allowed = steps[len(steps) // 2] - 1
    assert steps[0] <= allowed
    clock = [100.0]
    fake = SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(response, "time", fake)
    original = TextBatch.advance

    def advance(batch: TextBatch):
        clock[0] += 1
        return original(batch)

    monkeypatch.setattr(TextBatch, "advance", advance)
    limited = options.model_copy(update={"timeout_seconds": float(allowed)})
    for completion, answer in zip(expected, answered(model, items, limited, 3), strict=True):
        if completion.metrics["decode_steps"] <= allowed + 1:
            assert answer.outcome.text == completion.text
        else:
            assert isinstance(answer.outcome, RequestError)
            assert "timeout_seconds" in str(answer.outcome)


def test_repetition_is_cut(model: KimiAudio, items: list[Item], monkeypatch: pytest.MonkeyPatch):
    """Texts that begin as they would, and then alternate between two of their ids endlessly."""

    def looping(logits, history, step, uniform, sampling, form, first_id=0):
        usual = sample(logits, history, step, uniform, sampling, form, first_id)
        return torch.where(step < 4, usual, history.gather(1, 2 + step[:, None] % 2)[:, 0])

    monkeypatch.setattr(decode, "sample", looping)
    monkeypatch.setattr(batch_module, "sample", looping)
    options = parse_parameters(
        max_new_tokens=400, text_temperature=1.0, text_top_k=0, seed=1, stop_repetition=True
    )
    expected = [model.complete(item.messages, options) for item in items]
    assert {c.metrics["stop_reason"] for c in expected} >= {"repetition"}
    for completion, answer in zip(expected, answered(model, items, options, 3), strict=True):
        given = answer.outcome
        assert (given.text, given.text_ids, given.notes) == (
            completion.text, completion.text_ids, completion.notes,
        )  # fmt: skip
        assert given.metrics["stop_reason"] == completion.metrics["stop_reason"]
        assert given.metrics["decode_steps"] == completion.metrics["decode_steps"] < 400


def test_memory_that_an_item_lacks_concerns_only_itself(
    finished: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    encode, calls = ChatEncoder.encode, itertools.count()

    def fail_once(encoder: ChatEncoder, *arguments):
        if next(calls) == 2:
            raise OUT_OF_MEMORY
        return encode(encoder, *arguments)

    monkeypatch.setattr(ChatEncoder, "encode", fail_once)
    outcome = run("out", batch_size=3)
    assert (outcome.answered, outcome.errors) == (7, 2)
    third = answers(tmp_path / "out")[2]
    assert "out of memory while answering" in third["error"]
    assert run("out", batch_size=3, retry_errors=True).errors == 1  # the missing sound
    assert_same(finished, tmp_path / "out")


def test_memory_that_a_step_lacks_concerns_what_is_being_answered(
    finished: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    advance, calls = TextBatch.advance, itertools.count()

    def fail_once(batch: TextBatch):
        if next(calls) == 1:  # no answer is that short
            raise OUT_OF_MEMORY
        return advance(batch)

    monkeypatch.setattr(TextBatch, "advance", fail_once)
    assert run("out", batch_size=3).errors == 1 + 3
    for row in answers(tmp_path / "out")[:3]:
        assert "while 3 items were answered together: out of memory" in row["error"]
        assert "--batch-size" in row["error"]
    assert run("out", batch_size=2, retry_errors=True).errors == 1
    assert_same(finished, tmp_path / "out")


def test_a_batch_without_memory_is_refused_before_anything_is_answered(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: object) -> None:
        raise OUT_OF_MEMORY

    monkeypatch.setattr(answering, "TextBatch", fail)
    with pytest.raises(ConfigurationError, match=r"no memory for 5 answers .*--batch-size"):
        run("out", batch_size=5)
    assert results(tmp_path / "out") == 0
    assert run("out").answered == 8


def test_a_batch_beyond_all_memory_is_refused(model: KimiAudio):
    """On the CPU, whose allocator has no error of its own."""
    with pytest.raises(ConfigurationError, match=r"no memory for 10{9} answers .*--batch-size"):
        next(answer_items([], model, parse_parameters(), 10**9))


def test_other_failures_end_the_run(run: Run, monkeypatch: pytest.MonkeyPatch):
    def fail(batch: TextBatch) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(TextBatch, "advance", fail)
        with pytest.raises(RuntimeError, match="the device is gone"):
            run("out", batch_size=3)
    assert run("out", batch_size=3).answered == 8


def test_seconds_are_from_an_items_turn_to_its_end(
    model: KimiAudio, items: list[Item], monkeypatch: pytest.MonkeyPatch
):
    """Every step takes a second, nothing else any: waiting for a turn does not count."""
    seconds = [0.0]
    monkeypatch.setattr(answering, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    original = TextBatch.advance

    def advance(batch: TextBatch):
        seconds[0] += 1
        return original(batch)

    monkeypatch.setattr(TextBatch, "advance", advance)
    monkeypatch.setattr(batch_module, "sample", lambda logits, *rest: logits[:, 0].long() * 0 + 66)
    options = parse_parameters(max_new_tokens=6)
    turns = (
        dataclasses.replace(turn, started=turn.started - 0.5)
        for turn in load_ahead(items[:3], 600.0)
    )
    found = list(answer_together(turns, model, options, 2, graphs_for))
    assert [answer.item.key for answer in found] == [item.key for item in items[:3]]
    assert [answer.seconds for answer in found] == [6.5, 6.5, 6.5]
    assert seconds == [12.0]


def test_report_tells_how_many_at_a_time(finished: Path, tmp_path: Path, run: Run):
    assert "answered one at a time" in (finished / "report.md").read_text()
    text = run("three", batch_size=3).report.read_text()
    assert "answered up to 3 at a time\n" in text
    speed = report(tmp_path / "three")["speed"]
    assert speed["items_by_batch_size"] == {"3": 9}
    assert speed["audio_seconds_per_second"] * speed["wall_seconds"] == pytest.approx(
        speed["audio_seconds"]
    )
    assert speed["items_per_second"] * speed["wall_seconds"] == pytest.approx(9)
    path = tmp_path / "three" / "results.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:8]))
    mixed = run("three").report.read_text()
    assert "answered one at a time (1 items), up to 3 at a time (8 items)" in mixed


def test_sampling_beyond_the_vocabulary_is_refused(tmp_path: Path, run: Run):
    wrong = {"text_temperature": 1.0, "text_top_k": 10**6}
    with pytest.raises(RequestError, match="text_top_k"):
        run("out", CONFIG.model_copy(update={"sampling": SAMPLING | wrong}))
    assert results(tmp_path / "out") == 0
    assert run("out").answered == 8
