"""The predictors of Kimi-Audio, but for what they are asked and answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import cog
import torch

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.request import Deadline
from kimia_infer.api.spoken import voice_of
from kimia_infer.models.kimi_audio.checkpoint import weights_from_environment
from kimia_infer.serving.cog.base import AnyEvent, ServiceRunner
from kimia_infer.serving.cog.inputs import CogInputs, build_chat, parse_inputs, respond
from kimia_infer.serving.cog.self_test import self_test
from kimia_infer.utils.errors import RequestError


class KimiRunner(ServiceRunner):
    """Loads the weights that KIMI_AUDIO_WEIGHTS names, else those that Cog passes."""

    def load(self, weights: cog.Path | str | None) -> set[torch.device]:
        named = weights_from_environment(weights)
        self.model = KimiAudio(named, **self.settings.model_arguments())
        return {self.model.device, self.model.speech_device}

    def test_model(self) -> None:
        self_test(self.model)

    def read(self, values: Mapping[str, Any]) -> CogInputs:
        inputs = parse_inputs(values)
        build_chat(inputs)
        if inputs.task != "transcribe" and inputs.output_type == "both":
            self._check_speech(inputs)
        return inputs

    def answer(self, inputs: CogInputs, deadline: Deadline) -> Iterator[AnyEvent]:
        return respond(self.model, inputs, deadline=deadline)

    def _check_speech(self, inputs: CogInputs) -> None:
        """Raise RequestError for a voice that this service does not have."""
        if inputs.speaker:
            voice_of(self.model.kokoro, inputs.speaker)
        elif self.model.detokenizer is None:
            chats = inputs.task == "chat"
            advice = "use 'text'" if chats else "start it with KIMI_AUDIO_OUTPUT=both"
            if self.model.kokoro is not None:
                advice += ", or name a speaker of Kokoro"
            raise RequestError(
                "output_type: this service answers with text only (KIMI_AUDIO_OUTPUT=text); "
                f"{advice}"
            )
