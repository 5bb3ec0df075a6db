"""The Cog predictors: audio and text in, a transcript and speech out.

Cog's build reads this file without running it, so inputs must be plain literals. A test compares
them with the models in kimia_infer/serving/cog/inputs.py and with the schema files beside it.

``run`` is asynchronous because Cog admits several predictions at a time to such predictors alone;
each is executed by a thread of its own (kimia_infer/serving/cog/slots.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from cog import BaseModel, Input, Path, concurrent, streaming

from kimia_infer.api.events import AudioChunk, Completion, Event, TextDelta
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.request import Deadline
from kimia_infer.api.spoken import voice_of
from kimia_infer.api.transcription import Transcript, TranscriptEvent, TranscriptSegment
from kimia_infer.models.kimi_audio.checkpoint import weights_from_environment
from kimia_infer.serving.cog.base import AnyEvent, ServiceRunner, wav_uri
from kimia_infer.serving.cog.inputs import CogInputs, build_chat, parse_inputs, respond
from kimia_infer.serving.cog.self_test import self_test
from kimia_infer.utils.errors import RequestError


class Inputs:
    """The inputs of both predictors, which declare their types."""

    task = Input(
        default="chat",
        description="Answer a chat, transcribe a recording of any length, or read text aloud",
        choices=["chat", "transcribe", "speak"],
    )
    audio = Input(
        default=None,
        description="Audio of the user's turn (speech, music or noise) in any common format",
        accept="audio/*",
    )
    text = Input(
        default="",
        description="Text of the user's turn, placed before the audio; an instruction or question",
        max_length=50000,
    )
    history = Input(
        default="",
        description="JSON list of earlier messages; audio is given by its index in history_audio",
        max_length=200000,
    )
    history_audio = Input(
        default=[],
        description="Audio files that the messages of history refer to",
        accept="audio/*",
    )
    output_type = Input(
        default="both",
        description="Answer with text only, or with text and speech; transcripts are always text",
        choices=["text", "both"],
    )
    voice = Input(
        default=None,
        description="A recording of 1 to 30 s; the answer is spoken in its voice",
        accept="audio/*",
    )
    audio_temperature = Input(
        default=0.8,
        description="Randomness of the speech; 0 always takes the most likely code",
        ge=0.0,
        le=2.0,
    )
    audio_top_k = Input(
        default=10,
        description="Speech codes to choose from at each step; 0 for all",
        ge=0,
        le=1000,
    )
    text_temperature = Input(
        default=0.0,
        description="Randomness of the text; 0 always takes the most likely token",
        ge=0.0,
        le=2.0,
    )
    text_top_k = Input(
        default=5,
        description="Text tokens to choose from at each step; 0 for all",
        ge=0,
        le=1000,
    )
    audio_repetition_penalty = Input(
        default=1.0,
        description="Makes recent speech codes less likely; 1 for no penalty",
        ge=1.0,
        le=2.0,
    )
    audio_repetition_window_size = Input(
        default=64,
        description="Speech codes that count as recent",
        ge=1,
        le=1500,
    )
    text_repetition_penalty = Input(
        default=1.0,
        description="Makes recent text tokens less likely; 1 for no penalty",
        ge=1.0,
        le=2.0,
    )
    text_repetition_window_size = Input(
        default=16,
        description="Text tokens that count as recent",
        ge=1,
        le=7500,
    )
    max_new_tokens = Input(
        default=-1,
        description="Maximum steps (12.5 per second of speech); -1 for no limit, 0 is refused",
        ge=-1,
        le=7500,
    )
    seed = Input(
        default=None,
        description="Makes an answer repeatable; if unset, one is drawn and returned as a metric",
        ge=0,
        le=4294967295,
    )
    speaker = Input(
        default="",
        description="Kokoro's voice for the answer, as kokoro:af_heart; the model's own if unset",
        max_length=300,
    )
    speed = Input(
        default=1.0,
        description="How fast a speaker of Kokoro speaks; 1 is normal",
        ge=0.25,
        le=4.0,
    )
    preset = Input(
        default="low_latency",
        description="Speak early with small chunks first, or use the published chunk sizes",
        choices=["low_latency", "quality"],
    )


class Segment(BaseModel):
    """The text spoken from ``start`` to ``end``, in seconds of the recording."""

    start: float
    end: float
    text: str


class Output(BaseModel):
    """An answer. Audio is a data URI, which is what Cog makes of a file inside an object.

    ``audio_reason`` explains why requested speech is missing, ``notes`` list anything else that
    is unusual about the answer; ``segments`` are those of a transcript.
    """

    audio: Path | None
    text: str
    audio_reason: str | None
    notes: list[str]
    segments: list[Segment] | None


class Chunk(BaseModel):
    """The next piece of an answer: text, or a complete wav file with the next audio.

    A transcript has a ``segment`` after the text of each. The last piece has the ``notes``, and
    the ``audio_reason`` if there was no speech.
    """

    text: str | None = None
    audio: Path | None = None
    segment: Segment | None = None
    audio_reason: str | None = None
    notes: list[str] | None = None


def segment(event: TranscriptSegment) -> Segment:
    return Segment(start=event.start, end=event.end, text=event.text)


def chunk(event: Event | TranscriptEvent) -> Chunk:
    match event:
        case TextDelta():
            return Chunk(text=event.text)
        case AudioChunk():
            return Chunk(audio=wav_uri(event.wav, event.sample_rate))
        case TranscriptSegment():
            return Chunk(segment=segment(event))
        case Transcript():
            return Chunk(notes=event.notes)
        case Completion():
            return Chunk(audio_reason=event.audio_reason, notes=event.notes)


class KimiRunner(ServiceRunner):
    """Loads the weights that KIMI_AUDIO_WEIGHTS names, else those that Cog passes."""

    def load(self, weights: Path | str | None) -> set[torch.device]:
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


class Predictor(KimiRunner):
    @concurrent(max=64)
    async def run(
        self,
        task: str = Inputs.task,
        audio: Path | None = Inputs.audio,
        text: str = Inputs.text,
        history: str = Inputs.history,
        history_audio: list[Path] = Inputs.history_audio,
        output_type: str = Inputs.output_type,
        voice: Path | None = Inputs.voice,
        audio_temperature: float = Inputs.audio_temperature,
        audio_top_k: int = Inputs.audio_top_k,
        text_temperature: float = Inputs.text_temperature,
        text_top_k: int = Inputs.text_top_k,
        audio_repetition_penalty: float = Inputs.audio_repetition_penalty,
        audio_repetition_window_size: int = Inputs.audio_repetition_window_size,
        text_repetition_penalty: float = Inputs.text_repetition_penalty,
        text_repetition_window_size: int = Inputs.text_repetition_window_size,
        max_new_tokens: int = Inputs.max_new_tokens,
        seed: int | None = Inputs.seed,
        speaker: str = Inputs.speaker,
        speed: float = Inputs.speed,
    ) -> Output:
        """Answer one turn of a chat, transcribe, or read a text aloud."""
        answer = self.complete(locals())
        chat = isinstance(answer, Completion)
        return Output(
            audio=wav_uri(answer.wav, answer.sample_rate) if chat else None,
            text=answer.text,
            audio_reason=answer.audio_reason if chat else None,
            notes=answer.notes,
            segments=None if chat else [segment(s) for s in answer.segments],
        )


class StreamingPredictor(KimiRunner):
    @streaming
    @concurrent(max=64)
    async def run(
        self,
        task: str = Inputs.task,
        audio: Path | None = Inputs.audio,
        text: str = Inputs.text,
        history: str = Inputs.history,
        history_audio: list[Path] = Inputs.history_audio,
        output_type: str = Inputs.output_type,
        voice: Path | None = Inputs.voice,
        audio_temperature: float = Inputs.audio_temperature,
        audio_top_k: int = Inputs.audio_top_k,
        text_temperature: float = Inputs.text_temperature,
        text_top_k: int = Inputs.text_top_k,
        audio_repetition_penalty: float = Inputs.audio_repetition_penalty,
        audio_repetition_window_size: int = Inputs.audio_repetition_window_size,
        text_repetition_penalty: float = Inputs.text_repetition_penalty,
        text_repetition_window_size: int = Inputs.text_repetition_window_size,
        max_new_tokens: int = Inputs.max_new_tokens,
        seed: int | None = Inputs.seed,
        speaker: str = Inputs.speaker,
        speed: float = Inputs.speed,
        preset: str = Inputs.preset,
    ) -> Iterator[Chunk]:
        """Answer one turn of a chat, transcribe, or read aloud, while it is being generated."""
        return (chunk(event) for event in self.respond(locals()))
