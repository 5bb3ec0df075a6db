"""A stand-in for CUDA graphs on the CPU: work is traced once and the trace is replayed.

As in a CUDA graph, every Python value is frozen at recording, tensors are the very ones that the
work used then, and reading a value of the device while recording is an error.
"""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from kimia_infer.utils.graphs import Direct, Work


class TracedGraphs(Direct):
    """Behaves as CudaGraphs; ``recorded`` counts what was traced, ``replayed`` the launches."""

    captures = True

    def __init__(self, device: torch.device):
        self.recorded = self.replayed = 0

    def record(self, work: Work) -> Work:
        work()  # as CudaGraphs does; the tracing runs it again
        graph = make_fx(lambda: work())()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            graph()

        return replay


class FixedShapes(Direct):
    """Launches directly what CudaGraphs would record, for work that cannot be traced."""

    captures = True

    def __init__(self, device: torch.device):
        pass
