"""The manifest of a slim checkpoint: its files with their sizes and checksums.

``manifest.json`` has the size and SHA-256 of every file. For weight files it also has the CRC-32
of the header and of every tensor: loading computes those from the bytes it reads (several GB/s
per core, where SHA-256 can be ten times slower), and can name the damaged tensor. They protect
against damage in transit or on the disk, not against an attacker who can write both the weights
and the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from kimia_infer.utils.errors import CheckpointError
from kimia_infer.utils.files import write_text
from kimia_infer.weights.header import read_header

if TYPE_CHECKING:  # layouts are checked where PyTorch need not be imported
    from kimia_infer.weights.tensors import StoredTensor

MANIFEST_NAME = "manifest.json"
PACKED_FOLDER = "packed"
"""Folder of files that are mapped as they are. Loading checks their sizes alone, as everything else
would read them."""

FORMAT = 1


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of a file; for weights CRC-32 of the header and each tensor."""

    size: int
    sha256: str
    header: int | None = None
    tensors: dict[str, int] | None = None


@dataclass
class CheckpointManifest:
    """How a slim checkpoint was made, and its files by their relative names.

    ``dtype`` is "served" or "source"; ``sources`` are the hub repositories that the download
    of the source recorded; ``source_files`` the size and modification time of what was read.
    ``quantization`` describes how the language model is quantized, None where it is not, and
    ``packed`` tells that its matrices are packed for a CPU.
    """

    dtype: str
    shard_bytes: int
    sources: dict[str, dict]
    source_files: dict[str, dict[str, int]]
    files: dict[str, FileEntry]
    quantization: dict[str, Any] | None = None
    packed: bool = False

    def needed(self, skipped: Collection[str] = ()) -> dict[str, FileEntry]:
        """The files outside the folders ``skipped``."""
        return {
            name: entry for name, entry in self.files.items() if name.split("/")[0] not in skipped
        }

    def check(self, directory: Path, skipped: Collection[str] = ()) -> None:
        """Check the size of every file, the content of small ones, the headers of weights.

        The folders ``skipped`` are not read.

        Raises:
            CheckpointError: a file is missing, of another size, or changed; it is named.
        """
        for name, entry in self.needed(skipped).items():
            path = directory / name
            if not path.is_file():
                raise CheckpointError(f"{path}: file missing, the manifest lists it")
            size = path.stat().st_size
            if size != entry.size:
                raise CheckpointError(
                    f"{path}: {size} bytes instead of {entry.size}; copy or prepare it again"
                )
            if name.startswith(f"{PACKED_FOLDER}/"):
                continue
            if entry.tensors is None:
                found, expected = sha256_of(path), entry.sha256
            else:
                found, expected = _header_checksum(path), entry.header
            if found != expected:
                raise CheckpointError(
                    f"{path}: damaged, or changed since the manifest was written; copy or prepare "
                    "it again"
                )

    def checksum(self, directory: Path, stored: StoredTensor) -> int:
        """The CRC-32 that a tensor below ``directory`` must have.

        Raises:
            CheckpointError: the manifest does not list it.
        """
        entry = self.files.get(stored.file.relative_to(directory).as_posix())
        if entry is None or entry.tensors is None or stored.name not in entry.tensors:
            raise CheckpointError(
                f"{stored.file}: tensor {stored.name} is not listed in "
                f"{directory / MANIFEST_NAME}; remove files that are not of this checkpoint"
            )
        return entry.tensors[stored.name]

    def write(self, path: Path) -> None:
        """Write to ``path``, which has either the old content or the new one at any time."""
        values = {"format": FORMAT, **asdict(self)}
        if self.quantization is None:  # as in manifests from before there was any
            del values["quantization"]
        if not self.packed:
            del values["packed"]
        write_text(path, json.dumps(values, indent=1) + "\n")


def read_checkpoint_manifest(path: Path) -> CheckpointManifest | None:
    """The manifest at ``path``, or None where there is no such file.

    Raises:
        CheckpointError: the file is something else, or of a later format.
    """
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        version = values.pop("format")
        if version != FORMAT:
            raise ValueError(f"format {version!r}, this program reads format {FORMAT}")
        files = {name: FileEntry(**entry) for name, entry in values.pop("files").items()}
        for name in map(PurePosixPath, files):
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"{name} lies outside the directory")
        return CheckpointManifest(**values, files=files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a manifest of prepare_weights ({error})") from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header_checksum(path: Path) -> int | None:
    try:
        return read_header(path).checksum
    except CheckpointError:  # damaged in a way that shows
        return None
