"""Where Kokoro is published, and which files a directory of it has.

PyTorch is not imported here, so that missing weights are reported at once.
"""

from __future__ import annotations

from pathlib import Path

from kimia_infer.weights.layout import CheckpointLayout, Repository
from kimia_infer.weights.resolve import cache_directory

CONFIG_NAME = "config.json"
PICKLE_NAME, TENSORS_NAME = "kokoro-v1_0.pth", "model.safetensors"
VOICES_FOLDER, VOICES_NAME = "voices", "voices.safetensors"

FETCH = "fetch Kokoro with scripts/download_weights --model kokoro"
"""How a directory becomes complete."""

KOKORO = Repository(
    name="hexgrad/Kokoro-82M",
    revision="f3ff3571791e39611d31c381e3a41a3af07b4987",
    files=(CONFIG_NAME, PICKLE_NAME, f"{VOICES_FOLDER}/*.pt"),
)

KOKORO_LAYOUT = CheckpointLayout(
    model="Kokoro",
    repository=KOKORO,
    required=(
        (CONFIG_NAME,),
        (PICKLE_NAME, TENSORS_NAME),
        (f"{VOICES_FOLDER}/af_heart.pt", VOICES_NAME),
    ),
    checksums={
        PICKLE_NAME: "496dba118d1a58f5f3db2efc88dbdc216e0483fc89fe6e47ee1f2c53f18ad1e4",
        f"{VOICES_FOLDER}/af_heart.pt": (
            "0ab5709b8ffab19bfd849cd11d98f75b60af7733253ad0d67b12382a102cb4ff"
        ),
    },
)


def packaged_copy() -> Path:
    """Where the directory that is made from packages lies in the cache."""
    return cache_directory() / "Kokoro-82M-packages"
