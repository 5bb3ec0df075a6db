"""Whisper features of short recordings, computed of little more than the recordings.

A model is served features of 30 s, most of which is silence. With 3 s of silence behind it instead,
the frames of ``scripts/question.wav``, 2 s of speech, differ in 10 % of their variance, by the
encoder of Whisper tiny.en; those of one second of it in 21 %. It costs a tenth of the time, so most
of the training's recordings are encoded this way, and the rest as served.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from kimia_infer.audio.files import SAMPLE_RATE, load_audio
from kimia_infer.data.conversations import ConversationFile
from kimia_infer.models.kimi_audio.checkpoint import WHISPER_FOLDER
from kimia_infer.models.kimi_audio.components import whisper_component
from kimia_infer.models.kimi_audio.config import FRAMES_PER_CODE
from kimia_infer.models.kimi_audio.encoders import (
    SEGMENT_SAMPLES,
    feature_extractor,
    segment_codes,
)
from kimia_infer.training.feature_cache import FeatureCache
from kimia_infer.utils.files import replacing

SILENCE = 3.0  # seconds behind a recording

SERVED = 0.04
"""Share of the recordings that are encoded as they are served, by the training itself."""


@torch.no_grad()
def fill_features(cache: Path, base: Path, lists: Iterable[Path], precision: torch.dtype) -> None:
    """Add to ``cache`` the features of most recordings of users in conversations of ``lists``.

    Args:
        base: checkpoint whose encoder is used.
        precision: that of the training that reads them.
    """
    component = whisper_component(base / WHISPER_FOLDER)
    encoder = component.load(torch.device("cpu"), precision).eval()
    extractor = feature_extractor(base / WHISPER_FOLDER, encoder.config.num_mel_bins)
    features = FeatureCache(cache, encoder, precision)
    missing = [p for p in recordings(lists) if not served(p) and not features.path(p).exists()]
    for path in tqdm(missing, desc="Features", unit=" sounds", disable=None):
        wave = load_audio(path)
        if len(wave) > SEGMENT_SAMPLES:
            continue
        length = min(30, math.ceil(len(wave) / SAMPLE_RATE + SILENCE))
        mel = extractor(
            wave, sampling_rate=SAMPLE_RATE, padding="max_length",
            max_length=length * SAMPLE_RATE, return_tensors="pt",
        ).input_features  # fmt: skip
        found = encode(encoder, mel.to(precision))[0, : FRAMES_PER_CODE * segment_codes(len(wave))]
        with replacing(features.path(path)) as partial, partial.open("wb") as file:
            np.save(file, found.float().reshape(-1, FRAMES_PER_CODE * found.shape[1]).numpy())


def recordings(lists: Iterable[Path]) -> list[Path]:
    """Every recording that a user of a conversation says, once."""
    found = {
        Path(message.audio): None
        for path in lists
        for conversation in ConversationFile(path)
        for message in conversation.messages
        if message.role == "user" and message.audio is not None
    }
    return list(found)


def served(path: Path) -> bool:
    """Whether a recording is one of those that are encoded as they are served."""
    return hashlib.sha256(path.name.encode()).digest()[0] < 256 * SERVED


def encode(encoder: WhisperEncoder, mel: Tensor) -> Tensor:
    """Frames [segments, time, width] of spectrograms [segments, mels, 2 * time] below 30 s.

    As :meth:`WhisperEncoder.forward`, which takes 30 s only.
    """
    x = F.gelu(encoder.conv1(mel))
    x = F.gelu(encoder.conv2(x)).mT
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    for layer in encoder.layers:
        x = layer(x, None)
    return encoder.layer_norm(x)
