"""Where Step-Audio-EditX is published, and which files a directory of it has.

The directory holds the two published repositories under their names:

    Step-Audio-EditX/       config.json  tokenizer.model  model*.safetensors
        CosyVoice-300M-25Hz/    cosyvoice.yaml  flow.pt  hift.pt  campplus.onnx
    Step-Audio-Tokenizer/   linguistic_tokenizer.npy  speech_tokenizer_v1.onnx
        dengcunqin/speech_paraformer-.../   config.yaml  model.pt  am.mvn

PyTorch is not imported here, so that missing weights are reported at once.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from kimia_infer.utils.errors import WeightsError
from kimia_infer.weights.header import INDEX_NAME
from kimia_infer.weights.layout import CheckpointLayout, Repository
from kimia_infer.weights.resolve import local_copy, resolve

MODEL_FOLDER, TOKENIZER_FOLDER = "Step-Audio-EditX", "Step-Audio-Tokenizer"
SOUND_FOLDER = "CosyVoice-300M-25Hz"
RECOGNIZER_FOLDER = (
    "dengcunqin/speech_paraformer-large_asr_nat-zh-cantonese-en-16k-vocab8501-online"
)
CENTERS_NAME, VQ06_NAME = "linguistic_tokenizer.npy", "speech_tokenizer_v1.onnx"
SPEAKER_NAME = "campplus.onnx"
TEXT_NAMES = ("tokenizer.model", "tokenizer.json")

SOUND_FILES = tuple(
    f"{SOUND_FOLDER}/{name}" for name in ("cosyvoice.yaml", "flow.pt", "hift.pt", SPEAKER_NAME)
)
RECOGNIZER_FILES = tuple(
    f"{RECOGNIZER_FOLDER}/{name}" for name in ("config.yaml", "model.pt", "am.mvn")
)

EDITX = Repository(
    name="stepfun-ai/Step-Audio-EditX",
    revision="5fe2f8a05c2353301ad47d3c1747b262115da138",
    files=("config.json", *TEXT_NAMES, INDEX_NAME, "model*.safetensors", *SOUND_FILES),
    folder=MODEL_FOLDER,
)
EDITX_TOKENIZER = Repository(
    name="stepfun-ai/Step-Audio-Tokenizer",
    revision="af7e5a3ec06175a7facae9d4100073d6e4dbb36c",
    files=(CENTERS_NAME, VQ06_NAME, *RECOGNIZER_FILES),
    folder=TOKENIZER_FOLDER,
)

EDITX_LAYOUT = CheckpointLayout(
    model="Step-Audio-EditX",
    repository=EDITX,
    required=(
        (f"{MODEL_FOLDER}/config.json",),
        tuple(f"{MODEL_FOLDER}/{name}" for name in TEXT_NAMES),
        (f"{MODEL_FOLDER}/{INDEX_NAME}", f"{MODEL_FOLDER}/model.safetensors"),
        *((f"{MODEL_FOLDER}/{name}",) for name in SOUND_FILES),
        *((f"{TOKENIZER_FOLDER}/{name}",) for name in EDITX_TOKENIZER.files),
    ),
    command="scripts/download_weights --model editx",
    companions=(EDITX_TOKENIZER,),
)

AUTO = "auto"
"""Stands for the published weights."""

PACKAGES = ("onnx", "onnxruntime")
"""What reading the weights takes besides the library."""


def require_packages() -> None:
    """Raise WeightsError if one of PACKAGES is missing, before 9 GB are fetched in vain."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise WeightsError(
                f"{EDITX_LAYOUT.model} takes the package {package}: "
                "pip install 'kimia-infer[editx]'"
            )


def resolve_editx(value: str | os.PathLike[str]) -> Path:
    """The complete directory that ``value`` stands for: a directory, ``owner/name`` or AUTO.

    What the hub has is taken from the cache, or downloaded. Raises what ``require_packages`` and
    ``resolve`` do.
    """
    require_packages()
    return resolve(EDITX.name if value == AUTO else value, EDITX_LAYOUT)


def find_editx(value: str | os.PathLike[str] | None) -> Path:
    """The directory that ``value``, else KIMI_AUDIO_EDITX names, else a complete one in the cache.

    Raises WeightsError if there is none.
    """
    named = value or os.environ.get("KIMI_AUDIO_EDITX")
    if named:
        return resolve_editx(named)
    cached = local_copy(EDITX.name, EDITX.revision, EDITX_LAYOUT)
    if cached.is_dir() and not EDITX_LAYOUT.incomplete_files(cached):
        return cached
    raise WeightsError(
        f"no weights of {EDITX_LAYOUT.model} in {cached}; fetch them with {EDITX_LAYOUT.command} "
        "(9 GB), or name a directory in --weights or KIMI_AUDIO_EDITX"
    )
