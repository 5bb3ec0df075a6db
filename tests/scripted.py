"""A model whose samplers read from a script, so that it says exactly what a test needs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.engine.decode import TrackState


def script(
    monkeypatch: pytest.MonkeyPatch,
    model: KimiAudio,
    text: Sequence[int] = (),
    audio: Sequence[int] = (),
) -> None:
    """Have ``model`` sample these ids; both scripts go on with the end token of their track.

    ``audio`` begins after the delay. Only for devices whose steps are not recorded.
    """
    control, delay = model.decoder.control, model.language_model.config.audio_delay

    def sample(track: TrackState, step: Tensor, sampling: object) -> Tensor:
        at = int(step)
        if track.head is model.language_model.text_head:
            chosen = text[at] if at < len(text) else control.text_end
        else:
            at -= delay
            chosen = audio[at] if 0 <= at < len(audio) else control.audio_ends[0]
        return torch.tensor([chosen])

    monkeypatch.setattr(TrackState, "sample", sample)
