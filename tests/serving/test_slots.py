"""The threads between Cog's slots and the answers: what a cancellation ends, and in which order."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kimia_infer.api.request import Deadline
from kimia_infer.serving.cog.base import Workers, as_cog_shows
from kimia_infer.serving.cog.health import Load
from kimia_infer.serving.cog.slots import DEADLINE, max_concurrency, run_on_slots
from kimia_infer.utils.errors import RequestCancelled
from tests.serving.helpers import PATIENCE

WORD: contextvars.ContextVar[str] = contextvars.ContextVar("word", default="none")


class Answer:
    """Counts until its deadline is cancelled; ``left`` is set when it has cleaned up."""

    def __init__(self, last: int | None = None):
        self.deadline, self.left, self.last = Deadline(None), threading.Event(), last
        self.threads: set[int] = set()

    def __iter__(self) -> Iterator[int]:
        try:
            number = 0
            while number != self.last:
                self.deadline.check()
                self.threads.add(threading.get_ident())
                yield number
                number += 1
        finally:
            self.left.set()


@pytest.fixture
def load() -> Load:
    return Load()


@pytest.fixture
def workers(load: Load) -> Workers:
    return Workers(1, load)


def run(workers: Workers, answer: Answer) -> Iterator[int]:
    return workers.run(iter(answer), answer.deadline, contextvars.copy_context())


def test_items_are_made_by_a_worker_and_end_when_it_has_left(workers: Workers, load: Load) -> None:
    for begun in (1, 2):
        answer = Answer(3)
        assert list(run(workers, answer)) == [0, 1, 2]
        assert answer.left.is_set() and threading.get_ident() not in answer.threads
        assert (load.begun, load.running) == (begun, {})


def test_an_error_arrives_when_the_worker_has_left(workers: Workers, load: Load) -> None:
    answer = Answer()
    items = run(workers, answer)
    assert next(items) == 0 and len(load.running) == 1
    answer.deadline.cancel()
    with pytest.raises(RequestCancelled):
        list(items)
    assert answer.left.is_set() and not load.running


def test_closing_ends_the_worker(workers: Workers) -> None:
    answer = Answer()
    items = run(workers, answer)
    assert next(items) == 0
    items.close()  # type: ignore[attr-defined]
    assert answer.left.wait(PATIENCE)
    assert list(run(workers, Answer(1))) == [0]


def test_context_is_that_of_the_prediction(workers: Workers) -> None:
    context = contextvars.copy_context()
    context.run(WORD.set, "mine")
    items = (WORD.get() for _ in range(1))
    assert list(workers.run(items, Deadline(None), context)) == ["mine"]


async def _ctx_wrapper(waits: bool = False) -> Any:
    """Called as Cog's."""
    if waits:
        await asyncio.sleep(0)
    return threading.get_ident(), DEADLINE.get()


async def of_a_library() -> int:
    return threading.get_ident()


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[asyncio.AbstractEventLoop]:
    """A loop on a thread of its own, as Cog's."""
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", asyncio.run_coroutine_threadsafe)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_predictions_run_on_the_thread_that_waits(loop: asyncio.AbstractEventLoop) -> None:
    run_on_slots(None)
    prediction = asyncio.run_coroutine_threadsafe(_ctx_wrapper(), loop)
    thread, deadline = prediction.result()
    assert thread == threading.get_ident()
    assert prediction.cancel()
    with pytest.raises(RequestCancelled):
        deadline.check()
    with pytest.raises(RuntimeError, match=r"run\(\) awaits"):
        asyncio.run_coroutine_threadsafe(_ctx_wrapper(waits=True), loop).result()
    other = asyncio.run_coroutine_threadsafe(of_a_library(), loop).result(PATIENCE)
    assert other != threading.get_ident()


@pytest.mark.parametrize(
    ("value", "count"), [(None, 1), ("", 1), ("0", 1), ("-2", 1), ("many", 1), ("8", 8)]
)
def test_number_of_predictions_is_read_as_cog_does(
    monkeypatch: pytest.MonkeyPatch, value: str | None, count: int
) -> None:
    monkeypatch.delenv("COG_MAX_CONCURRENCY", raising=False)
    if value is not None:
        monkeypatch.setenv("COG_MAX_CONCURRENCY", value)
    assert max_concurrency() == count


def test_error_of_a_request_is_not_shown_as_a_cancellation() -> None:
    error = as_cog_shows("history[0]: unknown field 'cancelled'")
    assert f"{type(error).__name__}: {error}" == "history[0]: unknown field 'canceled'"
