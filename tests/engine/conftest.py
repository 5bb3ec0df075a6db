"""Fixtures of every test here."""

from tests.engine.crowd import alone, crowds
from tests.engine.helpers import control, model, prompts, with_heads

__all__ = ["alone", "control", "crowds", "model", "prompts", "with_heads"]
