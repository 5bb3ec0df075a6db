"""Whisper features of audio files, computed once and stored, for a frozen encoder.

The encoder always processes 30 s, which is most of the work of a step with short recordings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor

from kimia_infer.audio.files import SAMPLE_RATE, load_audio
from kimia_infer.models.kimi_audio.encoders import segment_codes, split_segments
from kimia_infer.training.parallel import whole
from kimia_infer.utils.files import replacing
from kimia_infer.utils.progress import progress

Encode = Callable[[Tensor, Sequence[int]], Tensor]
"""Spectrograms [segments, mels, frames] and the number of vectors of each, to all vectors."""


class FeatureCache:
    """Features float32 [codes, dim], one file for each audio file.

    ``root`` is for the features of any ``encoder``, whose activations have ``dtype``.
    """

    def __init__(self, root: Path, encoder: nn.Module, dtype: torch.dtype):
        mark = hashlib.sha256(str(dtype).encode())
        for name, parameter in sorted(encoder.named_parameters()):
            mark.update(name.encode())
            mark.update(whole(parameter).float().numpy().tobytes())
        self.folder = root / mark.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, audio: Path) -> Path:
        """Where the features of a file are; its path, size and time identify it."""
        state = audio.stat()
        key = f"{audio.resolve()} {state.st_size} {state.st_mtime_ns}"
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"

    def read(self, audio: Path) -> Tensor:
        """Stored features. Raises FileNotFoundError for a file without, or changed since."""
        return torch.from_numpy(np.load(self.path(audio)))

    @torch.no_grad()
    def fill(
        self,
        paths: Iterable[Path],
        encode: Encode,
        extractor: WhisperFeatureExtractor,
        state: PartialState,
    ) -> None:
        """Compute what is missing, with progress; all processes have to call this and share it."""
        missing = sorted({path for path in paths if not self.path(path).exists()})
        state.wait_for_everyone()  # before anyone writes, so that all see the same ones missing
        rounds = range(0, len(missing), state.num_processes)
        hidden = not state.is_main_process
        bar = progress("Whisper features", unit="files", iterable=rounds, disable=hidden)
        for first in bar:
            path = missing[min(first + state.process_index, len(missing) - 1)]
            segments = split_segments(load_audio(path))
            mel = extractor(segments, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
            counts = [segment_codes(len(segment)) for segment in segments]
            features = encode(mel.to(state.device), counts).cpu().numpy()
            with replacing(self.path(path)) as partial, partial.open("wb") as file:
                np.save(file, features)
        state.wait_for_everyone()
