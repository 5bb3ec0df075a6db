"""Items answered together: the answers of one at a time, and each item's troubles its own."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import Parameters, parse_parameters
from kimia_infer.api.request import ChatEncoder, Deadline, Request, Response
from kimia_infer.engine import decode
from kimia_infer.engine.decode import Decoder
from kimia_infer.evaluation import answering
from kimia_infer.evaluation.answering import Finished, Turn, answer_items, load_ahead
from kimia_infer.evaluation.items import Defaults, Item, read_manifest
from kimia_infer.layers.sampler import sample
from kimia_infer.utils.errors import RequestError
from tests.api.recorded_chats import CASES, SET, chat_of, options_of
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


def answered(model: KimiAudio, items: list[Item], options: Parameters, size: int) -> list[Finished]:
    """The outcomes of several items at a time, in the order of the items."""
    found = {f.item.key: f for f in answer_items(items, model, options, size)}
    return [found[item.key] for item in items]


def test_recorded_greedy_answers(recorded_model: KimiAudio):
    cases = [case for case in TEXT_CASES if options_of(case) == options_of(TEXT_CASES[0])]
    assert len(cases) == 5
    items = [Item("e2e", "", case["name"], "none", chat_of(case), "") for case in cases]
    found = answered(recorded_model, items, options_of(cases[0]), 3)
    for case, answer in zip(cases, found, strict=True):
        assert answer.outcome.text_ids == case["text_ids"]
        assert answer.outcome.text == case["text"]
        assert answer.outcome.metrics["decode_steps"] == case["steps"]


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

    alone = texts(1)
    assert alone == texts(3)
    assert len(set(alone)) > 1


@pytest.mark.parametrize(("stop", "then"), [(0, 3), (1, 2), (4, 1)])
def test_interrupted_run_goes_on_with_any_size(
    finished: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, stop: int, then: int
):
    with monkeypatch.context() as patch:
        begun = itertools.count()
        original = KimiAudio.begin

        def begin(model: KimiAudio, request: Request) -> Response:
            if results(tmp_path / "cut") >= stop and next(begun) > 1:
                raise KeyboardInterrupt
            return original(model, request)

        patch.setattr(KimiAudio, "begin", begin)
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
    """One has no time left when its turn comes; the others are answered."""
    options = parse_parameters(max_new_tokens=60, seed=0)
    expected = [model.complete(item.messages, options) for item in items]
    request, calls = Turn.request, itertools.count()

    def late(turn: Turn, options: Parameters, deadline: Deadline) -> Request:
        if next(calls) == 2:
            deadline = Deadline(0.0)
        return request(turn, options, deadline)

    monkeypatch.setattr(Turn, "request", late)
    limited = options.model_copy(update={"timeout_seconds": 600.0})
    outcomes = [finished.outcome for finished in answered(model, items, limited, 3)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, RequestError)]
    assert len(refused) == 1 and "timeout_seconds" in str(refused[0])
    for completion, outcome in zip(expected, outcomes, strict=True):
        assert isinstance(outcome, RequestError) or outcome.text == completion.text


def test_repetition_is_cut(model: KimiAudio, items: list[Item], monkeypatch: pytest.MonkeyPatch):
    """Texts that begin as they would, and then alternate between two of their ids endlessly."""

    def looping(logits, history, step, uniform, sampling, form, first_id=0):
        usual = sample(logits, history, step, uniform, sampling, form, first_id)
        return torch.where(step < 4, usual, history.gather(1, 2 + step[:, None] % 2)[:, 0])

    monkeypatch.setattr(decode, "sample", looping)
    options = parse_parameters(
        max_new_tokens=400, text_temperature=1.0, text_top_k=0, seed=1, stop_repetition=True
    )
    expected = [model.complete(item.messages, options) for item in items[:4]]
    assert {c.metrics["stop_reason"] for c in expected} >= {"repetition"}
    for completion, answer in zip(expected, answered(model, items[:4], options, 3), strict=True):
        given = answer.outcome
        assert (given.text, given.text_ids, given.notes) == (
            completion.text, completion.text_ids, completion.notes,
        )  # fmt: skip
        assert given.metrics["stop_reason"] == completion.metrics["stop_reason"]
        assert given.metrics["decode_steps"] == completion.metrics["decode_steps"] < 400


def test_memory_that_an_item_lacks_concerns_only_itself(
    finished: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    encode, calls = ChatEncoder.encode_all, itertools.count()

    def fail_once(encoder: ChatEncoder, *arguments):
        if next(calls) == 2:
            raise OUT_OF_MEMORY
        return encode(encoder, *arguments)

    monkeypatch.setattr(ChatEncoder, "encode_all", fail_once)
    outcome = run("out", batch_size=3)
    assert (outcome.answered, outcome.errors) == (7, 2)
    errors = [row["error"] for row in answers(tmp_path / "out") if row.get("error")]
    assert sum("out of memory while answering" in error for error in errors) == 1
    assert run("out", batch_size=3, retry_errors=True).errors == 1  # the missing sound
    assert_same(finished, tmp_path / "out")


def test_memory_that_a_step_lacks_is_an_error_of_one_item(
    finished: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    launch, calls = Decoder._launch, itertools.count()

    def fail_once(decoder: Decoder) -> None:
        if not next(calls):
            raise OUT_OF_MEMORY
        launch(decoder)

    monkeypatch.setattr(Decoder, "_launch", fail_once)
    assert run("out", batch_size=3).errors == 1 + 1
    errors = [row["error"] for row in answers(tmp_path / "out") if row.get("error")]
    assert sum("out of memory while answering" in error for error in errors) == 1
    assert run("out", batch_size=2, retry_errors=True).errors == 1
    assert_same(finished, tmp_path / "out")


def test_other_failures_end_the_run(run: Run, monkeypatch: pytest.MonkeyPatch):
    def fail(decoder: Decoder) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "_launch", fail)
        with pytest.raises(RuntimeError, match="the device is gone"):
            run("out", batch_size=3)
    assert run("out", batch_size=3).answered == 8


def test_seconds_are_from_an_items_turn_to_its_end(
    model: KimiAudio, items: list[Item], monkeypatch: pytest.MonkeyPatch
):
    """Waiting for a turn does not count, loading does."""
    seconds = [0.0]
    monkeypatch.setattr(answering, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    begin = KimiAudio.begin

    def slow(model: KimiAudio, request: Request) -> Response:
        seconds[0] += 6
        return begin(model, request)

    def loaded(items: list[Item], most: float) -> Generator[Turn]:
        for turn in list(load_ahead(items, most)):
            yield replace(turn, started=seconds[0] - 0.5)

    monkeypatch.setattr(KimiAudio, "begin", slow)
    monkeypatch.setattr(answering, "load_ahead", loaded)
    found = list(answer_items(items[:3], model, parse_parameters(max_new_tokens=6), 1))
    assert [answer.item.key for answer in found] == [item.key for item in items[:3]]
    assert [answer.seconds for answer in found] == [6.5, 6.5, 6.5]


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
