"""The network of silero-vad, which tells speech from other sound."""

from __future__ import annotations

import warnings
from typing import Any

import torch


def load_silero() -> Any:
    """The network, for windows of 512 samples at 16 kHz. Raises ImportError without the package."""
    threads = torch.get_num_threads()
    from silero_vad import load_silero_vad  # sets the threads of the whole process to 1, once

    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", FutureWarning)
        return load_silero_vad()
