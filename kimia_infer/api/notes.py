"""What a caller should know about an answer that is not what was hoped for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from kimia_infer.audio.files import SAMPLE_RATE, SILENCE_DBFS, is_silent, loudest_dbfs


def silent_inputs(waves: Mapping[int, np.ndarray]) -> list[str]:
    """A note for every silent wave [samples] at 16 kHz, by the message it belongs to."""
    levels = {index: loudest_dbfs(wave, SAMPLE_RATE) for index, wave in waves.items()}
    return [
        f"chats[{index}].content: the sound is silent ({level:.0f} dBFS at its loudest, below "
        f"{SILENCE_DBFS:.0f})"
        for index, level in levels.items()
        if is_silent(level)
    ]


def silent_speech(wav: Tensor, sample_rate: int) -> tuple[float, list[str]]:
    """Level of a spoken answer [samples], in dBFS at its loudest, and a note if it is silent."""
    level = loudest_dbfs(wav.numpy(), sample_rate)
    if not is_silent(level):
        return level, []
    return level, [
        f"the speech is silent ({level:.0f} dBFS at its loudest, below {SILENCE_DBFS:.0f}); "
        "another seed or temperature may give another answer"
    ]


def missing_speech(steps: int, audio_ids: int, delay: int, ended: bool) -> str:
    """Why an answer without speech codes has none.

    ``audio_ids`` is the length of the audio track after its ``delay``, end token included.
    """
    if not audio_ids:
        return (
            f"no speech: the answer stopped after {steps} steps, and speech begins at step "
            f"{delay + 1}; allow more (max_new_tokens, or a shorter prompt)"
        )
    if ended and audio_ids == 1:
        return "no speech: the model ended its speech before the first speech code"
    return f"no speech: none of the {audio_ids} ids in the model's audio track is a speech code"
