"""Recurrent cells that can stand beside or instead of an LSTM.

A cell reads a batch in both directions at once, [2, batch, time, width], of which the second half
is reversed, and gives as much. It never looks ahead in either half.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kimia_infer.models.kokoro.adapters.config import MAMBA_HEAD
from kimia_infer.models.kokoro.layers import Rows

SOLVER_STEPS = 6
"""Steps of the solver of an LTC per input (published implementation)."""

MAMBA_STATE = 16
MAMBA_CHUNK = 32
"""Positions that are computed together. Utterances are short; 256 would be mostly padding."""


class CfC(nn.Module):
    """Closed-form continuous-time cell (Hasani et al., 2022), one for each direction.

    Its inputs are equally spaced, so that the two terms of its gate, of which one is multiplied by
    the time between inputs, are a single linear layer here.
    """

    def __init__(self, width: int):
        super().__init__()
        self.enter = _uniform(2, width, width)
        self.recur = _uniform(2, width, width)
        self.bias = nn.Parameter(torch.zeros(2, 1, width))
        self.heads = _uniform(2, width, 3 * width)
        self.heads_bias = nn.Parameter(torch.zeros(2, 1, 3 * width))

    def forward(self, both: Tensor) -> Tensor:
        state, states = torch.zeros_like(both[:, :, 0]), []
        for entered in _entered(both, self.enter, self.bias):
            backbone = entered + torch.bmm(state, self.recur)
            backbone = 1.7159 * torch.tanh(0.666 * backbone)  # LeCun's, published implementation
            first, second, gate = torch.baddbmm(self.heads_bias, backbone, self.heads).chunk(3, -1)
            state = torch.lerp(torch.tanh(first), torch.tanh(second), torch.sigmoid(gate))
            states.append(state)
        return torch.stack(states, dim=2)


class LTC(nn.Module):
    """Liquid time-constant cell (Hasani et al., 2021), one for each direction.

    The state x follows dx/dt = -x / tau + f (A - x), where f depends on the input and the state;
    the equation is solved with semi-implicit Euler steps, stable for every f > 0.
    """

    def __init__(self, width: int):
        super().__init__()
        self.enter = _uniform(2, width, width)
        self.recur = _uniform(2, width, width)
        # It begins with memories of one to some ten inputs: f is small, and so are most leaks.
        self.bias = nn.Parameter(torch.full((2, 1, width), -2.0))
        self.log_leak = nn.Parameter(torch.empty(2, 1, width).uniform_(-4, 0))
        self.target = nn.Parameter(torch.empty(2, 1, width).uniform_(-1, 1))

    def forward(self, both: Tensor) -> Tensor:
        state, states = torch.zeros_like(both[:, :, 0]), []
        step, leak = 1 / SOLVER_STEPS, torch.exp(self.log_leak)
        for entered in _entered(both, self.enter, self.bias):
            for _ in range(SOLVER_STEPS):
                flow = step * torch.sigmoid(torch.baddbmm(entered, state, self.recur))
                state = torch.addcmul(state, flow, self.target) / (1 + step * leak + flow)
            states.append(state)
        return torch.stack(states, dim=2)


class Mamba(nn.Module):
    """A Mamba-2 block of transformers for each direction."""

    def __init__(self, width: int):
        # Imported here, as it takes seconds and few adapters have one.
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        super().__init__()
        config = Mamba2Config(
            hidden_size=width,
            expand=2,
            head_dim=MAMBA_HEAD,
            num_heads=2 * width // MAMBA_HEAD,
            n_groups=1,
            state_size=MAMBA_STATE,
            chunk_size=MAMBA_CHUNK,
            num_hidden_layers=1,
        )
        self.directions = nn.ModuleList(Mamba2Mixer(config, layer_idx=0) for _ in range(2))

    def forward(self, both: Tensor) -> Tensor:
        found = [block(half) for block, half in zip(self.directions, both, strict=True)]
        return torch.stack(found)


CELLS = {"cfc": CfC, "ltc": LTC, "mamba": Mamba}


class CellPath(nn.Module):
    """A cell in both directions between two linear layers, called as the LSTM is.

    ``zero``: it gives zeros until it is trained.
    """

    def __init__(self, cell: str, inputs: int, width: int, outputs: int, zero: bool = False):
        super().__init__()
        self.down = nn.Linear(inputs, width)
        self.cell = CELLS[cell](width)
        self.up = nn.Linear(2 * width, outputs)
        if zero:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """x [batch, time, inputs] -> [batch, time, outputs], zeros behind each end."""
        x = self.down(x)
        ahead, back = self.cell(torch.stack([x, reverse(x, rows)]))
        return rows.clear(self.up(torch.cat([ahead, reverse(back, rows)], dim=-1)))


def reverse(x: Tensor, rows: Rows) -> Tensor:
    """x [batch, time, channels] with each row reversed up to its own end."""
    if rows.lengths is None:
        return x.flip(1)
    places = torch.arange(x.shape[1], device=x.device)
    source = rows.lengths[:, None] - 1 - places
    source = torch.where(source < 0, places, source)
    return x.gather(1, source[..., None].expand_as(x))


def _uniform(directions: int, inputs: int, outputs: int) -> nn.Parameter:
    bound = 1 / math.sqrt(inputs)
    return nn.Parameter(torch.empty(directions, inputs, outputs).uniform_(-bound, bound))


def _entered(both: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """What the inputs give to each step, computed for all of them: [2, batch, width] each."""
    directions, batch, time, _ = both.shape
    found = torch.baddbmm(bias, both.flatten(1, 2), weight)
    return found.view(directions, batch, time, -1).unbind(2)
