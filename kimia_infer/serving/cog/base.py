"""What all Cog predictors share: set-up, the files of requests, and the threads that answer."""

from __future__ import annotations

import base64
import contextlib
import contextvars
import functools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cog
import torch
from torch import Tensor

from kimia_infer.api.events import Completion, Event
from kimia_infer.api.request import Deadline
from kimia_infer.api.transcription import Transcript, TranscriptEvent
from kimia_infer.audio.files import wav_bytes
from kimia_infer.serving.cog.cleanup import (
    SERVER_DIRECTORY,
    is_only_server,
    require_server_directory,
    sweep_predictions,
)
from kimia_infer.serving.cog.fetch import Downloader
from kimia_infer.serving.cog.health import Health, Load, SlotWatch, server_status
from kimia_infer.serving.cog.inputs import Inputs, name_files, place_files
from kimia_infer.serving.cog.references import store_all
from kimia_infer.serving.cog.schema import accept_null
from kimia_infer.serving.cog.settings import CogSettings
from kimia_infer.serving.cog.slots import DEADLINE, max_concurrency, run_on_slots
from kimia_infer.serving.process import Uploads, run_periodically, show_log, trim_heap
from kimia_infer.serving.settings import read_settings
from kimia_infer.utils.errors import (
    RequestCancelled,
    RequestError,
    RequestTimeout,
)

Item = TypeVar("Item")

AnyEvent = Event | TranscriptEvent

CLEANUP_SECONDS = 30.0
"""Time between two clean-ups of files and memory."""

WATCH_SECONDS = 5.0
"""Time between two checks of the server's state."""


class ServiceRunner(cog.BaseRunner):
    """A predictor without ``run``, which every predictor declares itself, and without a model.

    Cog would decode data URIs and download URLs itself, according to the types of ``run``. It
    reads base64 without checking it, downloads from any address, without a limit, and while it
    does, neither a cancellation nor the time limit ends it. So the types are there for its build
    alone, which makes the schema of them; at run time ``run`` gets what was sent.
    """

    settings: CogSettings
    after_timeout = "set a smaller max_new_tokens or send shorter audio"
    """What a caller can do whose answer took too long."""

    def read_settings(self) -> CogSettings:
        return read_settings(CogSettings, os.environ)

    def load(self, weights: cog.Path | str | None) -> set[torch.device]:
        """Load the model; the devices that it computes on. ``weights`` are Cog's."""
        raise NotImplementedError

    def test_model(self) -> None:
        """Answer once; raises what is wrong with the model."""
        raise NotImplementedError

    def read(self, values: Mapping[str, Any]) -> Inputs:
        """The checked inputs; the files among them are not there yet.

        Raises RequestError for what can be refused without a look at them.
        """
        raise NotImplementedError

    def answer(self, inputs: Any, deadline: Deadline) -> Iterator[AnyEvent]:
        """The events of the answer to what :meth:`read` has returned."""
        raise NotImplementedError

    def setup(self, weights: cog.Path | str | None = None) -> None:
        """Load the model. Ends with a self-test: a service that is READY has answered once."""
        show_log()
        type(self).run.__annotations__ = {}
        accept_null(Path.cwd())
        self.settings = self.read_settings()
        require_server_directory(SERVER_DIRECTORY)
        if is_only_server():  # all that is there is of servers that were killed
            sweep_predictions(SERVER_DIRECTORY, 0.0, 0.0)
        count = max_concurrency()
        load = Load()
        self.uploads, self.downloader = Uploads(), Downloader(count)
        self.workers = Workers(count, load)
        self.health = Health(self.load(weights), load, self.settings.timeout)
        self.test_model()
        sweep = functools.partial(sweep_predictions, SERVER_DIRECTORY)
        run_periodically([self.uploads.keep, sweep, trim_heap], CLEANUP_SECONDS)
        run_on_slots(self.settings.timeout)
        run_periodically([SlotWatch(self.health, load, server_status).check], WATCH_SECONDS)

    def healthcheck(self) -> bool:
        """Whether the device computes; Cog reports the error raised otherwise."""
        self.health.check()
        return True

    def respond(self, values: Mapping[str, Any]) -> Iterator[AnyEvent]:
        """The events of the answer to the inputs in ``values``, last Completion or Transcript.

        A cancellation, or closing the iterator, stops generation: no further step is launched.
        """
        # Cog's context is that of this prediction until run() returns, and not for what it returns.
        deadline = DEADLINE.get(None) or Deadline(self.settings.timeout)
        answer = self._answer(values, deadline)
        events = self.workers.run(answer, deadline, contextvars.copy_context())
        return self._recorded(events, self.scope)

    def _recorded(self, events: Iterator[AnyEvent], scope: Any) -> Iterator[AnyEvent]:
        """``events``, with the metrics among them recorded in ``scope``, and errors as Cog's."""
        try:
            for event in events:
                if isinstance(event, Completion | Transcript):
                    for name, value in event.metrics.items():
                        scope.record_metric(name, value)
                yield event
        except (RequestCancelled, cog.CancelationException) as error:
            raise cog.CancelationException("the prediction was cancelled") from error
        except RequestTimeout as error:
            raise as_cog_shows(
                f"KIMI_AUDIO_TIMEOUT: the answer was not complete within {self.settings.timeout:g} "
                f"s, the time limit of this service; {self.after_timeout}"
            ) from error
        except RequestError as error:
            raise as_cog_shows(str(error)) from error

    def _answer(self, values: Mapping[str, Any], deadline: Deadline) -> Iterator[AnyEvent]:
        with self.received(values, deadline) as inputs:
            try:
                yield from self.answer(inputs, deadline)
            except RequestError as error:
                if (named := name_files(str(error), inputs)) == str(error):
                    raise  # some kinds, such as RequestTimeout, are not made of a message
                raise type(error)(named) from error

    @contextlib.contextmanager
    def received(self, values: Mapping[str, Any], deadline: Deadline) -> Iterator[Inputs]:
        """The checked inputs, with the files that came with them, which are removed at the end.

        A request that is refused for another reason costs no decoding and no download.
        """
        begun = time.monotonic()
        with self.uploads.folder() as folder:
            placed, references = place_files(values, folder)
            inputs = self.read(placed)
            if references:
                limits = self.settings.limits(begun, deadline.check)
                store_all(references, self.downloader, limits)
            yield inputs

    def complete(self, values: Mapping[str, Any]) -> Completion | Transcript:
        """The whole answer to the inputs in ``values``."""
        *_, answer = self.respond(values)
        assert isinstance(answer, Completion | Transcript)
        return answer


def as_cog_shows(message: str) -> RequestError:
    """An error of which Cog shows exactly ``message``.

    It writes the name of the error's class before its text, so the class is called as the input.
    What is said to be "cancelled" it (0.23) takes for a cancellation, and shows nothing.
    """
    name, _, text = message.replace("cancelled", "canceled").partition(": ")
    return type(name, (RequestError,), {})(text)


def wav_uri(wave: Tensor | None, sample_rate: int) -> str | None:
    """float32 [1, samples] as a data URI of a wav file; None stays None.

    Nothing is written to disk: Cog never deletes the output files of a predictor, and turns a
    file inside an object into a data URI in any case.
    """
    if wave is None:
        return None
    return "data:audio/wav;base64," + base64.b64encode(wav_bytes(wave, sample_rate)).decode("ascii")


class Workers:
    """Threads that make answers, ``count`` at a time, all started here."""

    def __init__(self, count: int, load: Load):
        self._load, self._lock = load, threading.Lock()
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        for _ in range(count):
            threading.Thread(target=self._work, name="answer", daemon=True).start()

    def _work(self) -> None:
        while True:
            self._tasks.get()()

    def run(
        self, items: Iterator[Item], deadline: Deadline, context: contextvars.Context
    ) -> Iterator[Item]:
        """``items``, which a worker computes ahead in ``context``.

        It ends, or raises what ``items`` raise, when the worker has left them. Closing it cancels
        ``deadline``, which ``items`` must check, and does not wait.
        """
        arrived: queue.SimpleQueue[Item | _End] = queue.SimpleQueue()
        try:
            self._tasks.put(functools.partial(context.run, self._forward, items, arrived))
            while not isinstance(item := arrived.get(), _End):
                yield item
        finally:
            deadline.cancel()
        error = item.error
        try:
            if error is not None:
                raise error
        finally:
            del error, item  # they refer to this frame

    def _forward(self, items: Iterator[Item], arrived: queue.SimpleQueue[Item | _End]) -> None:
        with self._lock:
            self._load.begun += 1
        self._load.running[threading.get_ident()] = time.monotonic()
        end = _End(None)
        try:
            for item in items:
                arrived.put(item)
        except BaseException as error:
            end = _End(error)
        del self._load.running[threading.get_ident()]
        arrived.put(end)
        del end  # it refers to this frame


@dataclass(frozen=True)
class _End:
    """Comes after the last item."""

    error: BaseException | None
