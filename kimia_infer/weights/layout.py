"""What a checkpoint directory consists of, and whether all of it is there and complete."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from kimia_infer.utils.errors import CheckpointError, WeightsError
from kimia_infer.weights.header import INDEX_NAME, read_header, read_index
from kimia_infer.weights.manifest import MANIFEST_NAME, read_checkpoint_manifest

RECORD_NAME = "download.json"
UNFINISHED_NAME = ".preparing/manifest.json"
"""The file list of a slim checkpoint that is still being written."""

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth")


@dataclass(frozen=True)
class Repository:
    """A repository on the hub: its id, the pinned commit and patterns of the files to download.

    ``folder`` is where its files are put in the checkpoint directory, "" for the directory itself.
    """

    name: str
    revision: str
    files: tuple[str, ...]
    folder: str = ""


@dataclass(frozen=True)
class CheckpointLayout:
    """The files of one kind of checkpoint; every model describes its own.

    Args:
        model: what the model is called in messages.
        repository: where it is published. Other repositories of the same layout may be named.
        required: files without which it is incomplete, each as alternatives, the published name
            first. A ``model.safetensors.index.json`` stands for the files that it lists.
        command: what downloads it, for messages.
        companions: repositories that complete the first one, unless it has their folder itself.
        embedded: folders that are not required where the ``model*.safetensors`` of the
            repository has tensors whose names begin with the given prefix.
        skipped: folders that the intended use does not need.
        checksums: SHA-256 of large files of the published repository at its pinned commit, by
            their paths.
    """

    model: str
    repository: Repository
    required: tuple[tuple[str, ...], ...]
    command: str = "scripts/download_weights"
    companions: tuple[Repository, ...] = ()
    embedded: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    checksums: Mapping[str, str] = field(default_factory=dict)

    def without(self, *folders: str) -> CheckpointLayout:
        """The same layout for a use that does not need ``folders``."""
        return replace(self, skipped=folders)

    def default_revision(self, name: str) -> str:
        """The pinned commit of the published repository, ``main`` for any other."""
        return self.repository.revision if name == self.repository.name else "main"

    def gaps(self, has: Callable[[str], bool]) -> list[str]:
        """Required files for which ``has`` is false; of alternatives, the published one."""
        return [names[0] for names in self._required() if not any(map(has, names))]

    def _required(self) -> Iterable[tuple[str, ...]]:
        return (names for names in self.required if names[0].split("/")[0] not in self.skipped)

    def missing_files(self, directory: Path) -> list[str]:
        """Required files that ``directory`` lacks, as relative paths; contents are not checked.

        Raises:
            WeightsError: a slim checkpoint that is not finished.
        """
        if (directory / UNFINISHED_NAME).is_file():
            raise WeightsError(f"{directory}: unfinished; run scripts/prepare_weights again")
        slim = read_checkpoint_manifest(directory / MANIFEST_NAME)
        if slim is not None:
            needed = slim.needed(self.skipped)
            return [name for name in needed if not (directory / name).is_file()]
        missing = self.gaps(lambda name: (directory / name).is_file())
        try:
            tensors = self._tensor_files(directory)
        except CheckpointError as error:
            index = self._within(INDEX_NAME)
            return [f"{index} ({_reason(error, directory / index)})", *missing]
        for folder, prefix in self.embedded.items():
            if any(name.startswith(prefix) for name in tensors):
                missing = [name for name in missing if not name.startswith(f"{folder}/")]
        shards = sorted(set(tensors.values()))
        return missing + [name for name in shards if not (directory / name).is_file()]

    def incomplete_files(self, directory: Path) -> list[str]:
        """:meth:`missing_files`, and weight files that are shorter or longer than they should be.

        The size is known from the manifest of a slim checkpoint or the record of a download,
        else from the header of the file.
        """
        missing = self.missing_files(directory)
        if missing:
            return missing
        slim = read_checkpoint_manifest(directory / MANIFEST_NAME)
        if slim is not None:
            sizes = {name: entry.size for name, entry in slim.needed(self.skipped).items()}
            names: Iterable[str] = sizes
        else:
            sizes = read_record(directory).get("files", {})
            present = (
                next((name for name in names if (directory / name).is_file()), "")
                for names in self._required()
            )
            weights = [name for name in present if name.endswith(WEIGHT_SUFFIXES)]
            names = sorted({*self._tensor_files(directory).values(), *weights})
        faults = {name: _fault(directory / name, sizes.get(name)) for name in names}
        return [f"{name} ({fault})" for name, fault in faults.items() if fault]

    def _within(self, name: str) -> str:
        """The path in the directory of a file of the repository."""
        return f"{self.repository.folder}/{name}".lstrip("/")

    def _tensor_files(self, directory: Path) -> dict[str, str]:
        """Which file of ``directory`` holds each tensor of the repository's own model.

        Of a single file that is damaged, and so without a readable header, no names are known.
        """
        index, single = self._within(INDEX_NAME), self._within("model.safetensors")
        if (directory / index).is_file():
            files = read_index(directory / index)
            return {tensor: self._within(file) for tensor, file in files.items()}
        try:
            path = directory / single
            return dict.fromkeys(read_header(path).entries, single) if path.is_file() else {}
        except CheckpointError:
            return {}


def read_record(directory: Path) -> dict:
    """What a download recorded in ``directory``: its sources and the size of every file.

    Empty where there is no record.

    Raises:
        WeightsError: there is one and it cannot be read.
    """
    path = directory / RECORD_NAME
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text())
        if not isinstance(record["files"], dict) or not isinstance(record["sources"], dict):
            raise TypeError("files and sources must be objects")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: not a download record ({error}); delete it") from error
    return record


def require_source(directory: Path, name: str, revision: str) -> None:
    """Refuse a directory that was downloaded, or prepared from a download, from elsewhere."""
    sources = read_record(directory).get("sources")
    if sources is None:
        slim = read_checkpoint_manifest(directory / MANIFEST_NAME)
        sources = slim.sources if slim is not None else None
    if not sources:
        return
    source = sources.get(name)
    if source is None or revision not in (source.get("asked"), source.get("commit")):
        found = ", ".join(f"{n}@{s.get('asked')}" for n, s in sources.items())
        raise WeightsError(
            f"{directory} holds {found}, not {name}@{revision}; name another directory or move it"
        )


def _fault(path: Path, expected: int | None) -> str | None:
    """Why the file at ``path`` is not complete, or None."""
    size = path.stat().st_size
    if expected is not None:
        return None if size == expected else f"{size} bytes instead of {expected}"
    if path.suffix != ".safetensors":
        return None if zipfile.is_zipfile(path) else f"truncated at {size} bytes"
    try:
        read_header(path)
    except CheckpointError as error:
        return _reason(error, path)
    return None


def _reason(error: CheckpointError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
