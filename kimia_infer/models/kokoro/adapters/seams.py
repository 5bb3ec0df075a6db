"""Where adapters are put into the prosody predictor."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from kimia_infer.models.kokoro.adapters.cells import CellPath
from kimia_infer.models.kokoro.adapters.config import SEAMS, AdapterConfig, Seam
from kimia_infer.models.kokoro.adapters.lora import LoRALSTM
from kimia_infer.models.kokoro.layers import BiLSTM, Rows
from kimia_infer.models.kokoro.prosody import ProsodyPredictor
from kimia_infer.utils.errors import CheckpointError


class ResidualCell(nn.Module):
    """An LSTM that stays as it is, and a cell whose output is added; at first that is zero."""

    def __init__(self, lstm: BiLSTM, cell: str, width: int):
        super().__init__()
        self.lstm = lstm
        self.path = CellPath(cell, lstm.input_size, width, 2 * lstm.hidden_size, zero=True)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """x [batch, time, inputs] -> [batch, time, outputs], zeros behind each end."""
        return self.lstm(x, rows) + self.path(x, rows)


def lstms(predictor: ProsodyPredictor) -> dict[Seam, BiLSTM]:
    """The LSTMs that can have adapters; those that have one already are not among them."""
    modules = dict(predictor.named_modules())
    found = {seam: modules.get(seam) for seam in SEAMS}
    return {seam: module for seam, module in found.items() if isinstance(module, BiLSTM)}


def attach(predictor: ProsodyPredictor, config: AdapterConfig, seed: int = 0) -> None:
    """Put an untrained adapter into ``predictor``; only its own parameters require gradients.

    LoRA and residual cells change nothing until they are trained. First values depend on ``seed``
    and not on the device.

    Raises:
        CheckpointError: the predictor has not all of the seams, or has an adapter already.
    """
    free = lstms(predictor)
    missing = [seam for seam in config.seams if seam not in free]
    if missing or adapter_parameters(predictor):
        raise CheckpointError(
            f"seams: {', '.join(missing or config.seams)}: the predictor of this model has an "
            "adapter already, or is too small; load it again, or name others"
        )
    predictor.requires_grad_(False)
    device = next(predictor.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for seam in config.seams:
            predictor.set_submodule(seam, _adapted(free[seam], config).to(device))


def _adapted(lstm: BiLSTM, config: AdapterConfig) -> nn.Module:
    if config.cell is None:
        return LoRALSTM(lstm, config.rank, config.alpha / config.rank)
    if config.method == "residual":
        return ResidualCell(lstm, config.cell, config.cell_width)
    return CellPath(config.cell, lstm.input_size, config.cell_width, 2 * lstm.hidden_size)


def adapter_parameters(predictor: ProsodyPredictor) -> dict[str, nn.Parameter]:
    """The parameters of adapters by name, without those of LSTMs below them."""
    modules = dict(predictor.named_modules())
    return {
        f"{seam}.{name}": parameter
        for seam in SEAMS
        if isinstance(modules.get(seam), LoRALSTM | ResidualCell | CellPath)
        for name, parameter in modules[seam].named_parameters()
        if not name.startswith("lstm.")
    }


def fold(predictor: ProsodyPredictor) -> None:
    """Add LoRA to the weights themselves, so that it costs nothing; cells stay as they are."""
    for seam in SEAMS:
        module = dict(predictor.named_modules()).get(seam)
        if isinstance(module, LoRALSTM):
            predictor.set_submodule(seam, module.folded())


def fingerprint(predictor: ProsodyPredictor) -> str:
    """SHA-256 of the LSTMs, by which an adapter knows the model that it was trained on.

    They are stored as they are used, so that every form of a checkpoint has the same one.
    """
    digest = hashlib.sha256()
    for seam, lstm in lstms(predictor).items():
        for name, value in sorted(lstm.named_parameters()):
            digest.update(f"{seam}.{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
