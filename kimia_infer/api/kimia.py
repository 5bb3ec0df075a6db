"""KimiAudio: load a checkpoint once, then answer chats with text and speech."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kimia_infer.api.devices import parse_device, parse_dtype
from kimia_infer.api.engine import (
    Engine,
    HeadRows,
    surviving_out_of_memory,
)
from kimia_infer.api.events import Completion, Event
from kimia_infer.api.kokoro import WORKING_BYTES, Kokoro, load_kokoro
from kimia_infer.api.loading import Components, load_components
from kimia_infer.api.memory import check_slots
from kimia_infer.api.offloading import check_offload
from kimia_infer.api.parameters import UNLIMITED, Parameters, parse_parameters
from kimia_infer.api.request import Deadline, OnStep, Request, Response, Stopwatch, named
from kimia_infer.api.transcription import (
    INSTRUCTION,
    MAX_SECONDS,
    OnProgress,
    Transcript,
    TranscriptEvent,
    check_longest,
    transcribe_stream,
)
from kimia_infer.audio.files import SAMPLE_RATE, AudioError, AudioStream
from kimia_infer.engine.repetition import RepetitionGuard
from kimia_infer.layers.attention import check_kv_cache
from kimia_infer.layers.quantization import check_quantization
from kimia_infer.layers.sampler import Randomness, SeededRandomness
from kimia_infer.models.kimi_audio.checkpoint import resolve_weights
from kimia_infer.models.kimi_audio.prompt import AudioInput, Message, parse_audio, parse_text
from kimia_infer.utils.errors import ConfigurationError, RequestError

__all__ = ["Completion", "KimiAudio"]


def check_head_rows(value: str) -> None:
    """Raise ConfigurationError unless ``value`` is one of HeadRows."""
    if value not in ("full", "track"):
        raise ConfigurationError(f"head_rows: expected 'full' or 'track', found {value!r}")


class KimiAudio(Engine):
    """Kimi-Audio, source-compatible with the published class.

    ``model_path`` is a checkpoint directory or a hub id (``owner/name[@revision]``). With
    ``load_detokenizer=False`` only text can be asked for. ``device`` defaults to the
    accelerator PyTorch reports (MPS only when named), else the CPU; ``dtype`` (a
    torch.dtype or its name) to bfloat16 on accelerators and float32 on the CPU, where a large model
    is int4 by default, and bfloat16 if the processor multiplies it
    (:mod:`kimia_infer.api.cpu`). The speech
    tokenizer always runs in float32, since bfloat16 changes codes. ``head_rows="track"``
    computes only the logits each track can use; the published ``"full"`` is the default.
    A checkpoint that is prepared for a CPU has no other rows.
    ``attention`` names a backend (``"triton"``, ``"sdpa"``) instead of the best
    one that device and installation allow. ``adapter`` is the local directory of an adapter that
    ``scripts/finetune`` made for these weights, to which it is added. ``quantization``
    (``"none"``, ``"fp8"``, ``"int8"``, ``"int4"``) says how the matrices of the language model's
    layers are stored; weights that were quantized when they were prepared need no argument.
    ``kv_cache="fp8"`` keeps keys and values of attention in 8 bits instead of ``dtype``.
    ``offload="encoders"`` keeps both encoders in host memory while they are not used.
    ``slots`` is how many requests run at a time, 1 to 32; by default as many as fit in the free
    memory of an accelerator, which is then filled, and 8 on the CPU. ``speech_device`` is another
    device for encoders, detokenizer and vocoder, so that the language model has ``device`` alone.
    ``kokoro`` gives answers the voices of Kokoro-82M (``speaker`` of :meth:`generate`): its
    checkpoint directory, or ``"auto"`` for the one in the cache, which is fetched if it is not
    there, or a loaded one. It is on the device of the speech. ``kokoro_adapter`` changes its
    prosody: the name of an adapter in its directory, or the directory of one. ``reserved`` bytes of
    that device's memory stay free for what else computes there.

    Raises ConfigurationError for an argument that is unknown or cannot be used here, and for a
    model that does not fit in the memory of the device; CheckpointError or WeightsError if a file
    is missing or does not fit.
    """

    def __init__(
        self,
        model_path: str,
        load_detokenizer: bool = True,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        head_rows: HeadRows = "full",
        attention: str | None = None,
        adapter: str | os.PathLike[str] | None = None,
        quantization: str | None = None,
        kv_cache: str | None = None,
        offload: str | None = None,
        slots: int | None = None,
        speech_device: str | torch.device | None = None,
        kokoro: Kokoro | str | os.PathLike[str] | None = None,
        kokoro_adapter: str | None = None,
        reserved: int = 0,
    ):
        place = parse_device(device)
        speech_place = place
        if speech_device is not None:
            speech_place = parse_device(speech_device, "speech_device")
        given = None if dtype is None else parse_dtype(dtype, place)
        check_head_rows(head_rows)
        if quantization is not None:
            check_quantization(quantization, place)
        if kv_cache is not None:
            check_kv_cache(kv_cache, place)
        if offload is not None:
            check_offload(offload, speech_place)
        if slots is not None:
            check_slots(slots)
        directory = resolve_weights(model_path, detokenizer=load_detokenizer)
        change = Path(adapter) if adapter is not None else None
        # First, as requests fill what memory is left.
        kokoro = load_kokoro(kokoro, speech_place, kokoro_adapter)
        components = load_components(
            directory,
            load_detokenizer,
            place,
            given,
            change,
            quantization,
            kv_cache,
            offload,
            slots,
            speech_place,
            reserved + (0 if kokoro is None else WORKING_BYTES),
        )
        super().__init__(components, head_rows, attention, kv_cache, kokoro)

    @classmethod
    def from_components(
        cls,
        components: Components,
        *,
        head_rows: HeadRows = "full",
        attention: str | None = None,
        kv_cache: str | None = None,
        kokoro: Kokoro | None = None,
    ) -> KimiAudio:
        """A model of components that are already in memory, on their device and in their dtype."""
        check_head_rows(head_rows)
        model = cls.__new__(cls)
        Engine.__init__(model, components, head_rows, attention, kv_cache, kokoro)
        return model

    def generate(
        self,
        chats: list[dict],
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
        *,
        seed: int | None = None,
        preset: str = "quality",
        speaker: str = "",
        speed: float = 1.0,
        stop_repetition: bool = False,
        timeout_seconds: float | None = None,
        voice: AudioInput | None = None,
        **unknown: Any,
    ) -> tuple[Tensor | None, str]:
        """Answer a chat: ``(wav, text)``, wav float32 [1, samples] at 24 kHz or None.

        ``chats`` is a list of messages ``{"role", "message_type", "content"}``. Audio, that of
        ``voice`` as well, is a path, the bytes of a file, or sound in memory (``{"array",
        "sampling_rate"}`` or ``(samples, rate)``, see :mod:`kimia_infer.audio.memory`).

        Prompt and answer together may fill 1500 positions with ``output_type="both"`` and 7500
        with ``"text"``; ``max_new_tokens=-1`` means what the prompt leaves of that, a positive
        value is honoured in both modes and capped by it. (The published code ignores the
        value for ``"both"``, and forgets tokens after step 4096; neither happens here.)
        ``wav`` is None when no speech code was generated, where the published code fails.

        ``preset`` chooses how speech is cut for synthesis: ``"quality"`` as published,
        ``"low_latency"`` with small chunks first, so that speech begins earlier in :meth:`stream`.
        ``voice`` is a recording of 1 to 30 s in whose timbre the answer is spoken.
        ``speaker`` is a voice of Kokoro, ``"kokoro:af_heart"``, or a mixture,
        ``"kokoro:af_heart:0.7+am_michael:0.3"``: the model answers in text, which Kokoro speaks
        sentence by sentence, ``speed`` (0.25 to 4) times as fast as usual.
        ``stop_repetition`` ends an answer whose text repeats itself endlessly: at least 4 copies
        that fill at least 128 tokens; one copy is kept. ``timeout_seconds`` is the most time an
        answer may take.

        The same ``seed`` repeats a sampled answer on the same machine; None draws one.
        Raises RequestError naming what to change; AudioError, RequestTimeout and
        RequestOutOfMemory are such.
        """
        options = parse_parameters(
            output_type=output_type,
            audio_temperature=audio_temperature,
            audio_top_k=audio_top_k,
            text_temperature=text_temperature,
            text_top_k=text_top_k,
            audio_repetition_penalty=audio_repetition_penalty,
            audio_repetition_window_size=audio_repetition_window_size,
            text_repetition_penalty=text_repetition_penalty,
            text_repetition_window_size=text_repetition_window_size,
            max_new_tokens=max_new_tokens,
            seed=seed,
            preset=preset,
            speaker=speaker,
            speed=speed,
            stop_repetition=stop_repetition,
            timeout_seconds=timeout_seconds,
            **unknown,  # refused by name
        )
        completion = self.complete(chats, options, voice=voice)
        return completion.wav, completion.text

    def stream(
        self,
        chats: list[dict],
        output_type: str = "text",
        *,
        voice: AudioInput | None = None,
        **arguments: Any,
    ) -> Generator[Event]:
        """:meth:`generate` as a stream: text and speech as soon as they are known.

        Takes the arguments of :meth:`generate` by name. Yields TextDelta and AudioChunk events
        and, last, the Completion. With the same seed and preset the pieces joined are exactly
        what :meth:`generate` returns. A consumer that closes the iterator stops generation: no
        further step is launched.
        """
        options = parse_parameters(output_type=output_type, **arguments)
        return self.respond(chats, options, voice=voice)

    def complete(
        self,
        chats: list[dict],
        options: Parameters,
        randomness: Randomness | None = None,
        on_step: OnStep | None = None,
        *,
        voice: AudioInput | None = None,
    ) -> Completion:
        """The last event of :meth:`respond`."""
        *_, completion = self.respond(chats, options, randomness, on_step, voice=voice)
        assert isinstance(completion, Completion)
        return completion

    def transcribe(self, audio: AudioInput, **arguments: Any) -> Transcript:
        """The text of a recording of any length, with its segments.

        Takes the arguments of :meth:`stream_transcription`, whose last event this is.
        """
        *_, transcript = self.stream_transcription(audio, **arguments)
        assert isinstance(transcript, Transcript)
        return transcript

    def stream_transcription(
        self,
        audio: AudioInput,
        *,
        instruction: str = INSTRUCTION,
        max_seconds: float = MAX_SECONDS,
        longest_segment: float | None = None,
        on_progress: OnProgress | None = None,
        stop_repetition: bool = True,
        deadline: Deadline | None = None,
        **sampling: Any,
    ) -> Generator[TranscriptEvent]:
        """Transcribe a recording, in one of the forms of :meth:`generate`, as a stream of events.

        The recording is cut at quiet points into segments of at most ``longest_segment`` seconds
        (2 to 30; by default, and at most, what the model understands), and each is answered on its
        own, after ``instruction``. Yields TextDelta events within segments, a
        TranscriptSegment after each and, last, the Transcript; the deltas joined are its text.
        ``on_progress`` is called after steps, with seconds of audio done and in total, and
        may raise to stop. ``max_seconds`` bounds what is decoded. ``stop_repetition`` stops a
        segment's text once it repeats itself in a way that nobody can speak: 4 copies or more
        that fill 16 tokens for each second of audio, and at least 128.

        ``sampling`` takes the ``text_*`` arguments, ``max_new_tokens`` (for each segment),
        ``seed`` and ``timeout_seconds`` (for all) of :meth:`generate`; raises what it raises.
        ``deadline`` replaces that of ``timeout_seconds`` and can cancel, as in :meth:`respond`.
        """
        options = parse_parameters(stop_repetition=stop_repetition, **sampling)
        if options.output_type != "text":
            raise RequestError("output_type: a transcription is text; leave this argument out")
        self.check(options)
        messages = [
            Message("user", "text", text=parse_text("instruction", instruction)),
            Message("user", "audio", audio=parse_audio("audio", audio)),
        ]
        longest = self.segment_seconds
        if longest_segment is not None:
            longest = min(check_longest(longest_segment), longest)
        deadline = deadline or Deadline(options.timeout_seconds)
        events = self._transcribe(messages, options, max_seconds, longest, on_progress, deadline)
        return surviving_out_of_memory(events)

    @torch.inference_mode()
    def _transcribe(
        self,
        messages: Sequence[Message],
        options: Parameters,
        max_seconds: float,
        longest: float,
        on_progress: OnProgress | None,
        deadline: Deadline,
    ) -> Generator[TranscriptEvent]:
        clock = Stopwatch()
        randomness = SeededRandomness(options.seed)
        clock.metrics["seed"] = randomness.seed
        audio = messages[-1].audio
        assert audio is not None

        def begin(segment: np.ndarray, report: Callable[[], None]) -> Response:
            guard = RepetitionGuard.for_speech(len(segment) / SAMPLE_RATE)
            return self.begin(
                Request(
                    messages,
                    {len(messages) - 1: segment},
                    options,
                    randomness,
                    deadline,
                    Stopwatch(),
                    guard if options.stop_repetition else None,
                    lambda steps, limit: report(),
                )
            )

        notes: list[str] = []
        try:
            with clock.timed("load_audio"):
                note = named("audio: ", notes.append)
                stream = AudioStream(audio, max_seconds, note=note, check=deadline.check)
            yield from transcribe_stream(
                stream,
                begin,
                clock,
                on_progress,
                longest,
                notes,
                self.scheduler.slots,
            )
        except AudioError as error:
            raise type(error)(f"audio: {error}") from error

    def detokenize_text(self, text_tokens: Sequence[int]) -> str:
        """Decode text ids up to a text end token; ids of the audio track are left out."""
        end = self.text_tokenizer.special.text_eos
        ids = list(text_tokens)
        ids = ids[: ids.index(end)] if end in ids else ids
        return self.text_tokenizer.decode([i for i in ids if i < self.kimia_token_offset])

    def detokenize_audio(self, audio_tokens: Tensor, *, seed: int | None = None) -> Tensor:
        """Speech codes int64 [1, n] (from 0) -> wave float32 [1, 1920 * n] at 24 kHz.

        Raises ValueError without a detokenizer, for no codes and for codes out of range.
        """
        if self.detokenizer is None:
            raise ValueError("no detokenizer: create KimiAudio with load_detokenizer=True")
        graphs, noise = self.detokenizer.graphs, self._noise(SeededRandomness(seed))
        waves = self.detokenizer.waves(audio_tokens.reshape(-1), noise)

        def next_wave() -> Tensor | None:
            with graphs.stream():
                wave = next(waves, None)
                return None if wave is None else wave.cpu()

        made: list[Tensor] = []
        while (wave := self.scheduler.call(next_wave)) is not None:  # requests go on in between
            made.append(wave)
        return torch.cat(made)[None]
