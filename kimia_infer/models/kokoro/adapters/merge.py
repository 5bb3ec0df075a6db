"""A LoRA adapter written into the checkpoint that it was trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kimia_infer.models.kokoro.adapters.seams import lstms
from kimia_infer.models.kokoro.adapters.store import FOLDER, StoredAdapter, apply_adapter
from kimia_infer.models.kokoro.checkpoint import PICKLE_NAME, TENSORS_NAME, network_component
from kimia_infer.utils.errors import CheckpointError
from kimia_infer.utils.files import link_or_copy, replacing_directory

SECTION = "predictor"


def merge(base: Path, adapter: Path, output: Path) -> None:
    """Write ``output``: the directory ``base`` whose LSTMs have the adapter in them.

    The checkpoint has the same form, names and other tensors, so that it can be used wherever
    ``base`` can; loading it gives exactly the parameters that ``base`` and ``adapter`` give.

    Raises:
        CheckpointError: the adapter has cells, which no checkpoint has a place for, or does not
            fit ``base``.
    """
    if StoredAdapter.read(adapter).method != "lora":
        raise CheckpointError(f"{adapter}: method: cells cannot be merged, only lora")
    predictor = network_component(base).load(torch.device("cpu"), torch.float32).predictor
    apply_adapter(predictor, adapter)
    merged = {
        f"{seam}.{name}": value.detach()
        for seam, lstm in lstms(predictor).items()
        for name, value in lstm.named_parameters()
    }
    with replacing_directory(output) as folder:
        for path in base.iterdir():
            if path.is_dir() and path.name != FOLDER:
                shutil.copytree(path, folder / path.name, copy_function=_link)
            elif path.is_file() and path.name not in (PICKLE_NAME, TENSORS_NAME):
                _link(path, folder / path.name)
        if (base / TENSORS_NAME).is_file():
            save_file(_changed(load_file(base / TENSORS_NAME), merged), folder / TENSORS_NAME)
        else:
            sections = torch.load(base / PICKLE_NAME, map_location="cpu", weights_only=True)
            sections[SECTION] = _changed(sections[SECTION], merged, "")
            torch.save(sections, folder / PICKLE_NAME)


def _changed(
    stored: dict[str, Tensor], merged: dict[str, Tensor], prefix: str = f"{SECTION}."
) -> dict[str, Tensor]:
    """``stored`` with the values of ``merged``, which are named without prefixes."""
    return {
        name: merged.get(name.removeprefix("module.").removeprefix(prefix), value)
        for name, value in stored.items()
    }


def _link(path: str | Path, new: str | Path) -> None:
    link_or_copy(Path(path), Path(new))
