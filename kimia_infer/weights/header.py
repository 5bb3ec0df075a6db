"""Headers and indices of safetensors files, read without importing PyTorch."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import NamedTuple

from kimia_infer.utils.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"


class Header(NamedTuple):
    """What a safetensors file says about itself.

    ``start`` is where the values begin, in bytes. ``entries`` has dtype, shape and data_offsets
    of every tensor. ``checksum`` is the CRC-32 of the length field and the header's text.
    """

    start: int
    entries: dict[str, dict]
    checksum: int


def read_header(path: Path) -> Header:
    """Read the header and check that the file has as many bytes as it says.

    Raises:
        CheckpointError: missing, truncated, too long, or not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or 8 + length > size:
                raise CheckpointError(f"{path}: file truncated inside its header")
            text = file.read(length)
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        ends = {8 + length + e["data_offsets"][1]: name for name, e in entries.items()}
        expected = max(ends, default=8 + length)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: file missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error
    if size < expected:
        lost = min(end for end in ends if end > size)
        raise CheckpointError(
            f"{path}: file truncated: tensor {ends[lost]} needs {lost} bytes, the file has {size}"
        )
    if size > expected:
        raise CheckpointError(f"{path}: {size} bytes instead of {expected}")
    return Header(8 + length, entries, zlib.crc32(start + text))


def read_index(path: Path) -> dict[str, str]:
    """Which file beside the index ``path`` holds each tensor.

    Raises:
        CheckpointError: not a safetensors index, or one that names another directory.
    """
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        outside = {n: shard for n, shard in weight_map.items() if Path(shard).name != shard}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a safetensors index ({error})") from error
    for name, shard in outside.items():
        raise CheckpointError(
            f"{path}: tensor {name} is said to be in {shard!r}, outside the directory"
        )
    return weight_map
