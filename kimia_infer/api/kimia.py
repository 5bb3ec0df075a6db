"""KimiAudio: load a checkpoint once, then answer chats with text and speech."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from kimia_infer.api.events import AudioChunk, Completion, Event, Stopwatch, TextDelta
from kimia_infer.api.loading import default_device, load_stages, parse_dtype
from kimia_infer.api.messages import Message, parse_messages
from kimia_infer.api.request import BUDGETS, UNLIMITED, Options, parse_options
from kimia_infer.audio.load import SAMPLE_RATE as INPUT_RATE
from kimia_infer.audio.load import load_audio
from kimia_infer.detokenizer.pipeline import SpeechPipeline
from kimia_infer.errors import RequestError
from kimia_infer.language_model.decode import DecodeInput, Decoder, Generation, Progress
from kimia_infer.language_model.state import ControlTokens
from kimia_infer.prompt.builder import EncodedMessage, Prompt, PromptBuilder
from kimia_infer.randomness import Randomness, SeededRandomness
from kimia_infer.tokenizer.segments import code_count
from kimia_infer.tokenizer.text import TextStream
from kimia_infer.weights.resolve import resolve_weights

HeadRows = Literal["full", "track"]

log = logging.getLogger(__name__)

SAMPLE_RATE = 24_000
CHECK_INTERVAL = 8


class KimiAudio:
    """Kimi-Audio, source-compatible with the published class.

    ``model_path`` is a checkpoint directory or a hub id (``owner/name[@revision]``). With
    ``load_detokenizer=False`` only text can be asked for. ``device`` defaults to the
    accelerator PyTorch reports (MPS only when named), else the CPU; ``dtype`` (a
    torch.dtype or its name) to bfloat16 on accelerators and float32 on the CPU. The speech
    tokenizer always runs in float32, since bfloat16 changes codes. ``head_rows="track"``
    computes only the logits each track can use; the published ``"full"`` is the default.
    ``attention`` names a backend (``"triton"``, ``"flash-attn"``, ``"sdpa"``) instead of the best
    one that device and installation allow.

    Raises RequestError for a backend that cannot be used here; CheckpointError or WeightsError
    before anything is served if a file is missing or does not fit.
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
    ):
        self.device = torch.device(device) if device is not None else default_device()
        self.dtype = parse_dtype(dtype, self.device)
        if head_rows not in ("full", "track"):
            raise RequestError(f"head_rows: expected 'full' or 'track', found {head_rows!r}")
        self.head_rows = head_rows
        # On the CPU a look at the loop costs nothing, and a thread would fight for its cores.
        self.background = self.device.type != "cpu"
        self.check_interval = CHECK_INTERVAL if self.background else 1
        directory = resolve_weights(model_path, detokenizer=load_detokenizer)
        stages = load_stages(directory, load_detokenizer, self.device, self.dtype)
        self.text_tokenizer = stages.text_tokenizer
        self.speech_codes = stages.speech_codes
        self.whisper_features = stages.whisper_features
        cut = head_rows == "track"
        model = stages.language_model
        self.language_model = model.with_cut_heads() if cut else model
        self.detokenizer = stages.detokenizer
        config, special = self.language_model.config, self.text_tokenizer.special
        self.kimia_token_offset = config.token_offset
        self.prompt_builder = PromptBuilder(special, config.token_offset, config.audio_delay)
        control = ControlTokens(
            special.text_blank, special.text_eos, (special.msg_end, special.media_end)
        )
        capacity = max(BUDGETS.values())
        self.decoder = Decoder(self.language_model, control, capacity, attention)
        self.decoder.warm_up(parse_options().sampling, load_detokenizer)
        log.info(
            "Kimi-Audio on %s, %s, attention: %s, head rows: %s",
            self.device, self.dtype, self.decoder.backend.name, head_rows,
        )  # fmt: skip

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
    ) -> tuple[Tensor | None, str]:
        """Answer a chat: ``(wav, text)``, wav float32 [1, samples] at 24 kHz or None.

        ``chats`` is a list of messages ``{"role", "message_type", "content"}``. Prompt and
        answer together may fill 1500 positions with ``output_type="both"`` and 7500 with
        ``"text"``; ``max_new_tokens=-1`` means what the prompt leaves of that, a positive
        value is honoured in both modes and capped by it. (The published code ignores the
        value for ``"both"``, and forgets tokens after step 4096; neither happens here.)
        ``wav`` is None when no speech code was generated, where the published code fails.

        ``preset`` chooses how speech is cut for synthesis: ``"quality"`` as published,
        ``"low_latency"`` with small chunks first, which sounds earlier in :meth:`stream`.

        The same ``seed`` repeats a sampled answer on the same machine; None draws one.
        Raises RequestError naming what to change; AudioError, one of them, for bad sound.
        """
        options = parse_options(
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
        )
        completion = self.complete(chats, options)
        return completion.wav, completion.text

    def stream(
        self, chats: list[dict], output_type: str = "text", **arguments: float | str | None
    ) -> Iterator[Event]:
        """:meth:`generate` as it happens: text and sound as soon as they are known.

        Takes the arguments of :meth:`generate` by name. Yields TextDelta and AudioChunk events
        and, last, the Completion. With the same seed and preset the pieces joined are exactly
        what :meth:`generate` returns. A consumer that closes the iterator stops generation: no
        further step is launched.
        """
        return self.respond(chats, parse_options(output_type=output_type, **arguments))

    def complete(
        self,
        chats: list[dict],
        options: Options,
        randomness: Randomness | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Completion:
        """The last event of :meth:`respond`."""
        *_, completion = self.respond(chats, options, randomness, on_step)
        return completion

    @torch.inference_mode()
    def respond(
        self,
        chats: list[dict],
        options: Options,
        randomness: Randomness | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Iterator[Event]:
        """:meth:`stream` with parsed options.

        ``randomness`` replaces the seeded generator of ``options.seed``; ``on_step`` is called
        with (steps done, step limit) and may raise to stop.
        """
        self._check(options)
        messages, clock = parse_messages(chats), Stopwatch()
        if randomness is None:
            randomness = SeededRandomness(options.seed)
            clock.metrics["seed"] = randomness.seed
        prompt, features = self.encode_chat(messages, options, clock)
        generation = self._generation(prompt, features, options, randomness)
        text = TextStream(self.text_tokenizer)
        speech = self._pipeline(options, randomness)
        if speech is not None:
            generation.look_by(self.language_model.config.audio_delay + speech.missing())
        run = generation.run()
        parts, waves = [], []
        try:
            for progress in _timed(run, clock):
                if on_step is not None:
                    on_step(progress.steps, generation.max_steps)
                ids = [i for i in progress.text_ids if i < self.kimia_token_offset]
                delta = text.push(ids) + (text.finish() if progress.finished else "")
                if delta:
                    clock.first("first_text")
                    parts.append(delta)
                    yield TextDelta(delta)
                if speech is None:
                    continue
                speech.feed(self._codes(progress.audio_ids))
                ahead = generation.launched - progress.steps
                generation.look_by(progress.steps + speech.missing(ahead))
                if progress.finished:
                    speech.finish()
                for wav in speech.rest() if progress.finished else speech.ready():
                    clock.first("first_audio")
                    waves.append(wav)
                    yield AudioChunk(wav)
        finally:
            run.close()
            if speech is not None:
                speech.close()
        if waves:
            clock.metrics["detokenizer_seconds"] = speech.seconds
        yield self._completion(generation, "".join(parts), waves, clock)

    def _check(self, options: Options) -> None:
        if options.output_type == "both" and self.detokenizer is None:
            raise RequestError(
                "output_type: 'both' needs the detokenizer, but this KimiAudio was created with "
                "load_detokenizer=False; ask for 'text' or load it"
            )
        vocabulary = self.language_model.config.vocab_size
        for track in ("audio", "text"):
            sampling = getattr(options.sampling, track)
            if sampling.top_k > vocabulary and not sampling.greedy:
                raise RequestError(
                    f"{track}_top_k: {sampling.top_k} exceeds the vocabulary, {vocabulary}"
                )

    def encode_chat(
        self, messages: Sequence[Message], options: Options, clock: Stopwatch | None = None
    ) -> tuple[Prompt, Tensor | None]:
        """The prompt of a chat and the Whisper features [positions, dim] it refers to.

        A prompt that leaves no budget is refused before any encoder runs.
        """
        clock = clock or Stopwatch()
        with clock.timed("load_audio"):
            waves = {
                index: load_audio(message.audio, options.max_audio_seconds)
                for index, message in enumerate(messages)
                if message.audio is not None
            }
        with clock.timed("prompt"):
            text_ids = [self.text_tokenizer.encode(m.text or "") for m in messages]
            counts = {i: code_count(len(wave)) for i, wave in waves.items()}
            unknown = {i: [0] * n for i, n in counts.items()}
            draft = self._layout(messages, text_ids, unknown, options)
            options.step_limit(len(draft))
        with clock.timed("encoders"):
            # Whisper first: its features stay on the device, while the host waits for the codes.
            features = [self.whisper_features.encode(waves[i]) for i in draft.feature_messages]
            codes = {i: self.speech_codes.encode(wave).tolist() for i, wave in waves.items()}
        with clock.timed("prompt"):
            prompt = self._layout(messages, text_ids, codes, options)
        seconds = sum(len(wave) for wave in waves.values()) / INPUT_RATE
        clock.metrics |= {"input_audio_seconds": seconds, "prompt_tokens": len(prompt)}
        return prompt, torch.cat(features) if features else None

    def _layout(
        self,
        messages: Sequence[Message],
        text_ids: Sequence[list[int]],
        codes: dict[int, list[int]],
        options: Options,
    ) -> Prompt:
        encoded = [
            EncodedMessage(m.role, m.message_type, text_ids[i], codes.get(i, ()))
            for i, m in enumerate(messages)
        ]
        return self.prompt_builder.build(encoded, options.output_type)

    def _generation(
        self, prompt: Prompt, features: Tensor | None, options: Options, randomness: Randomness
    ) -> Generation:
        return Generation(
            self.decoder,
            DecodeInput(
                torch.tensor([prompt.audio_ids], device=self.device),
                torch.tensor([prompt.text_ids], device=self.device),
                torch.tensor([prompt.is_continuous], device=self.device),
                features,
            ),
            options.output_type,
            options.step_limit(len(prompt)),
            options.sampling,
            randomness,
            self.check_interval,
        )

    def _pipeline(self, options: Options, randomness: Randomness) -> SpeechPipeline | None:
        if options.output_type == "text":
            return None
        return SpeechPipeline(
            self.detokenizer,
            self._noise(randomness),
            options.preset,
            self.background,
        )

    def _codes(self, audio_ids: Sequence[int]) -> list[int]:
        """Speech codes among ids of the audio track; as published, other ids are left out."""
        offset = self.kimia_token_offset
        return [i - offset for i in audio_ids if i >= offset]

    def _completion(
        self, generation: Generation, text: str, waves: list[Tensor], clock: Stopwatch
    ) -> Completion:
        codes = self._codes(generation.audio_ids)
        wav = torch.cat(waves)[None] if waves else None
        if wav is not None:
            clock.metrics["output_audio_seconds"] = wav.shape[1] / SAMPLE_RATE
        clock.metrics |= {
            "decode_steps": generation.steps,
            "text_tokens": len(generation.text_ids),
            "speech_codes": len(codes),
            "attention": self.decoder.backend.name,
            "head_rows": self.head_rows,
            "total_seconds": time.perf_counter() - clock.started,
        }
        return Completion(
            wav, text, generation.text_ids, generation.audio_ids, codes, clock.metrics
        )

    def detokenize_text(self, text_tokens: Sequence[int]) -> str:
        """Decode text ids up to a text end token; ids of the audio track are left out."""
        end = self.text_tokenizer.special.text_eos
        ids = list(text_tokens)
        ids = ids[: ids.index(end)] if end in ids else ids
        return self.text_tokenizer.decode([i for i in ids if i < self.kimia_token_offset])

    @torch.inference_mode()
    def detokenize_audio(self, audio_tokens: Tensor, *, seed: int | None = None) -> Tensor:
        """Speech codes int64 [1, n] (from 0) -> wave float32 [1, 1920 * n] at 24 kHz.

        Raises ValueError without a detokenizer, for no codes and for codes out of range.
        """
        if self.detokenizer is None:
            raise ValueError("no detokenizer: create KimiAudio with load_detokenizer=True")
        noise = self._noise(SeededRandomness(seed))
        return self.detokenizer.synthesize(audio_tokens.reshape(-1), noise)

    def _noise(self, randomness: Randomness) -> Callable[[int, int], Tensor]:
        mel_bins = self.detokenizer.dit.config.mel_bins
        return lambda chunk, frames: randomness.noise(chunk, frames, mel_bins)


def _timed(run: Iterator[Progress], clock: Stopwatch) -> Iterator[Progress]:
    """``run`` with the time it takes noted: its first look as prefill, the others as decode."""
    stage = "prefill"
    while True:
        with clock.timed(stage):
            progress = next(run, None)
        if progress is None:
            return
        yield progress
        stage = "decode"
