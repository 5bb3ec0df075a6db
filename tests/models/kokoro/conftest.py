"""Fixtures of the tests of Kokoro."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.models.kokoro.recorded import whole_config, whole_tensors


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the recorded whole model, 58 M parameters, as safetensors."""
    directory = tmp_path_factory.mktemp("kokoro")
    config = whole_config()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(whole_tensors(config), directory / "model.safetensors")
    return directory
