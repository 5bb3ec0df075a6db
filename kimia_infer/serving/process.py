"""What the process of every server does: its log, its temporary files, giving memory back."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kimia_infer.utils.errors import ConfigurationError
from kimia_infer.utils.files import OwnedDirectory

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of the parameters in glibc's ``malloc.h``."""

MMAP_BYTES = 32 << 20
"""Blocks of this size have pages of their own, which go back at once. It is the largest that glibc
allows, and what it comes to by itself on a CPU: new pages cost time, a tenth more for 1 MiB."""

FREE_BYTES = 16 << 20
"""The most that stays free at the end of each part of the heap."""


def show_log() -> None:
    """Print the package's log, which never contains a request's content, on stderr."""
    package = logging.getLogger("kimia_infer")
    package.setLevel(logging.INFO)
    if not package.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        package.addHandler(handler)
        package.propagate = False


def require_room(directory: Path) -> None:
    """Raise OSError if no file can be written in ``directory``."""
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".kimi-audio-") as file:
        file.write(bytes(4096))
        file.flush()


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
    live blocks grow: on a CPU by 0.07 MB per request, over 660 mixed ones. ``malloc_trim`` leaves
    what is free at the end of the part of the heap that a thread uses. That may be twice the
    largest block that was freed, up to 64 MiB in each of many parts, so it is limited, too.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        # Setting one of them alone would fix the other where it is.
        library.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, FREE_BYTES)
        library.malloc_trim(0)


class Uploads:
    """A directory for the temporary files of this process, those of requests among them.

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
        weakref.finalize(self, _use_again, tempfile.tempdir, str(self.directory))
        tempfile.tempdir = str(self.directory)
        self._numbers = itertools.count()

    def keep(self) -> None:
        """Create the directory again if it is gone, and make it look used to cleaning jobs."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        os.utime(self.directory)

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty folder for the files of one request, which go with it at its end.

        On a full disk there is none: whoever stores a file in it notices.
        """
        path = self.directory / f"request-{next(self._numbers)}"
        with contextlib.suppress(OSError):
            path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _use_again(before: str | None, directory: str) -> None:
    """Let temporary files be where they were ``before``, unless that was changed once more."""
    if tempfile.tempdir == directory:
        tempfile.tempdir = before
