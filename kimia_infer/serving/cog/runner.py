"""What the Cog predictors share: set-up, health, and one prediction with its files."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cog
import torch
from torch import Tensor

from kimia_infer.api.events import Completion, Event
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.transcription import Transcript, TranscriptEvent
from kimia_infer.audio.files import wav_bytes
from kimia_infer.models.kimi_audio.checkpoint import weights_from_environment
from kimia_infer.serving.client import open_url
from kimia_infer.serving.cog.cleanup import (
    FILE_SECONDS,
    SERVER_DIRECTORY,
    is_only_server,
    require_room,
    require_server_directory,
    run_periodically,
    sweep_predictions,
    trim_heap,
)
from kimia_infer.serving.cog.fetch import Downloader
from kimia_infer.serving.cog.inputs import (
    CogInputs,
    build_chat,
    name_files,
    parse_inputs,
    place_files,
    respond,
)
from kimia_infer.serving.cog.references import store_all
from kimia_infer.serving.cog.schema import accept_null
from kimia_infer.serving.cog.self_test import self_test
from kimia_infer.serving.cog.settings import read_settings
from kimia_infer.utils.errors import ConfigurationError, RequestError, RequestTimeout
from kimia_infer.utils.files import OWNER, OwnedDirectory

log = logging.getLogger(__name__)

GRACE_SECONDS = 30.0
"""How much longer than its limit a prediction may take before the model counts as stuck."""

WATCH_SECONDS = 5.0
"""Time between two checks of the server's state."""


class KimiRunner(cog.BaseRunner):
    """A predictor without ``run``, which every predictor declares itself.

    Cog would decode data URIs and download URLs itself, according to the types of ``run``. It
    reads base64 without checking it, downloads from any address, without a limit, and while it
    does, neither a cancellation nor the time limit ends it. So the types are there for its build
    alone, which makes the schema of them; at run time ``run`` gets what was sent.
    """

    def setup(self, weights: cog.Path | str | None = None) -> None:
        """Load the weights that KIMI_AUDIO_WEIGHTS names, else those that Cog passes.

        Ends with a self-test, so that a service that is READY has answered once.
        """
        show_log()
        type(self).run.__annotations__ = {}
        accept_null(Path.cwd())
        settings = read_settings(os.environ)
        require_server_directory(SERVER_DIRECTORY)
        if is_only_server():  # all that is there is of servers that were killed
            sweep_predictions(SERVER_DIRECTORY, 0.0, 0.0)
        self.uploads, self.downloader = Uploads(), Downloader()
        self.model = KimiAudio(weights_from_environment(weights), **settings.model_arguments())
        self.settings = settings
        self.health = Health(self.model.device, settings.timeout)
        self_test(self.model)
        sweep = functools.partial(sweep_predictions, SERVER_DIRECTORY)
        run_periodically([self.uploads.keep, sweep, trim_heap], FILE_SECONDS)
        run_periodically([SlotWatch(self.health, server_status).check], WATCH_SECONDS)

    def healthcheck(self) -> bool:
        """Whether the device computes; Cog reports the error raised otherwise."""
        self.health.check()
        return True

    def respond(self, values: Mapping[str, Any]) -> Iterator[Event | TranscriptEvent]:
        """The events of the answer to the inputs in ``values``, last Completion or Transcript.

        Closing the iterator stops generation, as does the CancellationException that Cog raises
        wherever the prediction is: no further step is launched.
        """
        try:
            with self.health.predicting(), self.received(values) as inputs:
                yield from self._answer(inputs)
        except RequestTimeout as error:
            raise as_cog_shows(
                f"KIMI_AUDIO_TIMEOUT: the answer was not complete within {self.settings.timeout:g} "
                "s, the time limit of this service; set a smaller max_new_tokens or send shorter "
                "audio"
            ) from error
        except RequestError as error:
            raise as_cog_shows(str(error)) from error

    def _answer(self, inputs: CogInputs) -> Iterator[Event | TranscriptEvent]:
        try:
            with contextlib.closing(respond(self.model, inputs)) as events:
                for event in events:
                    if isinstance(event, Completion | Transcript):
                        for name, value in event.metrics.items():
                            self.record_metric(name, value)
                    yield event
        except RequestTimeout:
            raise
        except RequestError as error:
            raise type(error)(name_files(str(error), inputs)) from error

    @contextlib.contextmanager
    def received(self, values: Mapping[str, Any]) -> Iterator[CogInputs]:
        """The checked inputs, with the files that came with them, which are removed at the end.

        A request that is refused for another reason costs no decoding and no download.
        """
        begun, settings = time.monotonic(), self.settings
        with self.uploads.folder() as folder:
            placed, references = place_files(values, folder)
            inputs = parse_inputs(placed, settings.timeout)
            build_chat(inputs)
            spoken = inputs.task == "chat" and inputs.output_type == "both"
            if spoken and self.model.detokenizer is None:
                raise RequestError(
                    "output_type: this service answers with text only (KIMI_AUDIO_OUTPUT=text); "
                    "use 'text'"
                )
            if references:
                store_all(references, self.downloader, settings.limits(begun))
            if settings.timeout is not None:
                left = begun + settings.timeout - time.monotonic()
                inputs = inputs.model_copy(update={"timeout_seconds": max(left, 0.001)})
            yield inputs

    def complete(self, values: Mapping[str, Any]) -> Completion | Transcript:
        """The whole answer to the inputs in ``values``."""
        *_, answer = self.respond(values)
        assert isinstance(answer, Completion | Transcript)
        return answer


def as_cog_shows(message: str) -> RequestError:
    """An error of which Cog shows exactly ``message``.

    It writes the name of the error's class before its text, so the class is called as the input.
    """
    name, _, text = message.partition(": ")
    return type(name, (RequestError,), {})(text)


def wav_uri(wave: Tensor | None, sample_rate: int) -> str | None:
    """float32 [1, samples] as a data URI of a wav file; None stays None.

    Nothing is written to disk: Cog never deletes the output files of a predictor, and turns a
    file inside an object into a data URI in any case.
    """
    if wave is None:
        return None
    return "data:audio/wav;base64," + base64.b64encode(wav_bytes(wave, sample_rate)).decode("ascii")


def show_log() -> None:
    """Print the package's log, which never contains a request's content, on stderr."""
    package = logging.getLogger("kimia_infer")
    package.setLevel(logging.INFO)
    if not package.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        package.addHandler(handler)
        package.propagate = False


class DeviceError(RuntimeError):
    """The model cannot answer; the message says why."""


class SlotLost(RuntimeError):
    """The server gives its only slot to nobody any more."""


class Health:
    """Watches one device.

    Cog (0.23) calls the health check on a new thread for every request to ``/health-check``,
    once at a time, also while a prediction runs, and waits up to 5 seconds for it. During that
    wait it takes no cancellation, so :meth:`check` must be quick.

    ``timeout`` is the limit in seconds of one prediction, None without a limit.
    """

    def __init__(self, device: torch.device, timeout: float | None = None):
        self._device, self._timeout = device, timeout
        self._lock = threading.Lock()
        self.predictions = 0
        self.slot_lost = False
        self._predicting_since: float | None = None
        self._checking_since: float | None = None

    @property
    def idle(self) -> bool:
        return self._predicting_since is None

    @contextlib.contextmanager
    def predicting(self) -> Iterator[None]:
        """Around every prediction: the device belongs to it alone."""
        with self._lock:
            self.predictions += 1
            self.slot_lost = False
            self._predicting_since = time.monotonic()
            try:
                yield
            finally:
                self._predicting_since = None

    def check(self) -> None:
        """Return if the device computes, or works on a prediction within its limit.

        Raises DeviceError if it does not answer or computes nonsense, SlotLost if ``slot_lost`` is
        set, and whatever PyTorch raises for a device that is lost or has no memory left.
        """
        if self.slot_lost:
            raise SlotLost(
                "the server counts a prediction that the model does not have and takes no other "
                "(docs/deploy.md: prediction ids)"
            )
        now, asked, begun = time.monotonic(), self._checking_since, self._predicting_since
        if asked is not None:
            raise DeviceError(f"{self._device} has not answered for {now - asked:.0f} s")
        limit = self._timeout
        if begun is not None and limit is not None and now - begun > limit + GRACE_SECONDS:
            raise DeviceError(
                f"a prediction has run for {now - begun:.0f} s, though its limit is {limit:g} s"
            )
        if not self._lock.acquire(blocking=False):  # a busy device is left alone
            return
        try:
            self._checking_since = time.monotonic()
            numbers = torch.arange(256, device=self._device, dtype=torch.float32)
            total = (numbers * numbers).sum().item()
        finally:
            self._checking_since = None
            self._lock.release()
        if total != sum(i * i for i in range(256)):
            raise DeviceError(f"{self._device} computes wrong results: {total}")


class SlotWatch:
    """Notices when Cog's server is BUSY without a prediction.

    It (0.23) stays so forever if it can make no directory for the id of a prediction, or cannot
    store a large request on a full disk. ``status`` asks it for its state, None if it is silent.
    """

    def __init__(self, health: Health, status: Callable[[], str | None]):
        self._health, self._status = health, status
        self._suspected: int | None = None

    def check(self) -> None:
        """Between two checks the server has time to begin or to end a prediction."""
        count, idle = self._health.predictions, self._health.idle
        if not idle or self._status() != "BUSY" or self._health.predictions != count:
            self._suspected = None
        elif self._suspected == count:
            self._health.slot_lost = True
        else:
            self._suspected = count


def server_status() -> str | None:
    """The state that the server of this worker gives itself."""
    url = f"http://127.0.0.1:{os.environ.get('PORT', '5000')}/health-check"
    try:
        with open_url(url, timeout=8.0) as response:
            return json.load(response).get("status")
    except (OSError, http.client.HTTPException, ValueError):
        return None  # it may listen on another address only


class Uploads:
    """A directory for the temporary files of this process, those of the request among them.

    It is removed when the process ends by itself, else at the next start of a service. Python
    takes another directory than the one in TMPDIR if that cannot be written; here it is an error.

    Raises:
        ConfigurationError: it cannot be made or written to.
    """

    def __init__(self) -> None:
        parent = os.environ.get("TMPDIR") or "/tmp"
        try:
            require_room(Path(parent))
            parent = tempfile.gettempdir()
            self._owned = OwnedDirectory("kimi-audio-uploads-")
            self.directory = self._owned.path
            require_room(self.directory)
        except OSError as error:
            raise ConfigurationError(
                f"{parent}: uploads cannot be stored there ({error.strerror}); make "
                "room, make it writable for this user, or name another directory in TMPDIR"
            ) from error
        tempfile.tempdir = str(self.directory)

    def keep(self) -> None:
        """Create the directory again if it is gone, and make it look used to cleaning jobs."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        os.utime(self.directory)

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty folder for the files of one request; a worker answers one at a time.

        A cancellation may come while the folder of the last one is being removed. On a full disk
        there is none: whoever stores a file in it notices.
        """
        path = self.directory / "request"
        self._sweep(path)
        with contextlib.suppress(OSError):
            path.mkdir()
        try:
            yield path
        finally:
            self._sweep(path)

    def _sweep(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for path in self.directory.iterdir():
            if path.name != OWNER and path.is_file() and not path.is_symlink():
                path.unlink(missing_ok=True)
