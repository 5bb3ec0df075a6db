"""What becomes of an error while a request is computed."""

from __future__ import annotations

import traceback

import torch

from kimia_infer.utils.errors import RequestOutOfMemory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed, which on the CPU only the message says."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "DefaultCPUAllocator:" in str(error)


def as_request_error(error: BaseException) -> BaseException:
    """RequestOutOfMemory for a lack of memory, which is freed first; else ``error`` itself.

    The frames of the failed call let go of their tensors, and the allocator's idle memory goes
    back to the device for the next request.
    """
    if isinstance(error, RequestOutOfMemory) or not is_out_of_memory(error):
        return error
    reason = (str(error).splitlines() or ["MemoryError"])[0]
    # Every frame on the way refers to tensors, and the traceback to the frames.
    traceback.clear_frames(error.__traceback__)
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    return RequestOutOfMemory(
        f"out of memory while answering ({reason}); send less audio, text or history, or a "
        "smaller max_new_tokens. The memory is free again for other requests"
    )
