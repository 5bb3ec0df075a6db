"""Files by path or URL: local ones, and through pyarrow those of S3 and other stores."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kimia_infer.utils.errors import ConfigurationError
from kimia_infer.utils.files import replacing


def is_url(name: str) -> bool:
    return "://" in name


def open_store(name: str) -> Store:
    """The folder ``name``: a local path, or a URL such as ``s3://bucket/folder``.

    Raises ConfigurationError for a URL that pyarrow does not know.
    """
    return ArrowStore(name) if is_url(name) else Store(name)


class Store:
    """A local folder. Names of files are relative to it, with ``/`` between their parts."""

    def __init__(self, name: str):
        self.name = name
        self._root = Path(name)

    def files(self) -> list[str]:
        """Names of all files below the folder, sorted; none if it does not exist."""
        found = (path for path in self._root.rglob("*") if path.is_file())
        return sorted(path.relative_to(self._root).as_posix() for path in found)

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        with replacing(self._root / name) as partial:
            partial.write_bytes(content)

    def remove(self, name: str) -> None:
        (self._root / name).unlink()

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """The path of a file on this machine; ``name`` may also be an absolute path or a URL.

        Raises OSError if a URL cannot be read.
        """
        if is_url(name):
            folder, _, file = name.rpartition("/")
            with open_store(folder).local(file) as path:
                yield path
        else:
            yield self._root / name


class ArrowStore(Store):
    """A folder of a store that pyarrow knows, by its URL."""

    def __init__(self, name: str):
        super().__init__(name)
        import pyarrow
        from pyarrow.fs import FileSystem

        try:
            self._files, self._path = FileSystem.from_uri(name)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
            raise ConfigurationError(f"{name}: {error}") from error

    def files(self) -> list[str]:
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self._path, allow_not_found=True, recursive=True)
        found = self._files.get_file_info(selector)
        start = len(self._path.rstrip("/")) + 1
        return sorted(info.path[start:] for info in found if info.type == FileType.File)

    def read(self, name: str) -> bytes:
        with self._files.open_input_stream(self._full(name)) as stream:
            return stream.read()

    def write(self, name: str, content: bytes) -> None:
        full = self._full(name)
        try:
            stream = self._files.open_output_stream(full)
        except FileNotFoundError:  # of stores that have folders
            self._files.create_dir(os.path.dirname(full), recursive=True)
            stream = self._files.open_output_stream(full)
        with stream:
            stream.write(content)

    def remove(self, name: str) -> None:
        self._files.delete_file(self._full(name))

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        if is_url(name) or os.path.isabs(name):
            with super().local(name) as path:
                yield path
            return
        with tempfile.TemporaryDirectory(prefix="kimi-audio-batch-") as folder:
            path = Path(folder) / os.path.basename(name)
            path.write_bytes(self.read(name))
            yield path

    def _full(self, name: str) -> str:
        return f"{self._path.rstrip('/')}/{name}"
