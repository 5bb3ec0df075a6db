"""The needed files of a repository at one commit: as the hub lists them, or as its cache has them.

The cache is the hub library's own (``HF_HOME``, ``HF_HUB_CACHE``), laid out as
``models--OWNER--NAME/{refs/BRANCH, snapshots/COMMIT/FILE, blobs/CHECKSUM}``, where files are links
to blobs.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.file_download import repo_folder_name

from kimia_infer.utils.errors import WeightsError
from kimia_infer.weights.layout import CheckpointLayout, Repository

TIMEOUT = 30.0  # seconds

_CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    ``checksum`` is the SHA-256 of a large file; a small one is kept in git itself and has the
    git blob id. It is empty if it is not known.
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


def list_remote(repository: Repository, layout: CheckpointLayout) -> Snapshot:
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
    if info.sha is None:
        raise WeightsError(f"the hub names no commit for {repository.name}@{repository.revision}")
    wanted = [files[name] for name in _wanted(files, repository, layout)]
    return Snapshot(repository.name, repository.revision, info.sha, repository.folder, wanted)


def list_cached(repository: Repository, layout: CheckpointLayout) -> Snapshot:
    """The needed files of a repository that the hub's cache holds, perhaps none.

    They have checksums as far as the names of blobs tell.
    """
    branch = _cached_repository(repository.name) / "refs" / repository.revision
    commit = branch.read_text().strip() if branch.is_file() else repository.revision
    empty = Snapshot(repository.name, repository.revision, commit, repository.folder, [])
    folder = cached_folder(empty)
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    files = []
    for name in _wanted(names, repository, layout):
        blob = (folder / name).resolve()
        checksum = blob.name if _CHECKSUM.fullmatch(blob.name) else ""
        files.append(RemoteFile(name, blob.stat().st_size, checksum))
    return replace(empty, files=files)


def _cached_repository(name: str) -> Path:
    """Where the hub library's cache keeps a model repository."""
    folder = repo_folder_name(repo_id=name, repo_type="model")
    return Path(constants.HF_HUB_CACHE).expanduser().absolute() / folder


def cached_folder(snapshot: Snapshot) -> Path:
    """Where that cache keeps the files of a snapshot."""
    return _cached_repository(snapshot.name) / "snapshots" / snapshot.commit


def _wanted(names: Collection[str], repository: Repository, layout: CheckpointLayout) -> list[str]:
    """Those files of a repository that are needed."""

    def wanted(name: str) -> bool:
        folder, _, leaf = name.rpartition("/")
        replaced = leaf == "model.pt" and f"{folder}/model.safetensors" in names
        listed = any(
            fnmatch.fnmatchcase(name, pattern) and pattern.count("/") == name.count("/")
            for pattern in repository.files
        )
        return listed and not replaced and folder not in layout.skipped

    return [name for name in names if wanted(name)]
