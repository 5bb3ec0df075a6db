"""The files a predictor hands to Cog, which reads them after the prediction and keeps them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor

from kimia_infer.audio.wav import write_wav


class OutputFiles:
    """The output files of the latest prediction, in a directory of their own.

    Every prediction gets a fresh directory and the one before is deleted, so that an answer
    can never be that of another request and nothing piles up.
    """

    def __init__(self) -> None:
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def clear(self) -> None:
        """Delete what is left of the previous prediction."""
        directory, self._directory = self._directory, None
        if directory is not None:
            directory.cleanup()

    def write(self, wave: Tensor | None) -> Path | None:
        """Write float32 [1, samples] at 24 kHz as wav; None stays None.

        Nothing is left behind if writing fails or is canceled.
        """
        self.clear()
        if wave is None:
            return None
        self._directory = tempfile.TemporaryDirectory(prefix="kimi-audio-")
        try:
            path = Path(self._directory.name) / "answer.wav"
            write_wav(path, wave)
        except BaseException:
            self.clear()
            raise
        return path
