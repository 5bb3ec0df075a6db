"""What the Cog predictors share: set-up, health, one prediction, and the clean-up after it."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import fnmatch
import functools
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from kimia_infer.serving.cog.inputs import name_files, parse_inputs, respond
from kimia_infer.serving.cog.self_test import self_test
from kimia_infer.serving.cog.settings import read_settings
from kimia_infer.utils.errors import RequestError, RequestTimeout

log = logging.getLogger(__name__)

GRACE_SECONDS = 30.0
"""How much longer than its limit a prediction may take before the model counts as stuck."""

SERVER_DIRECTORY = Path("/tmp/coglet/predictions")
"""Where Cog's server keeps files of predictions: fixed, and shared by the servers of a machine."""

FILE_SECONDS = 30.0
"""Age at which a file can be removed: the server reads it within milliseconds."""

DIRECTORY_SECONDS = 600.0
"""Age at which an empty directory is removed; one in use gets its large answer in time."""


class KimiRunner(cog.BaseRunner):
    """A predictor without ``run``, which every predictor declares itself."""

    def setup(self, weights: cog.Path | str | None = None) -> None:
        """Load the weights that KIMI_AUDIO_WEIGHTS names, else those that Cog passes.

        Ends with a self-test, so that a service that is READY has answered once.
        """
        show_log()
        settings = read_settings(os.environ)
        self.model = KimiAudio(weights_from_environment(weights), **settings.model_arguments())
        self.timeout = settings.timeout
        self.health = Health(self.model.device, self.timeout)
        self_test(self.model)
        self.uploads = Uploads()
        sweep = functools.partial(sweep_predictions, SERVER_DIRECTORY)
        run_periodically([self.uploads.keep, sweep, trim_heap], FILE_SECONDS)

    def healthcheck(self) -> bool:
        """Whether the device computes; Cog reports the error raised otherwise."""
        self.health.check()
        return True

    def respond(self, values: Mapping[str, Any]) -> Iterator[Event | TranscriptEvent]:
        """The events of the answer to the inputs in ``values``, last Completion or Transcript.

        Closing the iterator stops generation, as does the CancellationException that Cog raises
        wherever the prediction is: no further step is launched.
        """
        inputs = parse_inputs(values, self.timeout)
        self.uploads.sweep(inputs.files.values())
        spoken = inputs.task == "chat" and inputs.output_type == "both"
        if spoken and self.model.detokenizer is None:
            raise RequestError(
                "output_type: this service answers with text only (KIMI_AUDIO_OUTPUT=text); use "
                "'text'"
            )
        answer = respond(self.model, inputs)
        with self.health.predicting(), contextlib.closing(answer) as events:
            try:
                for event in events:
                    if isinstance(event, Completion | Transcript):
                        for name, value in event.metrics.items():
                            self.record_metric(name, value)
                    yield event
            except RequestTimeout as error:
                raise RequestTimeout(
                    f"the answer was not complete within {self.timeout:g} s, the time limit of "
                    "this service (KIMI_AUDIO_TIMEOUT); set a smaller max_new_tokens or send "
                    "shorter audio"
                ) from error
            except RequestError as error:
                raise type(error)(name_files(str(error), inputs)) from error

    def complete(self, values: Mapping[str, Any]) -> Completion | Transcript:
        """The whole answer to the inputs in ``values``."""
        *_, answer = self.respond(values)
        assert isinstance(answer, Completion | Transcript)
        return answer


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
        self._predicting_since: float | None = None
        self._checking_since: float | None = None

    @contextlib.contextmanager
    def predicting(self) -> Iterator[None]:
        """Around every prediction: the device belongs to it alone."""
        with self._lock:
            self._predicting_since = time.monotonic()
            try:
                yield
            finally:
                self._predicting_since = None

    def check(self) -> None:
        """Return if the device computes, or works on a prediction within its limit.

        Raises DeviceError if it does not answer or computes nonsense, and whatever PyTorch
        raises for a device that is lost or has no memory left.
        """
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


class Uploads:
    """A directory for the temporary files of this process, uploads among them.

    Cog's worker writes every upload to a temporary file, which stays if the prediction is
    canceled at that moment. The directory is removed when the process ends by itself.
    """

    def __init__(self) -> None:
        self._owner = tempfile.TemporaryDirectory(prefix="kimi-audio-uploads-")
        self.directory = Path(self._owner.name)
        tempfile.tempdir = self._owner.name

    def keep(self) -> None:
        """Create the directory again if it is gone, and make it look used to cleaning jobs."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        os.utime(self.directory)

    def sweep(self, used: Iterable[Path]) -> None:
        """Remove all files but those in use: a worker answers one prediction at a time."""
        kept = set(used)
        for path in self.directory.iterdir():
            if path not in kept and path.is_file() and not path.is_symlink():
                path.unlink(missing_ok=True)


def run_periodically(tasks: Sequence[Callable[[], None]], seconds: float) -> None:
    """Call ``tasks`` every so many ``seconds``, on a thread that ends with the process."""

    def loop() -> None:
        while True:
            for task in tasks:
                try:
                    task()
                except OSError as error:
                    log.warning("Clean-up failed: %s", error)
            time.sleep(seconds)

    threading.Thread(target=loop, name="cleanup", daemon=True).start()


def trim_heap() -> None:
    """Give the free pages of the heap back to the system, where the C library is glibc.

    It keeps freed memory in its heap, and as requests are of ever new sizes, the gaps between
    live blocks grow: on a CPU by 0.07 MB per request, over 660 mixed ones.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def sweep_predictions(directory: Path) -> None:
    """Remove the files, then the empty directories, of predictions that ended long ago.

    For every prediction Cog's server (0.23) makes a directory with ``inputs`` and ``outputs`` and
    never deletes it. An answer above 6 MiB, about 98 s of speech, passes through a file in there,
    which is read at once but stays.
    """
    now = time.time()
    for prediction in directory.glob("*"):
        if prediction.is_symlink() or not prediction.is_dir():
            continue
        # Another server may be sweeping, too, or belong to a different user.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            ended = now - prediction.stat().st_mtime > DIRECTORY_SECONDS
            for folder, _, files in os.walk(prediction, topdown=False):
                for file in (Path(folder, name) for name in fnmatch.filter(files, "spill_*.json")):
                    if now - file.lstat().st_mtime > FILE_SECONDS:
                        file.unlink()
                if ended and not os.listdir(folder):
                    os.rmdir(folder)
