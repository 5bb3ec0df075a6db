"""Low-rank changes of the weights of an LSTM, and changes of its biases.

peft (0.21) takes single weights of an LSTM as ``target_parameters`` but refuses biases, which have
one dimension. A change of speaking style is to a large part a shift, which biases learn at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kimia_infer.models.kokoro.layers import BiLSTM, Rows


class LoRALSTM(nn.Module):
    """An LSTM whose parameters stay, with what is added to them.

    A weight gets ``scale`` * b @ a. Of the two biases of a gate, which are added to each other, the
    first one gets a vector.
    """

    def __init__(self, lstm: BiLSTM, rank: int, scale: float):
        super().__init__()
        self.lstm = lstm
        self.scale = scale
        self.a, self.b, self.shift = (nn.ParameterDict() for _ in range(3))
        for name, value in lstm.named_parameters():
            if name.startswith("weight_"):
                bound = 1 / math.sqrt(value.shape[1])
                self.a[name] = torch.empty(rank, value.shape[1]).uniform_(-bound, bound)
                self.b[name] = torch.zeros(value.shape[0], rank)
            elif name.startswith("bias_ih_"):
                self.shift[name] = torch.zeros_like(value, device="cpu")

    def changed(self) -> dict[str, Tensor]:
        """The parameters of the LSTM with the adapter in them, those that change."""
        values = dict(self.lstm.named_parameters())
        weights = {n: values[n] + self.scale * (self.b[n] @ a) for n, a in self.a.items()}
        return weights | {n: values[n] + shift for n, shift in self.shift.items()}

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """x [batch, time, inputs] -> [batch, time, outputs], zeros behind each end."""
        return functional_call(self.lstm, self.changed(), (x, rows))

    @torch.no_grad()
    def folded(self) -> BiLSTM:
        """The LSTM itself, with the adapter in its parameters."""
        parameters = dict(self.lstm.named_parameters())
        for name, value in self.changed().items():
            parameters[name].copy_(value)
        return self.lstm
