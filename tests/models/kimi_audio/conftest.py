"""Fixtures of every test here."""

from tests.engine.helpers import features, model, recorded

__all__ = ["features", "model", "recorded"]
