"""What is computed once of audio files and stored: Whisper features, for a frozen encoder.

The published encoder always processes 30 s, which is most of the work of a step with short
recordings.
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

from kimia_infer.audio.files import load_audio
from kimia_infer.models.kimi_audio.encoders import (
    PADDING_FIELD,
    segment_codes,
    split_segments,
    whisper_spectrograms,
)
from kimia_infer.training.parallel import whole
from kimia_infer.utils.files import replacing
from kimia_infer.utils.progress import progress

Encode = Callable[[Sequence[Tensor], Sequence[int]], Tensor]
"""Spectrograms [mels, frames] and the number of vectors of each, to all vectors."""


class FileCache:
    """One file for each audio file, in a folder of ``root`` for what made them.

    That is a ``network`` and what ``settings`` say.
    """

    suffix = ".safetensors"

    def __init__(self, root: Path, network: nn.Module, settings: str):
        mark = hashlib.sha256(settings.encode())
        for name, parameter in sorted(network.named_parameters()):
            mark.update(name.encode())
            mark.update(whole(parameter).float().numpy().tobytes())
        self.folder = root / mark.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, audio: Path, used: str = "") -> Path:
        """Where it is for a file of which ``used`` says what part, or the like, is meant.

        The path, size and time of the file identify it. Raises OSError where there is no file.
        """
        state = audio.stat()
        key = f"{audio.resolve()} {state.st_size} {state.st_mtime_ns}{used}"
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}{self.suffix}"


class FeatureCache(FileCache):
    """Features float32 [codes, dim] of any ``encoder``, whose activations have ``dtype``.

    ``extractor`` makes its spectrograms.
    """

    suffix = ".npy"

    def __init__(
        self,
        root: Path,
        encoder: nn.Module,
        dtype: torch.dtype,
        extractor: WhisperFeatureExtractor,
    ):
        super().__init__(root, encoder, f"{dtype} {getattr(extractor, PADDING_FIELD)}")
        self.extractor = extractor

    def read(self, audio: Path) -> Tensor:
        """Stored features. Raises FileNotFoundError for a file without, or changed since."""
        return torch.from_numpy(np.load(self.path(audio)))

    @torch.no_grad()
    def fill(self, paths: Iterable[Path], encode: Encode, state: PartialState) -> None:
        """Compute what is missing, with progress; all processes have to call this and share it."""
        missing = sorted({path for path in paths if not self.path(path).exists()})
        state.wait_for_everyone()  # before anyone writes, so that all see the same ones missing
        rounds = range(0, len(missing), state.num_processes)
        hidden = not state.is_main_process
        bar = progress("Whisper features", unit="files", iterable=rounds, disable=hidden)
        for first in bar:
            path = missing[min(first + state.process_index, len(missing) - 1)]
            segments = split_segments(load_audio(path))
            mel = whisper_spectrograms(self.extractor, segments)
            counts = [segment_codes(len(segment)) for segment in segments]
            features = encode([row.to(state.device) for row in mel], counts).cpu().numpy()
            with replacing(self.path(path)) as partial, partial.open("wb") as file:
                np.save(file, features)
        state.wait_for_everyone()
