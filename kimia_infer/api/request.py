"""What one call of the model asks for, validated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kimia_infer.engine.speech import PRESETS
from kimia_infer.layers.sampler import Sampling, TrackSampling
from kimia_infer.utils.errors import RequestError
from kimia_infer.utils.randomness import MAX_SEED

# Positions that prompt and answer may fill together, as published: 120 s at 12.5 codes per
# second with speech, and a fixed number of tokens without.
BUDGETS = {"both": 1500, "text": 7500}
CONTEXT = 8192  # published configuration
UNLIMITED = -1
CODES_PER_SECOND = 12.5


@dataclass(frozen=True)
class Options:
    """Everything in a request besides its messages.

    ``stop_repetition`` ends an answer whose text repeats itself for ever; ``timeout_seconds``
    is the most time the answer may take, None for no limit.
    """

    output_type: str
    sampling: Sampling
    max_new_tokens: int = UNLIMITED
    seed: int | None = None
    preset: str = "quality"
    stop_repetition: bool = False
    timeout_seconds: float | None = None

    @property
    def max_audio_seconds(self) -> float:
        """Length of a sound that fills the budget alone; longer ones need not be decoded."""
        return BUDGETS[self.output_type] / CODES_PER_SECOND

    @property
    def budget_explained(self) -> str:
        return (
            f"prompt and answer together may fill {BUDGETS[self.output_type]} of the model's "
            f"{CONTEXT} positions with output_type={self.output_type!r}; one second of sound "
            f"fills {CODES_PER_SECOND}"
        )

    def step_limit(self, prompt_length: int) -> int:
        """Steps that may be generated; raises RequestError if the prompt leaves none."""
        budget = BUDGETS[self.output_type]
        left = budget - prompt_length
        if left <= 0:
            raise RequestError(
                f"chats: the prompt needs {prompt_length} positions ({self.budget_explained}); "
                "shorten sound or history, or transcribe a long recording in segments"
            )
        return left if self.max_new_tokens == UNLIMITED else min(self.max_new_tokens, left)


def parse_options(
    *,
    output_type: str = "text",
    audio_temperature: float = 0.0,
    audio_top_k: int = 5,
    text_temperature: float = 0.0,
    text_top_k: int = 5,
    audio_repetition_penalty: float = 1.0,
    audio_repetition_window_size: int = 64,
    text_repetition_penalty: float = 1.0,
    text_repetition_window_size: int = 16,
    max_new_tokens: int = UNLIMITED,
    seed: int | None = None,
    preset: str = "quality",
    stop_repetition: bool = False,
    timeout_seconds: float | None = None,
) -> Options:
    """Check the arguments of ``generate``, whose defaults these are.

    Raises RequestError naming the argument.

    Whole numbers may arrive as floats (``3.0``), as JSON clients send them.
    """
    if output_type not in BUDGETS:
        raise RequestError(f"output_type: expected 'text' or 'both', found {output_type!r}")
    if preset not in PRESETS:
        raise RequestError(f"preset: expected {' or '.join(map(repr, PRESETS))}, found {preset!r}")
    limit = _integer("max_new_tokens", max_new_tokens)
    if limit < 1 and limit != UNLIMITED:
        raise RequestError(f"max_new_tokens: expected -1 (no limit) or at least 1, found {limit}")
    if seed is not None:
        seed = _integer("seed", seed)
        if not 0 <= seed <= MAX_SEED:
            raise RequestError(f"seed: expected 0 to {MAX_SEED}, found {seed}")
    if not isinstance(stop_repetition, bool):
        raise RequestError(f"stop_repetition: expected True or False, found {stop_repetition!r}")
    if timeout_seconds is not None:
        timeout_seconds = _number("timeout_seconds", timeout_seconds)
        if timeout_seconds <= 0:
            raise RequestError(f"timeout_seconds: expected more than 0, found {timeout_seconds}")
    audio = _track(
        "audio",
        audio_temperature,
        audio_top_k,
        audio_repetition_penalty,
        audio_repetition_window_size,
    )
    text = _track(
        "text",
        text_temperature,
        text_top_k,
        text_repetition_penalty,
        text_repetition_window_size,
    )
    return Options(
        output_type,
        Sampling(audio=audio, text=text),
        limit,
        seed,
        preset,
        stop_repetition,
        timeout_seconds,
    )


def _track(track: str, temperature: Any, top_k: Any, penalty: Any, window: Any) -> TrackSampling:
    temperature = _number(f"{track}_temperature", temperature)
    if temperature < 0:
        raise RequestError(f"{track}_temperature: expected at least 0, found {temperature}")
    window = _integer(f"{track}_repetition_window_size", window)
    if window < 0:
        raise RequestError(f"{track}_repetition_window_size: expected at least 0, found {window}")
    # As published, top_k at or below 0 draws from the whole vocabulary and a penalty at or
    # below 1 does nothing.
    top_k = max(_integer(f"{track}_top_k", top_k), 0)
    return TrackSampling(
        temperature, top_k, _number(f"{track}_repetition_penalty", penalty), window
    )


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name}: expected a finite number, found {value!r}")
    return float(value)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise RequestError(f"{name}: expected a whole number, found {value!r}")
    return int(value)
