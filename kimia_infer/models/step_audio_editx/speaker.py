"""A voice to the vector that stands for it: CAM++, which is published as an ONNX file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kimia_infer.utils.errors import CheckpointError


class SpeakerEncoder:
    """Runs on the CPU.

    Raises:
        CheckpointError: the file is missing or cannot be read, or the package ``onnxruntime`` is
            missing.
    """

    def __init__(self, path: Path, size: int):
        """``size``: values of the vector. A file that does not say how many it gives is taken."""
        try:
            import onnxruntime
        except ImportError as error:
            raise CheckpointError(
                f"{path}: running it takes the package onnxruntime: "
                "pip install 'kimia-infer[editx]'"
            ) from error
        if not path.is_file():
            raise CheckpointError(f"{path}: file missing")
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the library has no class for all of its errors
            raise CheckpointError(f"{path}: not an ONNX model ({error})") from error
        self._input = self._session.get_inputs()[0].name
        shape = self._session.get_outputs()[0].shape
        if shape and isinstance(shape[-1], int) and shape[-1] != size:
            raise CheckpointError(f"{path}: gives vectors of {shape[-1]} values, expected {size}")

    def __call__(self, features: Tensor) -> Tensor:
        """float32 [size] of features float32 [frames, 80], on the CPU."""
        (found,) = self._session.run(None, {self._input: features.cpu().numpy()[None]})
        return torch.from_numpy(np.asarray(found)[0])
