"""What requests leave behind on disk and in memory, given back.

For every prediction the server (0.23) makes a directory with ``inputs`` and ``outputs`` and
never deletes it. An answer above 6 MiB, about 98 s of speech, passes through a file in there,
which is read at once but stays.

Its worker writes every upload to a temporary file, which stays if the prediction is canceled
just then.

The C library keeps freed memory in its heap. As requests are of ever new sizes, the holes between
what stays hold more and more of it: on a CPU 0.07 MB a request, over 660 mixed ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SERVER_DIRECTORY = Path("/tmp/coglet/predictions")
"""Fixed in the server (published implementation); servers on one machine share it."""

FILE_SECONDS = 30.0
"""Age at which a file has been read long since: the server reads it within milliseconds."""

DIRECTORY_SECONDS = 600.0
"""Age at which an empty directory is removed; one in use gets its large answer in time."""


class Uploads:
    """Has this process make its temporary files, uploads among them, in a directory of their own.

    The directory is removed when the process ends by itself.
    """

    def __init__(self) -> None:
        self._owner = tempfile.TemporaryDirectory(prefix="kimi-audio-")
        self.directory = Path(self._owner.name)
        tempfile.tempdir = self._owner.name

    def keep(self) -> None:
        """Have the directory exist and look used, whatever cleans old directories here."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        os.utime(self.directory)

    def sweep(self, inputs: Iterable[Any]) -> None:
        """Remove the files of other predictions than the one with these ``inputs``.

        A worker answers one prediction at a time, so all others are over.
        """
        used = {
            file for value in inputs for file in (value if isinstance(value, list) else [value])
        }
        for path in self.directory.iterdir():
            if path not in used and path.is_file() and not path.is_symlink():
                path.unlink(missing_ok=True)


def keep_clean(
    uploads: Uploads, directory: Path = SERVER_DIRECTORY, every: float = FILE_SECONDS
) -> None:
    """Sweep ``directory`` and trim the heap, on a thread of its own until the process ends."""

    def loop() -> None:
        while True:
            try:
                uploads.keep()
                sweep(directory)
            except OSError as error:
                log.warning("temporary files cannot be looked after: %s", error)
            trim_heap()
            time.sleep(every)

    threading.Thread(target=loop, name="leftovers", daemon=True).start()


def trim_heap() -> None:
    """Give the free pages of the heap back to the system, where the C library is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def sweep(directory: Path) -> None:
    """Remove files and then empty directories of predictions that ended long ago."""
    if not directory.is_dir():
        return
    now = time.time()
    for prediction in directory.iterdir():
        # Another server may be sweeping, too, or be a different user's.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if prediction.is_symlink() or not prediction.is_dir():
                continue
            _sweep_prediction(prediction, now)


def _sweep_prediction(prediction: Path, now: float) -> None:
    age = now - prediction.stat().st_mtime
    for folder in (prediction / "inputs", prediction / "outputs"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        for file in folder.glob("spill_*.json"):
            if now - file.lstat().st_mtime > FILE_SECONDS:
                file.unlink()
        if age > DIRECTORY_SECONDS and not any(folder.iterdir()):
            folder.rmdir()
    if age > DIRECTORY_SECONDS and not any(prediction.iterdir()):
        prediction.rmdir()
