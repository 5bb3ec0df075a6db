"""The predictor of Step-Audio-EditX, but for what it is asked and answers."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cog
import numpy as np
import torch
from pydantic import Field

from kimia_infer.api.editx import EditX
from kimia_infer.api.editx_request import Editor, EditXParameters
from kimia_infer.api.events import AudioChunk, Event
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import parse_as
from kimia_infer.api.request import Deadline
from kimia_infer.audio.files import SAMPLE_RATE, wav_bytes
from kimia_infer.models.step_audio_editx.layout import find_editx
from kimia_infer.serving.cog.base import ServiceRunner
from kimia_infer.serving.cog.self_test import SelfTestError
from kimia_infer.utils.errors import RequestError

log = logging.getLogger(__name__)

WEIGHTS = "KIMI_AUDIO_WEIGHTS"


class EditXInputs(EditXParameters):
    """The inputs of the predictor. The file must be a path as ``ServiceRunner`` makes it."""

    audio: Path | None = Field(
        None, description="A recording of 0.5 to 30 s of one person, at 16 kHz or more"
    )

    @property
    def files(self) -> dict[str, Path]:
        return {} if self.audio is None else {"audio": self.audio}


class EditXRunner(ServiceRunner):
    """Loads the weights that KIMI_AUDIO_EDITX names, else those that Cog passes, else the cache's.

    Where KIMI_AUDIO_WEIGHTS is set, Kimi-Audio is loaded as well, to write transcripts.
    """

    after_timeout = "send a shorter text or recording"

    def load(self, weights: cog.Path | str | None) -> set[torch.device]:
        settings = self.settings
        directory = find_editx(os.environ.get("KIMI_AUDIO_EDITX") or weights)
        quantization = settings.quantization or "none"
        model, kimi = EditX(directory, settings.device, settings.dtype, quantization), None
        if named := os.environ.get(WEIGHTS):
            kimi = KimiAudio(named, **settings.transcriber_arguments())
        self.editor = Editor(model, kimi)
        return {model.networks.language_model.device}

    def test_model(self) -> None:
        """Edit a synthetic recording, as far as the first sound, which must be finite."""
        time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
        buzz = np.sum([np.sin(2 * np.pi * 110 * n * time) / n for n in range(1, 9)], axis=0)
        asked, recording = EditXParameters(task="denoise", seed=0), wav_bytes(buzz / 8, SAMPLE_RATE)
        events = self.editor.respond(recording, asked, Deadline(None), streams=True)
        with contextlib.closing(events):
            first = next(events)
        assert isinstance(first, AudioChunk), "sound comes first"
        if not first.wav.isfinite().all():
            raise SelfTestError("the sound of a test edit is not finite; check the weights")
        log.info("Self-test passed")

    def read(self, values: Mapping[str, Any]) -> EditXInputs:
        fields = EditXInputs.model_fields
        inputs = parse_as(EditXInputs, {n: v for n, v in values.items() if n in fields})
        self.editor.check(inputs)
        if inputs.audio is None:
            raise RequestError("audio: expected a recording; send one as a data URI or a URL")
        return inputs

    def answer(self, inputs: EditXInputs, deadline: Deadline) -> Iterator[Event]:
        assert inputs.audio is not None
        return self.editor.respond(inputs.audio.read_bytes(), inputs, deadline, streams=False)
