"""Fixtures of every test here."""

from tests.engine.helpers import control, model, prompts, with_heads

__all__ = ["control", "model", "prompts", "with_heads"]
