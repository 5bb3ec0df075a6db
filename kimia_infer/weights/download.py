"""Download a checkpoint directory from the hub: only the files that are needed, verified.

Files are fetched one by one with the hub library's ``http_get``. Its ``snapshot_download`` deletes
a file that is not complete when the process ends (seen with 2.4), and the largest file here has
19 GB. A file gets its name once it is complete and its checksum is right.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # base class of the HTTP client's errors
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from kimia_infer.utils.errors import WeightsError
from kimia_infer.utils.files import PARTIAL, locked, write_text
from kimia_infer.weights.layout import (
    RECORD_NAME,
    CheckpointLayout,
    Repository,
    read_record,
    require_source,
)

CONNECTIONS = 8
TIMEOUT = 30.0  # seconds


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    ``checksum`` is the SHA-256 of a large file; a small one is kept in git itself and has the
    git blob id.
    """

    name: str
    size: int
    checksum: str


@dataclass(frozen=True)
class Snapshot:
    """The files to have of a repository at one commit, in ``folder`` of the directory."""

    name: str
    asked: str
    commit: str
    folder: str
    files: list[RemoteFile]

    def paths(self) -> dict[str, RemoteFile]:
        """The files by their paths in the checkpoint directory."""
        prefix = f"{self.folder}/" if self.folder else ""
        return {prefix + file.name: file for file in self.files}


def download(
    directory: Path, layout: CheckpointLayout, name: str | None = None, revision: str | None = None
) -> None:
    """Make ``directory`` a complete checkpoint.

    A complete directory is left alone, without asking the hub. Files that are there are kept,
    so that the next call completes what one has left out or was interrupted in.

    Args:
        directory: created if it does not exist.
        layout: which files are needed.
        name: of the repository; by default the published one.
        revision: by default the pinned commit of the published repository, else ``main``.

    Raises:
        WeightsError: no network, unknown or closed repository, too little disk space, damaged
            content, or a directory that holds another checkpoint.
    """
    name = name or layout.repository.name
    revision = revision or layout.default_revision(name)
    require_source(directory, name, revision)
    if not layout.incomplete_files(directory):
        return
    with _explained(name, revision):
        snapshots = _needed(name, revision, layout)
        with locked(directory / ".download.lock", wait=True):
            if layout.incomplete_files(directory):  # another process may have completed it
                _fetch(directory, snapshots)
    missing = layout.incomplete_files(directory)
    if missing:
        raise WeightsError(f"{directory}: {missing[0]} is missing or cut short in {name}, too")


def _needed(name: str, revision: str, layout: CheckpointLayout) -> list[Snapshot]:
    """The repository and the companions that complete it."""
    found = [_list(Repository(name, revision, layout.repository.files), layout)]
    for companion in layout.companions:
        if not any(path.startswith(f"{companion.folder}/") for path in found[0].paths()):
            with _explained(companion.name, companion.revision):
                found.append(_list(companion, layout))
    paths = {path for snapshot in found for path in snapshot.paths()}
    gaps = layout.gaps(paths.__contains__)
    if gaps:
        raise WeightsError(
            f"{name}@{revision} has no {gaps[0]}, so it is no {layout.model} checkpoint"
        )
    return found


def _list(repository: Repository, layout: CheckpointLayout) -> Snapshot:
    """The needed files of a repository; a pickle only where it has no safetensors instead."""
    info = HfApi().model_info(
        repository.name, revision=repository.revision, files_metadata=True, timeout=TIMEOUT
    )
    files = {}
    for entry in info.siblings or ():
        lfs = entry.lfs
        size, checksum = (entry.size, entry.blob_id) if lfs is None else (lfs.size, lfs.sha256)
        if size is None or checksum is None:
            raise WeightsError(
                f"the hub gives no size or checksum for {entry.rfilename} of {repository.name}"
            )
        files[entry.rfilename] = RemoteFile(entry.rfilename, size, checksum)

    def wanted(name: str) -> bool:
        folder, _, leaf = name.rpartition("/")
        replaced = leaf == "model.pt" and f"{folder}/model.safetensors" in files
        listed = any(
            fnmatch.fnmatchcase(name, pattern) and pattern.count("/") == name.count("/")
            for pattern in repository.files
        )
        return listed and not replaced and folder not in layout.skipped

    if info.sha is None:
        raise WeightsError(f"the hub names no commit for {repository.name}@{repository.revision}")
    return Snapshot(
        repository.name,
        repository.revision,
        info.sha,
        repository.folder,
        [file for name, file in files.items() if wanted(name)],
    )


def _fetch(directory: Path, snapshots: list[Snapshot]) -> None:
    """Download what is missing, verify it, and record sources and sizes."""
    recorded = read_record(directory).get("files", {})
    files = {path: file for snapshot in snapshots for path, file in snapshot.paths().items()}
    todo = {
        path: snapshot
        for snapshot in snapshots
        for path, file in snapshot.paths().items()
        if not recorded.get(path) == file.size == _size(directory / path)
        and not _is_intact(directory / path, file)
    }
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
    except OfflineModeIsEnabled as error:
        problem, cause = "cannot be read while HF_HUB_OFFLINE is set: unset it", error
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
