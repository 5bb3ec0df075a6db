"""A model whose samplers read from a script, so that it says exactly what a test needs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.engine.decode import Decoder
from kimia_infer.engine.generation import TrackRows


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

    def sample(decoder: Decoder, track: TrackRows, step: Tensor, *rest: object) -> Tensor:
        store = decoder.rows.text.store.untyped_storage().data_ptr()
        if track.store.untyped_storage().data_ptr() == store:
            return torch.tensor([text[i] if i < len(text) else control.text_end for i in step])
        said = (int(i) - delay for i in step)
        end = control.audio_ends[0]
        return torch.tensor([audio[i] if 0 <= i < len(audio) else end for i in said])

    monkeypatch.setattr(Decoder, "_sample", sample)
