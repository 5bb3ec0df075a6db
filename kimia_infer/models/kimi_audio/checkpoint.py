"""The files of a Kimi-Audio checkpoint: where they are published and which the model needs.

Revisions are commits, so that the files behind a name never change:

- the model: the snapshot that the published configuration and file sizes describe;
- the speech tokenizer: head of the hub repository since its last commit in October 2024
  (the hub's listing: config.json of 1.75 kB, model.safetensors of 1.46 GB,
  preprocessor_config.json of 340 bytes). The published model code names this repository
  without a revision. The commit ``eb00ce9142e8...`` that is sometimes quoted for it belongs to
  the source repository of GLM-4-Voice and is unknown to the hub.

PyTorch is not imported here, so that missing weights are reported at once.
"""

from __future__ import annotations

import os
from pathlib import Path

from kimia_infer.utils.errors import WeightsError
from kimia_infer.weights.header import INDEX_NAME
from kimia_infer.weights.layout import CheckpointLayout, Repository
from kimia_infer.weights.manifest import MANIFEST_NAME
from kimia_infer.weights.resolve import resolve

WHISPER_FOLDER = "whisper-large-v3"
SPEECH_TOKENIZER_FOLDER = "glm-4-voice-tokenizer"
DETOKENIZER_FOLDER, VOCODER_FOLDER = "audio_detokenizer", "vocoder"

TUNED_WHISPER = "whisper_model.speech_encoder."
"""Prefix of an encoder that was fine-tuned and stored with the language model (published code)."""

SPEECH_TOKENIZER = Repository(
    name="THUDM/glm-4-voice-tokenizer",
    revision="a5f2404e63c84e92f5238908e1706316324ebafa",
    files=("config.json", "model.safetensors", "preprocessor_config.json"),
    folder=SPEECH_TOKENIZER_FOLDER,
)

REQUIRED = (
    ("config.json",),
    ("tiktoken.model",),
    (f"{WHISPER_FOLDER}/config.json",),
    (f"{WHISPER_FOLDER}/model.safetensors",),
    (f"{SPEECH_TOKENIZER_FOLDER}/config.json",),
    (f"{SPEECH_TOKENIZER_FOLDER}/model.safetensors",),
    (INDEX_NAME, "model.safetensors"),
    (f"{DETOKENIZER_FOLDER}/config.yaml",),
    (f"{VOCODER_FOLDER}/config.json",),
    (f"{DETOKENIZER_FOLDER}/model.pt", f"{DETOKENIZER_FOLDER}/model.safetensors"),
    (f"{VOCODER_FOLDER}/model.pt", f"{VOCODER_FOLDER}/model.safetensors"),
)

# Slim checkpoints have a manifest and a speech tokenizer, the published one has neither.
MODEL = Repository(
    name="moonshotai/Kimi-Audio-7B-Instruct",
    revision="9a82a84c37ad9eb1307fb6ed8d7b397862ef9e6b",
    files=(
        *(name for names in REQUIRED for name in names),
        "generation_config.json",
        MANIFEST_NAME,
        "model*.safetensors",
        "special_tokens_map.json",
        "tokenizer_config.json",
        f"{WHISPER_FOLDER}/preprocessor_config.json",
        f"{SPEECH_TOKENIZER_FOLDER}/preprocessor_config.json",
    ),
)

LAYOUT = CheckpointLayout(
    model="Kimi-Audio",
    repository=MODEL,
    required=REQUIRED,
    companions=(SPEECH_TOKENIZER,),
    embedded={WHISPER_FOLDER: TUNED_WHISPER},
)

TEXT_LAYOUT = LAYOUT.without(DETOKENIZER_FOLDER, VOCODER_FOLDER)
"""Without the folders that only speech output needs."""


def checkpoint_layout(detokenizer: bool = True) -> CheckpointLayout:
    """What a checkpoint directory must have; ``detokenizer``: for speech output, too."""
    return LAYOUT if detokenizer else TEXT_LAYOUT


def resolve_weights(
    value: str | os.PathLike[str], detokenizer: bool = True, root: Path | None = None
) -> Path:
    """The complete checkpoint directory that ``value`` stands for; see :func:`resolve`."""
    return resolve(value, checkpoint_layout(detokenizer), root)


def weights_from_environment(cog_weights: str | os.PathLike[str] | None = None) -> str:
    """What the environment names as weights: ``KIMI_AUDIO_WEIGHTS``, else Cog's.

    ``cog_weights`` is what Cog gave to ``setup``; without it ``COG_WEIGHTS`` is read. The
    value is a directory or hub repository for :func:`resolve_weights`.

    Raises:
        WeightsError: neither is set, or the first that is set is empty.
    """
    named = {
        "KIMI_AUDIO_WEIGHTS": os.environ.get("KIMI_AUDIO_WEIGHTS"),
        "the weights that Cog passed": None if cog_weights is None else os.fspath(cog_weights),
        "COG_WEIGHTS": os.environ.get("COG_WEIGHTS"),
    }
    for source, value in named.items():
        if value is None:
            continue
        if not value.strip():
            raise WeightsError(f"{source}: empty; name a directory or owner/name[@revision]")
        return value
    raise WeightsError(
        "no weights named: set KIMI_AUDIO_WEIGHTS (or COG_WEIGHTS) to a checkpoint directory, "
        f"such as weights/mini, or to a hub repository, such as {MODEL.name}"
    )
