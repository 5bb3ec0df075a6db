"""Files that are whole or absent, locks between processes, and journals that survive a crash."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import logging
import os
import shutil
import stat
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

logger = logging.getLogger(__name__)

PARTIAL = ".part"
"""Ending of files and directories that are still being written."""

_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)

KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def no_file(path: str | os.PathLike[str]) -> str:
    """What is at ``path``, which is no regular file, as an error message says it."""
    name = os.fspath(path)
    try:
        kind = stat.S_IFMT(os.stat(name).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for null characters
        return f"no such file: {name!r}"
    except OSError as error:
        return f"{name[:1000]!r} cannot be read ({error.strerror})"
    return f"{name!r} is {KINDS.get(kind, 'no file that can be used')}"


@contextlib.contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """A path to write a file to, which becomes ``path`` if the block succeeds.

    It is flushed to the disk before it is renamed, and removed if the block raises. Until then it
    lies in ``folder``, by default that of ``path``, which is created where it is missing. Errors
    name ``path``, also those of a full disk, which name no file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = (folder or path.parent) / f".{path.name}.{uuid.uuid4().hex}{PARTIAL}"
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        full = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or error.filename == str(partial):
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write objects as JSON Lines, whole or not at all; the number of lines."""
    count = 0
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """An empty directory to fill, which takes the place of ``path`` if the block succeeds.

    What an interrupted attempt left behind is removed first. All files are flushed to the disk
    before the directory is renamed. Only one process may do this for a path at a time.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)
        if path.exists():
            shutil.rmtree(path)
        partial.replace(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(path: Path, new: Path) -> None:
    """``new`` as a hard link to ``path`` where the file system allows, else as a copy."""
    try:
        os.link(path.resolve(), new)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(path, new)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path``, which other processes on this machine then cannot.

    If another process holds it, raises BlockingIOError at once, or with ``wait`` logs that and
    waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            logger.warning("waiting for another process that works in %s", path.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


OWNER = ".owner"
"""The file by whose lock a temporary directory is known to be in use."""


class OwnedDirectory:
    """A temporary directory, removed with this object, or by a later process if this one is killed.

    Making one removes those with the same ``prefix`` whose process is gone.
    """

    def __init__(self, prefix: str):
        parent = Path(tempfile.gettempdir())
        remove_orphans(parent, prefix)
        # Locked before it has its name: from then on others may look whether it is in use.
        unnamed = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
        self._lock = (unnamed / OWNER).open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = unnamed.rename(parent / unnamed.name[1:])
        self._remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self._remove()
        self._lock.close()


def remove_orphans(parent: Path, prefix: str) -> None:
    """Remove what is left of each OwnedDirectory whose process was killed."""
    for owner in parent.glob(f"{glob.escape(prefix)}*/{OWNER}"):
        with contextlib.suppress(OSError), owner.open("r+b") as lock:  # maybe another user's
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(owner.parent, ignore_errors=True)


class Journal:
    """A JSON Lines file that grows by one object at a time, for one process at a time.

    Opening it drops a last line that an interruption cut short. Use it as a context manager.

    Raises:
        BlockingIOError: another process has it open.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Journal:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._drop_cut_line(file)
        except BaseException:
            file.close()
            raise
        self._file = file
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
        self._file = None

    @property
    def _opened(self) -> IO[bytes]:
        if self._file is None:
            raise ValueError(f"{self.path}: the journal is not open")
        return self._file

    @staticmethod
    def _drop_cut_line(file: IO[bytes]) -> None:
        file.seek(0)
        end = 0
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(end)
                break
            end += len(line)

    def add(self, row: dict[str, Any]) -> int:
        """Append an object, which then survives the end of the process; where its line begins."""
        file = self._opened
        place = file.seek(0, os.SEEK_END)
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        return place

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Every line so far and where it begins."""
        file = self._opened
        file.seek(0)
        place = 0
        for line in file:
            yield place, line
            place += len(line)

    def read(self, place: int) -> dict[str, Any]:
        """The object of the line that begins at ``place``."""
        file = self._opened
        file.seek(place)
        return json.loads(file.readline())


def nameless_file() -> BinaryIO:
    """A new file for reading and writing that nothing else can open: in memory on Linux.

    It has no buffer, so that its descriptor can be used beside it.
    """
    create = getattr(os, "memfd_create", None)
    if create is None:
        return tempfile.TemporaryFile(buffering=0)
    return os.fdopen(create("nameless"), "w+b", buffering=0)
