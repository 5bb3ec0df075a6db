"""The files of Cog's server: room for them, and those of earlier predictions removed."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import time
from pathlib import Path

from kimia_infer.serving.process import require_room
from kimia_infer.utils.errors import ConfigurationError

SERVER_DIRECTORY = Path("/tmp/coglet/predictions")
"""Where Cog's server keeps files of predictions: fixed, and shared by the servers of a machine."""

FILE_SECONDS = 30.0
"""Age at which a file can be removed: the server reads it within milliseconds."""

DIRECTORY_SECONDS = 600.0
"""Age at which an empty directory is removed; one in use gets its large answer in time."""


def require_server_directory(directory: Path) -> None:
    """Raise ConfigurationError if Cog's server cannot make directories in ``directory``.

    Where it cannot, it counts its slot as busy from the first prediction on, until a restart.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        require_room(directory)
    except OSError as error:
        raise ConfigurationError(
            f"{directory}: cannot be written ({error.strerror}); Cog's server keeps its files "
            "there: make room, make it writable for this user, or mount a volume at /tmp"
        ) from error


def is_only_server() -> bool:
    """Whether no other server of Cog runs that could be using files of predictions."""
    servers, parents = set(), {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended by now
            if b"cog.server.http" in (process / "cmdline").read_bytes():
                servers.add(process.name)
            parents[process.name] = (process / "stat").read_text().rpartition(")")[2].split()[1]
    own = str(os.getpid())
    while own in parents:  # the server of this worker, and whatever started it
        own = parents[own]
        servers.discard(own)
    return bool(parents) and not servers


def sweep_predictions(
    directory: Path,
    file_seconds: float = FILE_SECONDS,
    directory_seconds: float = DIRECTORY_SECONDS,
) -> None:
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
            ended = now - prediction.stat().st_mtime >= directory_seconds
            for folder, _, files in os.walk(prediction, topdown=False):
                for file in (Path(folder, name) for name in fnmatch.filter(files, "spill_*.json")):
                    if now - file.lstat().st_mtime >= file_seconds:
                        file.unlink()
                if ended and not os.listdir(folder):
                    os.rmdir(folder)
