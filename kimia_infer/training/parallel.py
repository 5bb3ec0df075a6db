"""One process or several, on the CPU or on accelerators.

``torchrun`` starts the processes; the parameters, their gradients and the optimizer's state are
then divided among them (FSDP).
"""

from __future__ import annotations

import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from kimia_infer.training.network import TrainingNetwork


def shard(network: TrainingNetwork, state: PartialState) -> None:
    """Divide the parameters of ``network``, which are on the meta device, among processes.

    Under bfloat16 they are exchanged in bfloat16 and gradients are summed in float32.
    """
    assert state.device is not None
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    mixed = torch.bfloat16 if network.dtype == torch.bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=mixed, reduce_dtype=torch.float32)
    for module in [*network.blocks(), network]:
        fully_shard(module, mesh=mesh, mp_policy=policy)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU. All processes have to call this."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def assign(target: Tensor, value: Tensor) -> None:
    """Fill ``target``, or this process's share of it, from the whole ``value``."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            place = target.device_mesh, target.placements
            divided = distribute_tensor(value.to(target.dtype), *place, src_data_rank=None)
            target.to_local().copy_(divided.to_local())
        else:
            target.copy_(value)
