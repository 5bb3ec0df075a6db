"""The parts of a checkpoint directory: where each lies and the dtype that it is served in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from kimia_infer.models.kimi_audio.dit import dit_part
from kimia_infer.models.kimi_audio.language_model import language_model_part
from kimia_infer.models.kimi_audio.layout import TUNED_WHISPER, WHISPER_FOLDER
from kimia_infer.models.kimi_audio.published import DETOKENIZER_FOLDERS, SPEECH_TOKENIZER_FOLDER
from kimia_infer.models.kimi_audio.speech_tokenizer import speech_tokenizer_part
from kimia_infer.models.kimi_audio.vocoder import vocoder_part
from kimia_infer.models.kimi_audio.whisper import whisper_part
from kimia_infer.weights.checkpoint import Part


@dataclass(frozen=True)
class StoredPart:
    """A part with its folder ("" for the directory itself) and its published name prefix.

    ``exact`` marks the speech tokenizer: in bfloat16 it would give other codes, so it is
    stored and served in float32 whatever the dtype of the rest.
    """

    folder: str
    prefix: str
    part: Part
    exact: bool = False

    def served(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of this part where the model is served in ``dtype``."""
        return torch.float32 if self.exact else dtype


def understanding_parts(directory: Path, quantized: bool = False) -> tuple[Part, Part]:
    """The language model and the Whisper encoder that feeds it.

    Where an encoder was fine-tuned with the language model, and stored with it, it is that one,
    whatever the folder holds. ``quantized`` says whether a quantized language model is of use.
    Raises CheckpointError.
    """
    model = language_model_part(directory, quantized)
    has = any(name.startswith(TUNED_WHISPER) for name in model.store.tensors)
    tuned = model.store.under(TUNED_WHISPER) if has else None
    return model, whisper_part(directory / WHISPER_FOLDER, tuned)


def checkpoint_parts(
    directory: Path, detokenizer: bool = True, quantized: bool = False
) -> list[StoredPart]:
    """Speech tokenizer, Whisper encoder, language model, then DiT and vocoder if asked for.

    Raises:
        CheckpointError: a file or tensor is missing, damaged or of the wrong shape, or the
            language model is quantized and not to be (``quantized``).
    """
    model, whisper = understanding_parts(directory, quantized)
    tokenizer = SPEECH_TOKENIZER_FOLDER
    parts = [
        StoredPart(tokenizer, "", speech_tokenizer_part(directory / tokenizer), exact=True),
        StoredPart(WHISPER_FOLDER, "model.encoder.", whisper),
        StoredPart("", "", model),
    ]
    if detokenizer:
        dit, vocoder = DETOKENIZER_FOLDERS
        parts.append(StoredPart(dit, "speech_model.", dit_part(directory / dit)))
        parts.append(StoredPart(vocoder, "", vocoder_part(directory / vocoder)))
    return parts
