"""Whisper features of sounds, computed once and stored, where the encoder is frozen.

The encoder looks at 30 s whatever the length of a sound, which is most of the work of a step with
short ones.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm
from transformers import WhisperFeatureExtractor

from kimia_infer.audio.decode import SAMPLE_RATE, load_audio
from kimia_infer.models.kimi_audio.whisper import segment_codes, split_segments
from kimia_infer.training.parallel import whole

Encode = Callable[[Tensor, Sequence[int]], Tensor]
"""Spectrograms [segments, mels, frames], and how many vectors each gives, to all of these."""


class FeatureCache:
    """Features float32 [codes, dim], a file for each sound.

    Args:
        root: directory for the features of any encoder.
        encoder: whose features these are.
        dtype: of its activations.
    """

    def __init__(self, root: Path, encoder: nn.Module, dtype: torch.dtype):
        mark = hashlib.sha256(str(dtype).encode())
        for name, parameter in sorted(encoder.named_parameters()):
            mark.update(name.encode())
            mark.update(whole(parameter).float().numpy().tobytes())
        self.folder = root / mark.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, sound: Path) -> Path:
        """Where the features of a sound are, which is known by its path, size and time."""
        state = sound.stat()
        key = f"{sound.resolve()} {state.st_size} {state.st_mtime_ns}"
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"

    def read(self, sound: Path) -> Tensor:
        """Raises FileNotFoundError for a sound that is unknown, or has changed since."""
        return torch.from_numpy(np.load(self.path(sound)))

    @torch.no_grad()
    def fill(
        self,
        sounds: Iterable[Path],
        encode: Encode,
        extractor: WhisperFeatureExtractor,
        state: PartialState,
    ) -> None:
        """Compute what is missing, with progress; all processes have to call this and share it."""
        missing = sorted({sound for sound in sounds if not self.path(sound).exists()})
        state.wait_for_everyone()  # before anyone writes, so that all see the same ones missing
        rounds = range(0, len(missing), state.num_processes)
        shown = state.is_main_process
        for first in tqdm(rounds, desc="Whisper features", unit=" sounds", disable=not shown):
            sound = missing[min(first + state.process_index, len(missing) - 1)]
            segments = split_segments(load_audio(sound))
            mel = extractor(segments, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
            counts = [segment_codes(len(segment)) for segment in segments]
            self._write(sound, encode(mel.to(state.device), counts))
        state.wait_for_everyone()

    def _write(self, sound: Path, features: Tensor) -> None:
        final = self.path(sound)
        part = final.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as file:
            np.save(file, features.cpu().numpy())
        part.replace(final)
