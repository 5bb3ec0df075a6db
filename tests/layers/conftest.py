"""Fixtures of every test here."""

from tests.engine.helpers import model

__all__ = ["model"]
