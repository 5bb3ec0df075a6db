"""Models that encode each sound once, for tests that ask about the same sounds again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.models.kimi_audio.encoders import SegmentEncoder


def encode_once(model: KimiAudio) -> None:
    """Keep what the encoders of ``model`` give for a sound."""
    for encoder in (model.whisper_features, model.speech_codes):
        _remember(encoder)


def encode_like(model: KimiAudio, other: KimiAudio) -> None:
    """Have ``model`` use the encoders of ``other``, which have the same weights."""
    model.whisper_features.encode_all = other.whisper_features.encode_all
    model.speech_codes.encode_all = other.speech_codes.encode_all


def _remember(encoder: SegmentEncoder) -> None:
    encode, known = encoder.encode_all, dict[bytes, Tensor]()

    def encode_all(waves: Sequence[np.ndarray]) -> list[Tensor]:
        keys = [wave.tobytes() for wave in waves]
        new = {key: wave for key, wave in zip(keys, waves, strict=True) if key not in known}
        known.update(zip(new, encode(list(new.values())), strict=True))
        return [known[key] for key in keys]

    encoder.encode_all = encode_all
