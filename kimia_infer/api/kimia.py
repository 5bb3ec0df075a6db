"""KimiAudio: load a checkpoint once, then answer chats with text and speech."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from kimia_infer.api.messages import Message, parse_messages
from kimia_infer.api.request import UNLIMITED, Options, parse_options
from kimia_infer.audio.load import load_audio
from kimia_infer.detokenizer.stream import Detokenizer
from kimia_infer.errors import RequestError
from kimia_infer.language_model.attention import backend
from kimia_infer.language_model.decode import (
    ControlTokens,
    DecodeInput,
    Generation,
    HeadRows,
)
from kimia_infer.language_model.model import language_model_part
from kimia_infer.prompt.builder import EncodedMessage, Prompt, PromptBuilder
from kimia_infer.randomness import Randomness, SeededRandomness
from kimia_infer.tokenizer.segments import code_count
from kimia_infer.tokenizer.speech import SpeechCodes, speech_tokenizer_part
from kimia_infer.tokenizer.text import TextTokenizer
from kimia_infer.tokenizer.whisper import WhisperFeatures, whisper_part
from kimia_infer.weights.checkpoint import Part
from kimia_infer.weights.resolve import resolve_weights

SAMPLE_RATE = 24_000


@dataclass
class Completion:
    """An answer and how it came about.

    ``wav`` float32 [1, samples] at 24 kHz, None without speech. ``text_ids`` exclude the end
    token; ``audio_ids`` are the audio track after its delay, end token included; ``codes``
    are the speech codes among them. ``metrics`` holds seconds per stage and counts.
    """

    wav: Tensor | None
    text: str
    text_ids: list[int]
    audio_ids: list[int]
    codes: list[int]
    metrics: dict[str, float | int | str] = field(default_factory=dict)


class KimiAudio:
    """Kimi-Audio, source-compatible with the published class.

    ``model_path`` is a checkpoint directory or a hub id (``owner/name[@revision]``). With
    ``load_detokenizer=False`` only text can be asked for. ``device`` defaults to the
    accelerator PyTorch reports (MPS only when named), else the CPU; ``dtype`` (a
    torch.dtype or its name) to bfloat16 on accelerators and float32 on the CPU. The speech
    tokenizer always runs in float32, since bfloat16 changes codes. ``head_rows="track"``
    computes only the logits each track can use; the published ``"full"`` is the default.

    Raises CheckpointError or WeightsError before anything is served if a file is missing or
    does not fit.
    """

    def __init__(
        self,
        model_path: str,
        load_detokenizer: bool = True,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        head_rows: HeadRows = "full",
    ):
        self.device = torch.device(device) if device is not None else default_device()
        self.dtype = _dtype(dtype, self.device)
        if head_rows not in ("full", "track"):
            raise RequestError(f"head_rows: expected 'full' or 'track', found {head_rows!r}")
        self.head_rows = head_rows
        directory = resolve_weights(str(model_path), detokenizer=load_detokenizer)
        glm4 = directory / "glm-4-voice-tokenizer"
        whisper = directory / "whisper-large-v3"
        self.text_tokenizer = TextTokenizer(directory)
        language_model = language_model_part(directory)
        speech = speech_tokenizer_part(glm4)
        features = whisper_part(whisper)
        parts = [language_model, speech, features]
        if load_detokenizer:
            parts += Detokenizer.parts(directory)
        loaded = self._load(parts, speech)
        self.language_model = loaded[0]
        self.speech_codes = SpeechCodes(loaded[1], glm4)
        self.whisper_features = WhisperFeatures(loaded[2], whisper)
        self.detokenizer = Detokenizer(*loaded[3:]) if load_detokenizer else None
        config = self.language_model.config
        self.kimia_token_offset = config.token_offset
        special = self.text_tokenizer.special
        self.prompt_builder = PromptBuilder(special, config.token_offset, config.audio_delay)
        self.control = ControlTokens(
            special.text_blank, special.text_eos, (special.msg_end, special.media_end)
        )

    def _load(self, parts: Sequence[Part], float32_part: Part) -> list[torch.nn.Module]:
        total = sum(part.elements for part in parts)
        with tqdm(total=total, desc="Loading weights", unit="value", unit_scale=True) as bar:
            return [
                part.load(
                    self.device, torch.float32 if part is float32_part else self.dtype, bar.update
                )
                for part in parts
            ]

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
    ) -> tuple[Tensor | None, str]:
        """Answer a chat: ``(wav, text)``, wav float32 [1, samples] at 24 kHz or None.

        ``chats`` is a list of messages ``{"role", "message_type", "content"}``. Prompt and
        answer together may fill 1500 positions with ``output_type="both"`` and 7500 with
        ``"text"``; ``max_new_tokens=-1`` means what the prompt leaves of that, a positive
        value is honoured in both modes and capped by it. (The published code ignores the
        value for ``"both"``, and forgets tokens after step 4096; neither happens here.)
        ``wav`` is None when no speech code was generated, where the published code fails.

        The same ``seed`` repeats a sampled answer on the same machine; None draws one.
        Raises RequestError (or AudioError) naming what to change.
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
        )
        completion = self.complete(chats, options)
        return completion.wav, completion.text

    @torch.inference_mode()
    def complete(
        self,
        chats: list[dict],
        options: Options,
        randomness: Randomness | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Completion:
        """:meth:`generate` with the tokens and metrics of the answer.

        ``randomness`` replaces the seeded generator of ``options.seed``; ``on_step`` is called
        with (steps done, step limit) and may raise to stop.
        """
        self._check(options)
        messages = parse_messages(chats)
        stages = _Stages()
        if randomness is None:
            randomness = SeededRandomness(options.seed)
            stages.metrics["seed"] = randomness.seed
        prompt, features = self.encode_chat(messages, options, stages)
        generation = self._decode(prompt, features, options, randomness, on_step, stages)
        return self._complete(generation, options, randomness, stages)

    def _check(self, options: Options) -> None:
        if options.output_type == "both" and self.detokenizer is None:
            raise RequestError(
                "output_type: 'both' needs the detokenizer, but this KimiAudio was created with "
                "load_detokenizer=False; ask for 'text' or load it"
            )
        vocabulary = self.language_model.config.vocab_size
        for track in ("audio", "text"):
            top_k = getattr(options.sampling, track).top_k
            if top_k > vocabulary:
                raise RequestError(f"{track}_top_k: {top_k} exceeds the vocabulary, {vocabulary}")

    def encode_chat(
        self, messages: Sequence[Message], options: Options, stages: _Stages
    ) -> tuple[Prompt, Tensor | None]:
        """The prompt of a chat and the Whisper features [positions, dim] it refers to.

        A prompt that leaves no budget is refused before any encoder runs.
        """
        with stages.timed("load_audio"):
            waves = {i: load_audio(m.audio) for i, m in enumerate(messages) if m.audio is not None}
        text_ids = [self.text_tokenizer.encode(m.text or "") for m in messages]
        counts = {i: code_count(len(wave)) for i, wave in waves.items()}
        draft = self._layout(messages, text_ids, {i: [0] * n for i, n in counts.items()}, options)
        options.step_limit(len(draft))
        with stages.timed("speech_codes"):
            codes = {i: self.speech_codes.encode(wave).tolist() for i, wave in waves.items()}
        prompt = self._layout(messages, text_ids, codes, options)
        with stages.timed("whisper_features"):
            features = [self.whisper_features.encode(waves[i]) for i in prompt.feature_messages]
        seconds = sum(len(wave) for wave in waves.values()) / 16_000
        stages.metrics |= {"input_audio_seconds": seconds, "prompt_tokens": len(prompt)}
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

    def _decode(
        self,
        prompt: Prompt,
        features: Tensor | None,
        options: Options,
        randomness: Randomness,
        on_step: Callable[[int, int], None] | None,
        stages: _Stages,
    ) -> Generation:
        limit = options.step_limit(len(prompt))
        generation = Generation(
            self.language_model,
            DecodeInput(
                torch.tensor([prompt.audio_ids], device=self.device),
                torch.tensor([prompt.text_ids], device=self.device),
                torch.tensor([prompt.is_continuous], device=self.device),
                features,
            ),
            self.control,
            options.output_type,
            limit,
            options.sampling,
            randomness,
            self.head_rows,
        )
        run = generation.run()
        with stages.timed("prefill"):
            next(run)
        with stages.timed("decode"):
            for steps in run:
                if on_step is not None:
                    on_step(steps, limit)
        stages.metrics |= {
            "decode_steps": generation.steps,
            "attention": backend(self.device, self.dtype),
            "head_rows": self.head_rows,
        }
        return generation

    def _complete(
        self, generation: Generation, options: Options, randomness: Randomness, stages: _Stages
    ) -> Completion:
        text_ids, audio_ids = generation.text_ids, generation.audio_ids
        codes = [i - self.kimia_token_offset for i in audio_ids if i >= self.kimia_token_offset]
        wav = None
        if options.output_type == "both" and codes:
            with stages.timed("detokenizer"):
                wav = self._synthesize(torch.tensor(codes), randomness).cpu()
            stages.metrics["output_audio_seconds"] = wav.shape[1] / SAMPLE_RATE
        stages.metrics |= {"text_tokens": len(text_ids), "speech_codes": len(codes)}
        stages.metrics["total_seconds"] = time.perf_counter() - stages.started
        text = self.detokenize_text(text_ids)
        return Completion(wav, text, text_ids, audio_ids, codes, stages.metrics)

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
        return self._synthesize(audio_tokens.reshape(-1), SeededRandomness(seed))

    def _synthesize(self, codes: Tensor, randomness: Randomness) -> Tensor:
        mel_bins = self.detokenizer.mel_bins
        return self.detokenizer.synthesize(
            codes.to(self.device),
            lambda chunk, frames: randomness.noise(chunk, frames, mel_bins),
        )


class _Stages:
    """Seconds per stage, by the host's clock."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.metrics: dict[str, float | int | str] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.metrics[f"{stage}_seconds"] = time.perf_counter() - start


def default_device() -> torch.device:
    """The accelerator PyTorch reports, else the CPU; MPS has to be named explicitly."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":
        return torch.device("cpu")
    return accelerator


def _dtype(value: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if value is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if dtype not in (torch.float32, torch.bfloat16):
        raise RequestError(f"dtype: expected 'float32' or 'bfloat16', found {value!r}")
    return dtype
