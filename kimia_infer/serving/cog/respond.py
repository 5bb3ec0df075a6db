"""What a request asks of the model, whichever way it came, and speech as an answer carries it."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from kimia_infer.api.events import Completion, Event
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.api.transcription import INSTRUCTION, Transcript, TranscriptEvent
from kimia_infer.audio.encode import wav_bytes
from kimia_infer.serving.cog.request import name_messages, split_inputs
from kimia_infer.utils.errors import RequestError

Report = Callable[[float, float], None]

TRANSCRIPT_OPTIONS = (
    "text_temperature",
    "text_top_k",
    "text_repetition_penalty",
    "text_repetition_window_size",
    "max_new_tokens",
    "seed",
)
"""The inputs, besides its sound and instruction, that a transcript depends on."""


def respond(
    model: KimiAudio,
    inputs: Mapping[str, Any],
    timeout: float | None = None,
    report: Report | None = None,
) -> Iterator[Event | TranscriptEvent]:
    """The events of the answer to checked inputs, last its Completion or Transcript.

    ``timeout`` is the most seconds it may take. ``report`` is called with what is done and what
    there is to do at most, in steps of an answer or seconds of a recording. Closing the iterator
    stops generation: no further step is launched.

    Raises RequestError in the terms of the inputs.
    """
    chat, options = split_inputs(inputs)
    try:
        with contextlib.closing(_events(model, inputs, chat, options, timeout, report)) as events:
            for event in events:
                if isinstance(event, Completion | Transcript):
                    notes = [name_messages(note, inputs) for note in event.notes]
                    event = dataclasses.replace(event, notes=notes)
                yield event
    except RequestError as error:
        raise type(error)(name_messages(str(error), inputs)) from error


def _events(
    model: KimiAudio,
    inputs: Mapping[str, Any],
    chat: list[dict[str, Any]],
    options: dict[str, Any],
    timeout: float | None,
    report: Report | None,
) -> Iterator[Event | TranscriptEvent]:
    if inputs["task"] == "transcribe":
        return model.stream_transcription(
            inputs["audio"],
            instruction=inputs["text"].strip() or INSTRUCTION,
            on_progress=report,
            timeout_seconds=timeout,
            **{name: options[name] for name in TRANSCRIPT_OPTIONS},
        )
    parsed = parse_parameters(**options, timeout_seconds=timeout)
    return model.respond(chat, parsed, on_step=report, voice=inputs["voice"])


def wav_uri(wave: Tensor | None) -> str | None:
    """float32 [1, samples] at 24 kHz as a data URI of a wav file; None stays None.

    Nothing is written to disk: Cog never deletes the output files of a predictor, and turns a
    file inside an object into a data URI in any case.
    """
    if wave is None:
        return None
    return "data:audio/wav;base64," + base64.b64encode(wav_bytes(wave)).decode("ascii")
