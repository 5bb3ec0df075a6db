"""What the two published hub repositories hold, and which of it the model needs.

Revisions are commits, so what a name stands for never changes:

- the model: the snapshot that the published configuration and file sizes describe;
- the speech tokenizer: head of the hub repository since its last commit in October 2024
  (the hub's listing: config.json of 1.75 kB, model.safetensors of 1.46 GB,
  preprocessor_config.json of 340 bytes). The published model code names this repository
  without a revision. The commit ``eb00ce9142e8...`` that is sometimes quoted for it belongs to
  the source repository of GLM-4-Voice and is unknown to the hub.
"""

from __future__ import annotations

from dataclasses import dataclass

SPEECH_TOKENIZER_FOLDER = "glm-4-voice-tokenizer"
DETOKENIZER_FOLDER, VOCODER_FOLDER = "audio_detokenizer", "vocoder"
DETOKENIZER_FOLDERS = DETOKENIZER_FOLDER, VOCODER_FOLDER


@dataclass(frozen=True)
class Repository:
    """A hub repository: its id, the pinned commit and patterns of the files that are used."""

    name: str
    revision: str
    files: tuple[str, ...]


SPEECH_TOKENIZER = Repository(
    name="THUDM/glm-4-voice-tokenizer",
    revision="a5f2404e63c84e92f5238908e1706316324ebafa",
    files=("config.json", "model.safetensors", "preprocessor_config.json"),
)

# The last pattern is for checkpoints that carry their speech tokenizer along; the published
# one does not, and SPEECH_TOKENIZER is put in its place. Slim ones have a manifest.
MODEL = Repository(
    name="moonshotai/Kimi-Audio-7B-Instruct",
    revision="9a82a84c37ad9eb1307fb6ed8d7b397862ef9e6b",
    files=(
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tiktoken.model",
        "tokenizer_config.json",
        "whisper-large-v3/config.json",
        "whisper-large-v3/model.safetensors",
        "whisper-large-v3/preprocessor_config.json",
        "audio_detokenizer/config.yaml",
        "audio_detokenizer/model.pt",
        "audio_detokenizer/model.safetensors",
        "vocoder/config.json",
        "vocoder/model.pt",
        "vocoder/model.safetensors",
        *(f"{SPEECH_TOKENIZER_FOLDER}/{name}" for name in SPEECH_TOKENIZER.files),
    ),
)

# Bytes, from the published files. The language model is the sum over its 36 shards without
# their headers; the speech tokenizer is known to three digits only.
KNOWN_SIZES = {
    "model-*.safetensors": 19_532_673_280,
    "whisper-large-v3/model.safetensors": 3_087_131_376,
    "audio_detokenizer/model.pt": 19_008_505_142,
    "vocoder/model.pt": 964_918_850,
    "glm-4-voice-tokenizer/model.safetensors": 1_460_000_000,
}


def default_revision(name: str) -> str:
    """The commit that the published model is pinned to; ``main`` for other repositories."""
    return MODEL.revision if name == MODEL.name else "main"
