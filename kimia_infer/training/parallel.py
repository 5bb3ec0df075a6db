"""One process or several, on the CPU or on accelerators.

``torchrun`` starts the processes; the parameters, their gradients and the optimizer's state are
then divided among them (FSDP).
"""

from __future__ import annotations

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from kimia_infer.training.network import TrainingNetwork


def start(device: str | None) -> PartialState:
    """Join the processes of this run; ``device`` "cpu" leaves accelerators alone."""
    return PartialState(cpu=device == "cpu")


def leave() -> None:
    """Close the connections to the other processes, if there are any."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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


def release(network: nn.Module) -> None:
    """Keep only this process's share again, after a forward pass that no backward pass follows."""
    if isinstance(network, FSDPModule):
        network.reshard()


def total(values: Tensor, state: PartialState) -> Tensor:
    """The sum of ``values`` over all processes."""
    return reduce(values, "sum") if state.num_processes > 1 else values


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU. All processes have to call this."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def assign(target: Tensor, value: Tensor) -> None:
    """Fill ``target``, or this process's share of it, from the whole ``value``."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            mesh, placements = target.device_mesh, target.placements
            divided = distribute_tensor(
                value.to(target.dtype), mesh, placements, src_data_rank=None
            )
            target.to_local().copy_(divided.to_local())
        else:
            target.copy_(value)


def clip_gradients(parameters: list[nn.Parameter], max_norm: float | None) -> float:
    """Scale gradients down to ``max_norm``, None leaves them; their norm before."""
    limit = float("inf") if max_norm is None else max_norm
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
