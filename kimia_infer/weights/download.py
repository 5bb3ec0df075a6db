"""Download a checkpoint directory from the hub: only the files that are needed, verified.

What the hub library's own cache holds (``HF_HOME``, ``HF_HUB_CACHE``) is linked, not downloaded.
Files are fetched one by one with the hub library's ``http_get``. Its ``snapshot_download`` deletes
a file that is not complete when the process ends (seen with 2.4), and the largest file here has
19 GB. A file gets its name once it is complete and its checksum is right.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants, hf_hub_url, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # base class of the HTTP client's errors
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from kimia_infer.utils.errors import WeightsError
from kimia_infer.utils.files import PARTIAL, link_or_copy, locked, write_text
from kimia_infer.weights.layout import (
    RECORD_NAME,
    CheckpointLayout,
    Repository,
    read_record,
    require_source,
)
from kimia_infer.weights.snapshots import (
    RemoteFile,
    Snapshot,
    cached_folder,
    list_cached,
    list_remote,
)

CONNECTIONS = 8
SMALL_BYTES = 16 << 20
"""Up to this size, files of the hub's cache are hashed before they are used."""

_COMMIT = re.compile(r"[0-9a-f]{40}")

Place = Callable[[Path, Path], None]
"""Puts a file of the hub's cache where it belongs in the directory."""


def download(
    directory: Path,
    layout: CheckpointLayout,
    name: str | None = None,
    revision: str | None = None,
    copies: bool = False,
) -> None:
    """Make ``directory`` a complete checkpoint.

    A complete directory is left alone, without asking the hub. Files that are there are kept,
    so that the next call completes what one has left out or was interrupted in. The hub is not
    asked either if its own cache has all files of a commit, or of a branch while
    ``HF_HUB_OFFLINE`` is set.

    Args:
        directory: created if it does not exist.
        layout: which files are needed.
        name: of the repository; by default the published one.
        revision: by default the pinned commit of the published repository, else ``main``.
        copies: files of the hub's cache become files of ``directory``, which may be moved,
            instead of symbolic links.

    Raises:
        WeightsError: no network, unknown or closed repository, too little disk space, damaged
            content, or a directory that holds another checkpoint.
    """
    name = name or layout.repository.name
    revision = revision or layout.default_revision(name)
    require_source(directory, name, revision)
    if not layout.incomplete_files(directory):
        return
    place = _place_copy if copies else _place_link
    with _explained(name, revision):
        if is_offline_mode() or _COMMIT.fullmatch(revision):
            lacking = _take_cached(directory, layout, name, revision, place)
            if not lacking:
                return
            if is_offline_mode():
                raise WeightsError(
                    f"{name}@{revision}: HF_HUB_OFFLINE is set, and the hub's cache in "
                    f"{constants.HF_HUB_CACHE} {lacking}; unset it, or set HF_HOME to a complete "
                    "cache"
                )
        snapshots = _needed(name, revision, layout, list_remote)
        gaps = _gaps(snapshots, layout)
        if gaps:
            raise WeightsError(
                f"{name}@{revision} has no {gaps[0]}, so it is no {layout.model} checkpoint"
            )
        if (name, revision) == (layout.repository.name, layout.repository.revision):
            _require_checksums(snapshots[0], layout)
        with locked(directory / ".download.lock", wait=True):
            if layout.incomplete_files(directory):  # another process may have completed it
                _fetch(directory, snapshots, place)
    missing = layout.incomplete_files(directory)
    if missing:
        raise WeightsError(f"{directory}: {missing[0]} is missing or cut short in {name}, too")


def _take_cached(
    directory: Path, layout: CheckpointLayout, name: str, revision: str, place: Place
) -> str | None:
    """Complete ``directory`` from the hub's cache alone; else say what is wrong with the cache."""
    snapshots = _needed(name, revision, layout, list_cached)
    for snapshot in snapshots:
        if not snapshot.files:
            others = sorted(path.name for path in cached_folder(snapshot).parent.glob("*"))
            found = f" but at {', '.join(others)}" if others else ""
            return f"does not have {snapshot.name} at revision {snapshot.asked}{found}"
    gaps = _gaps(snapshots, layout)
    if gaps:
        return f"has no {gaps[0]} of {name}"
    with locked(directory / ".download.lock", wait=True):
        for snapshot in snapshots:
            for path, file in snapshot.paths().items():
                if _size(directory / path) == file.size:
                    continue
                if not _is_usable(cached := cached_folder(snapshot) / file.name, file):
                    return f"has a damaged {cached}"
                place(cached, directory / path)
        missing = layout.incomplete_files(directory)
        if missing:
            return f"lacks {missing[0]} of {name}"
        _record(directory, snapshots)
    return None


def _needed(
    name: str,
    revision: str,
    layout: CheckpointLayout,
    look: Callable[[Repository, CheckpointLayout], Snapshot],
) -> list[Snapshot]:
    """The repository and the companions that complete it, as ``look`` finds them."""
    published = replace(layout.repository, name=name, revision=revision)
    found = [look(published, layout)]
    for companion in layout.companions:
        if not any(path.startswith(f"{companion.folder}/") for path in found[0].paths()):
            with _explained(companion.name, companion.revision):
                found.append(look(companion, layout))
    return found


def _require_checksums(snapshot: Snapshot, layout: CheckpointLayout) -> None:
    for file in snapshot.files:
        expected = layout.checksums.get(file.name, file.checksum)
        if file.checksum != expected:
            raise WeightsError(
                f"{snapshot.name}: the hub has {file.name} with SHA-256 {file.checksum}, "
                f"expected {expected}"
            )


def _gaps(snapshots: list[Snapshot], layout: CheckpointLayout) -> list[str]:
    paths = {path for snapshot in snapshots for path in snapshot.paths()}
    return layout.gaps(paths.__contains__)


def _place_link(cached: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(cached)


def _place_copy(cached: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    link_or_copy(cached, path)


def _fetch(directory: Path, snapshots: list[Snapshot], place: Place) -> None:
    """Download what neither ``directory`` nor the hub's cache has, verified; record it all."""
    recorded = read_record(directory).get("files", {})
    files = {path: file for snapshot in snapshots for path, file in snapshot.paths().items()}
    todo = {}
    for snapshot in snapshots:
        for path, file in snapshot.paths().items():
            known = recorded.get(path) == file.size == _size(directory / path)
            if known or _is_intact(directory / path, file):
                continue
            if _is_usable(cached := cached_folder(snapshot) / file.name, file):
                place(cached, directory / path)
            else:
                todo[path] = snapshot
    present = sum(_size(_partial(directory / path, files[path])) or 0 for path in todo)
    needed = sum(files[path].size for path in todo) - present
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise WeightsError(
            f"{directory}: {needed:,} bytes are still to be downloaded and {free:,} are free; "
            f"free {needed - free:,} bytes or name a directory on a larger disk"
        )
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        running = [
            pool.submit(_fetch_file, snapshot, files[path], directory / path)
            for path, snapshot in todo.items()
        ]
        try:
            for done in as_completed(running):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _record(directory, snapshots)


def _record(directory: Path, snapshots: list[Snapshot]) -> None:
    """Write down where the files of ``directory`` are from, and their sizes."""
    files = {path: file for snapshot in snapshots for path, file in snapshot.paths().items()}
    sources = {s.name: {"asked": s.asked, "commit": s.commit} for s in snapshots}
    record = {"sources": sources, "files": {path: file.size for path, file in files.items()}}
    write_text(directory / RECORD_NAME, json.dumps(record, indent=1, sort_keys=True) + "\n")


def _partial(path: Path, file: RemoteFile) -> Path:
    """Where the beginning of a file is kept; another version of it has another name."""
    return path.with_name(f".{path.name}.{file.checksum[:12]}{PARTIAL}")


def _fetch_file(snapshot: Snapshot, file: RemoteFile, path: Path) -> None:
    """Download one file to ``path``, from where an earlier attempt was interrupted."""
    partial = _partial(path, file)
    partial.parent.mkdir(parents=True, exist_ok=True)
    if (_size(partial) or 0) > file.size:
        partial.unlink()
    with partial.open("ab") as content:
        http_get(
            hf_hub_url(snapshot.name, file.name, revision=snapshot.commit),
            content,
            resume_size=content.tell(),
            headers=build_hf_headers(),
            expected_size=file.size,
            displayed_filename=file.name,
        )
        content.flush()
        os.fsync(content.fileno())
    if not _is_intact(partial, file):
        partial.unlink()
        raise WeightsError(f"{path}: damaged on the way; run the download again")
    partial.replace(path)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _is_usable(path: Path, file: RemoteFile) -> bool:
    """Whether a file of the hub's cache is ``file``; large ones, by their size alone."""
    if file.size > SMALL_BYTES or not file.checksum:
        return _size(path) == file.size
    return _is_intact(path, file)


def _is_intact(path: Path, file: RemoteFile) -> bool:
    """Whether ``path`` has the content of ``file``, by the kind of checksum that the hub gives."""
    if _size(path) != file.size:
        return False
    with path.open("rb") as content:
        if len(file.checksum) == 64:
            return hashlib.file_digest(content, "sha256").hexdigest() == file.checksum
        blob = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        return hashlib.file_digest(content, lambda: blob).hexdigest() == file.checksum


@contextmanager
def _explained(name: str, revision: str) -> Iterator[None]:
    """Turn what can go wrong with the hub and the disk into one :class:`WeightsError`."""
    try:
        yield
    except GatedRepoError as error:
        problem, cause = "is restricted: accept its terms on the hub and set HF_TOKEN", error
    except RepositoryNotFoundError as error:
        problem, cause = "is unknown to the hub, or private: check the name or set HF_TOKEN", error
    except RevisionNotFoundError as error:
        problem, cause = f"has no revision {revision}", error
    except HfHubHTTPError as error:
        problem, cause = f"cannot be read: {str(error).strip().splitlines()[0]}", error
    except HTTPError as error:
        problem, cause = f"cannot be reached ({error}): check the network and HF_ENDPOINT", error
    except OSError as error:
        if error.errno is None:  # the library's own, such as a file of another size
            reason = str(error).strip().splitlines()[0]
            problem = f"cannot be downloaded: {reason}; run the download again to continue"
        else:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "; the disk is full: make room and run the download again to continue"
            problem = f"cannot be stored: {error}{hint if full else ''}"
        cause = error
    else:
        return
    raise WeightsError(f"{name} {problem}") from cause
