"""What ends a request from outside."""

from __future__ import annotations

import pytest
import torch

from kimia_infer.api import request
from kimia_infer.api.engine import surviving_out_of_memory
from kimia_infer.api.request import Deadline
from kimia_infer.utils.errors import (
    RequestCancelled,
    RequestError,
    RequestOutOfMemory,
    RequestTimeout,
)
from tests.clock import set_clock


def test_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    set_clock(monkeypatch, request, lambda: clock[0])
    deadline, never = Deadline(2.5), Deadline(None)
    clock[0] = 102.5
    deadline.check()
    clock[0] = 102.6
    with pytest.raises(RequestTimeout, match=r"timeout_seconds: .* 2\.5 s"):
        deadline.check()
    clock[0] = 1e12
    never.check()
    for one in (never, deadline):  # a request that is given up has not run out of time
        one.cancel()
        with pytest.raises(RequestCancelled):
            one.check()


def refused_by_the_allocator() -> RuntimeError:
    """What PyTorch says of more memory than any process can address."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**56, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [refused_by_the_allocator(), torch.OutOfMemoryError("CUDA out of memory"), MemoryError()],
)
def test_out_of_memory_becomes_one_error(error: Exception) -> None:
    def items():
        yield 1
        raise error

    survived = surviving_out_of_memory(items())
    assert next(survived) == 1
    with pytest.raises(RequestOutOfMemory, match="out of memory while answering"):
        next(survived)
    assert list(survived) == []


def test_the_allocator_gives_back_what_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: emptied.append(True))

    def items():
        raise torch.OutOfMemoryError("full")
        yield

    with pytest.raises(RequestOutOfMemory):
        list(surviving_out_of_memory(items()))
    assert emptied == [True]


def test_other_errors_and_closing_pass_through() -> None:
    closed = []

    def items(error: Exception | None):
        try:
            yield 1
            if error is not None:
                raise error
        finally:
            closed.append(True)

    for error in (RequestError("mine"), RuntimeError("mine")):
        with pytest.raises(type(error), match="mine"):
            list(surviving_out_of_memory(items(error)))
    caused = RuntimeError("mine")
    caused.__cause__ = ValueError("the reason")
    with pytest.raises(RuntimeError) as raised:
        list(surviving_out_of_memory(items(caused)))
    assert raised.value is caused and str(caused.__cause__) == "the reason"
    survived = surviving_out_of_memory(items(None))
    next(survived)
    survived.close()
    assert closed == [True] * 4
