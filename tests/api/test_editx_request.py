"""Turns of requests to Step-Audio-EditX."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kimia_infer.api import editx_request
from kimia_infer.api.editx_request import Editor, EditXParameters
from kimia_infer.api.request import Deadline
from kimia_infer.utils.errors import RequestCancelled, ServiceBusy


class Blocked:
    """Stands for EditX: answers once it may, and notes what was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.may = threading.Event()

    def stream(self, audio: Any, task: Any, seed: int, *, check: Any) -> Iterator[int]:
        self.asked.append(seed)
        assert self.may.wait(30)
        yield seed


def test_requests_are_answered_as_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editx_request, "MOST_WAITING", 3)
    model: Any = Blocked()
    editor = Editor(model, None)
    left = Deadline(None)

    def ask(seed: int, deadline: Deadline) -> list[Any]:
        asked = EditXParameters(task="denoise", seed=seed)
        return list(editor.respond(b"", asked, deadline, streams=True))

    def leave() -> None:
        with pytest.raises(RequestCancelled):
            ask(1, left)

    threads = []
    for seed in range(4):
        target = leave if seed == 1 else lambda seed=seed: ask(seed, Deadline(None))
        threads.append(threading.Thread(target=target))
        threads[-1].start()
        while len(editor._line) <= seed:
            threading.Event().wait(0.001)
    with pytest.raises(ServiceBusy, match="3 requests are waiting"):
        ask(4, Deadline(None))
    left.cancel()
    threads[1].join(30)
    model.may.set()
    for thread in threads:
        thread.join(30)
    assert model.asked == [0, 2, 3] and not editor._line
