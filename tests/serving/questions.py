"""What is said to the trained miniature."""

from tests.paths import ROOT

QUESTION = ROOT / "scripts" / "question.wav"
"""A question that the miniature understands: "what is four plus five", to which it says "nine"."""
