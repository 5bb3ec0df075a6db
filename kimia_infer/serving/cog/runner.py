"""What the predictors of predict.py have in common: set-up, health, and one answer."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from cog import BaseRunner, Path

from kimia_infer.api.events import Completion, Event
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.transcription import Transcript, TranscriptEvent
from kimia_infer.serving.cog.health import Health
from kimia_infer.serving.cog.leftovers import Uploads, keep_clean
from kimia_infer.serving.cog.request import name_files
from kimia_infer.serving.cog.respond import respond
from kimia_infer.serving.cog.self_test import self_test
from kimia_infer.serving.cog.settings import read_settings
from kimia_infer.utils.errors import RequestError, RequestTimeout
from kimia_infer.weights.resolve import weights_from_environment


class KimiRunner(BaseRunner):
    """A predictor without ``run``, which every predictor declares itself."""

    def setup(self, weights: Path | str | None = None) -> None:
        """Load the weights that KIMI_AUDIO_WEIGHTS names, else those that Cog passes.

        Ends with a self-test, so that a service that is READY has answered once.
        """
        show_log()
        settings = read_settings(os.environ)
        self.model = KimiAudio(
            weights_from_environment(weights),
            load_detokenizer=settings.output == "both",
            device=settings.device,
            dtype=settings.dtype,
            head_rows=settings.head_rows,
            attention=settings.attention,
            adapter=settings.adapter,
            quantization=settings.quantization,
            kv_cache=settings.kv_cache,
            offload=settings.offload,
        )
        self.timeout = settings.timeout
        self.health = Health(self.model.device, self.timeout)
        self_test(self.model)
        self.uploads = Uploads()
        keep_clean(self.uploads)

    def healthcheck(self) -> bool:
        """Whether the device computes; the error raised otherwise is what Cog reports."""
        self.health.check()
        return True

    def respond(self, inputs: dict[str, Any]) -> Iterator[Event | TranscriptEvent]:
        """The events of an answer to checked inputs, last its Completion or Transcript.

        Closing the iterator stops generation, as does the CancelationException that Cog
        raises wherever the prediction is: no further step is launched.
        """
        self.uploads.sweep(inputs.values())
        spoken = inputs["task"] == "chat" and inputs["output_type"] == "both"
        if spoken and self.model.detokenizer is None:
            raise RequestError(
                "output_type: this service answers in text alone (KIMI_AUDIO_OUTPUT=text); ask for "
                "'text'"
            )
        answer = respond(self.model, inputs, self.timeout)
        with self.health.predicting(), contextlib.closing(answer) as events:
            try:
                for event in events:
                    if isinstance(event, Completion | Transcript):
                        for name, value in event.metrics.items():
                            self.record_metric(name, value)
                    yield event
            except RequestTimeout as error:
                raise RequestTimeout(
                    f"the answer was not complete within {self.timeout:g} s, the limit of this "
                    "service (KIMI_AUDIO_TIMEOUT); ask for less: max_new_tokens, shorter sound"
                ) from error
            except RequestError as error:
                raise type(error)(name_files(str(error), inputs)) from error

    def complete(self, inputs: dict[str, Any]) -> Completion | Transcript:
        """The whole answer to checked inputs."""
        for event in self.respond(inputs):
            answer = event
        return answer


def show_log() -> None:
    """Let the package's messages, which never hold a request's content, appear on stderr."""
    log = logging.getLogger("kimia_infer")
    log.setLevel(logging.INFO)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        log.addHandler(handler)
        log.propagate = False
