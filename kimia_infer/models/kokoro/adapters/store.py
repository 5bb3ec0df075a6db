"""Adapters as directories: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kimia_infer.models.kokoro.adapters.config import AdapterConfig
from kimia_infer.models.kokoro.adapters.seams import adapter_parameters, attach, fingerprint, fold
from kimia_infer.models.kokoro.prosody import ProsodyPredictor
from kimia_infer.utils.errors import CheckpointError, explain
from kimia_infer.weights.adapter import CONFIG_NAME, WEIGHTS_NAME
from kimia_infer.weights.component import read_json

FOLDER = "adapters"
"""Folder of a Kokoro directory whose folders are adapters with a name."""

KIND = "kokoro_prosody"
"""What ``adapter_type`` says, by which these directories are told from others."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class StoredAdapter(AdapterConfig):
    """What ``adapter_config.json`` says.

    ``base`` is the fingerprint of the model that the adapter was trained on, ``model`` where that
    was.
    """

    adapter_type: Literal["kokoro_prosody"]  # KIND
    base: str = Field(pattern="[0-9a-f]{64}")
    model: str

    @classmethod
    def read(cls, directory: Path) -> StoredAdapter:
        """Raises CheckpointError naming the file and the field."""
        path = directory / CONFIG_NAME
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            raise CheckpointError(f"{path}: {explain(error, cls)[0]}") from error


def save_adapter(
    folder: Path, predictor: ProsodyPredictor, config: AdapterConfig, base: str, model: str
) -> None:
    """Write the adapter of ``predictor`` into ``folder``, which is made.

    ``base`` is the fingerprint that the predictor had without it, ``model`` its directory.
    """
    folder.mkdir(parents=True)
    stored = StoredAdapter(adapter_type=KIND, base=base, model=model, **config.model_dump())
    text = json.dumps(stored.model_dump(mode="json"), indent=1)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    parameters = adapter_parameters(predictor).items()
    save_file({n: p.detach().cpu().contiguous() for n, p in parameters}, folder / WEIGHTS_NAME)


def apply_adapter(predictor: ProsodyPredictor, directory: Path) -> None:
    """Put a stored adapter into ``predictor`` for inference.

    Raises:
        CheckpointError: a file is missing or damaged, the adapter belongs to another model, or a
            tensor is missing, too many, of another shape or not finite.
    """
    config = StoredAdapter.read(directory)
    found = fingerprint(predictor)
    if config.base != found:
        raise CheckpointError(
            f"{directory / CONFIG_NAME}: base: trained on another model ({config.model}, "
            f"{config.base[:12]}), this one is {found[:12]}"
        )
    path = directory / WEIGHTS_NAME
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    attach(predictor, config)
    parameters = adapter_parameters(predictor)
    for name in sorted(parameters.keys() ^ tensors.keys()):
        kind = "is missing" if name in parameters else "has no place in this adapter"
        raise CheckpointError(f"{path}: tensor {name} {kind}")
    for name, parameter in parameters.items():
        value = tensors[name]
        if value.shape != parameter.shape or not value.is_floating_point():
            raise CheckpointError(
                f"{path}: tensor {name} is {value.dtype} {list(value.shape)}, expected floating "
                f"point {list(parameter.shape)}"
            )
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: tensor {name} holds values that are not finite")
        with torch.no_grad():
            parameter.copy_(value)
    fold(predictor)
    predictor.requires_grad_(False).eval()


def is_prosody_adapter(directory: Path) -> bool:
    """Whether ``directory`` is an adapter, and one of Kokoro."""
    path = directory / CONFIG_NAME
    return path.is_file() and read_json(path).get("adapter_type") == KIND


def find_adapter(directory: Path, name: str) -> Path:
    """The directory of the adapter ``name`` of the model in ``directory``.

    A ``name`` with a separator of paths is that of a directory itself.

    Raises CheckpointError, which lists those that are there by name.
    """
    folder = directory / FOLDER
    path = Path(name) if os.sep in name else folder / name
    if (os.sep in name or _NAME.fullmatch(name)) and (path / CONFIG_NAME).is_file():
        return path
    known = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_NAME}"))
    listed = ", ".join(known) if known else f"none; put one into {folder}"
    raise CheckpointError(
        f"adapter: {name!r} is not known, there is {listed}; a directory elsewhere is named by a "
        f"path with a {os.sep}, such as .{os.sep}NAME"
    )
