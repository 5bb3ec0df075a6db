"""The engine: loaded components, ready to run requests through them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kimia_infer.api.encoding import ChatEncoder
from kimia_infer.api.events import Event, Stopwatch
from kimia_infer.api.limits import Deadline, surviving_out_of_memory
from kimia_infer.api.loading import Components
from kimia_infer.api.parameters import BUDGETS, Parameters, parse_parameters
from kimia_infer.api.response import OnStep, Request, Response
from kimia_infer.api.voice import VoiceReader, check_source
from kimia_infer.engine.decode import ControlTokens, DecodeInput, Decoder, Generation
from kimia_infer.engine.repetition import RepetitionGuard
from kimia_infer.engine.speech import SpeechPipeline, warm_up
from kimia_infer.layers.onednn import use_onednn
from kimia_infer.layers.sampler import Randomness, SeededRandomness
from kimia_infer.models.kimi_audio.prompt import (
    AudioSource,
    Message,
    Prompt,
    PromptBuilder,
    parse_messages,
)
from kimia_infer.models.kimi_audio.text_tokenizer import TextStream
from kimia_infer.utils.errors import ConfigurationError, RequestError

HeadRows = Literal["full", "track"]

log = logging.getLogger(__name__)

POLL_INTERVAL = 8


class Engine:
    """Components set up to answer, and the way of a request through them."""

    def __init__(
        self,
        components: Components,
        head_rows: HeadRows,
        attention: str | None,
        kv_cache: str | None = None,
    ):
        model = components.language_model
        self.device, self.dtype, self.head_rows = model.device, model.dtype, head_rows
        self.adapter, self.quantization = components.adapter, model.quantization
        self.offload = components.offload or "none"
        # On the CPU a look at the loop costs nothing, and a thread would fight for its cores.
        self.background = self.device.type != "cpu"
        self.poll_interval = POLL_INTERVAL if self.background else 1
        self.text_tokenizer = components.text_tokenizer
        self.segment_seconds = components.segment_seconds
        self.speech_codes = components.speech_tokenizer
        self.whisper_features = components.whisper
        self.language_model = model.with_cut_heads() if head_rows == "track" else model
        self.detokenizer = components.detokenizer
        self._use_onednn()
        if self.device.type != "cpu":
            # The detokenizer's CUDA stream does not wait for the one that loaded the weights.
            torch.accelerator.synchronize(self.device)
        config, special = self.language_model.config, self.text_tokenizer.special
        self.kimia_token_offset = config.token_offset
        self.prompt_builder = PromptBuilder(special, config.token_offset, config.audio_delay)
        self.encoder = ChatEncoder(
            self.text_tokenizer, self.speech_codes, self.whisper_features, self.prompt_builder
        )
        self.voice_reader = _voice_reader(components)
        control = ControlTokens(
            special.text_blank, special.text_eos, (special.msg_end, special.media_end)
        )
        capacity = max(BUDGETS.values())
        self.decoder = Decoder(
            self.language_model, control, capacity, attention, kv_cache=kv_cache or "none"
        )
        self.decoder.warm_up(parse_parameters().sampling, self.detokenizer is not None)
        if self.detokenizer is not None:
            warm_up(self.detokenizer)
        log.info(
            "Kimi-Audio on %s, %s, quantization: %s, key/value cache: %s, offload: %s, "
            "attention: %s, head rows: %s, adapter: %s, output: %s",
            self.device, self.dtype, self.quantization, self.decoder.kv_cache, self.offload,
            self.decoder.backend.name, head_rows, self.adapter or "none",
            "text" if self.detokenizer is None else "text and speech",
        )  # fmt: skip

    def _use_onednn(self) -> None:
        modules: list[nn.Module] = [
            self.speech_codes.module,
            self.whisper_features.encoder,
            self.language_model,
        ]
        if self.detokenizer is not None:
            modules.append(self.detokenizer.dit)
        for module in modules:
            use_onednn(module)

    def respond(
        self,
        chats: list[dict],
        options: Parameters,
        randomness: Randomness | None = None,
        on_step: OnStep | None = None,
        *,
        voice: AudioSource | None = None,
    ) -> Generator[Event]:
        """:meth:`stream` with parsed options.

        ``randomness`` replaces the seeded generator of ``options.seed``; ``on_step`` is called
        with (steps done, step limit) and may raise to stop.
        """
        return surviving_out_of_memory(self._respond(chats, options, randomness, on_step, voice))

    @torch.inference_mode()
    def _respond(
        self,
        chats: list[dict],
        options: Parameters,
        randomness: Randomness | None,
        on_step: OnStep | None,
        voice: AudioSource | None,
    ) -> Generator[Event]:
        self.check(options, voice)
        messages, clock = parse_messages(chats), Stopwatch()
        deadline = Deadline(options.timeout_seconds)
        if randomness is None:
            randomness = SeededRandomness(options.seed)
            clock.metrics["seed"] = randomness.seed
        with clock.timed("voice"):
            read = None
            if voice is not None and self.voice_reader is not None:  # as checked
                read = self.voice_reader.read(voice)
        yield from self.answer(
            Request(
                messages,
                self.encoder.load(messages, options, clock),
                options,
                randomness,
                deadline,
                clock,
                RepetitionGuard() if options.stop_repetition else None,
                on_step,
                read,
            )
        )

    def answer(self, request: Request) -> Generator[Event]:
        """The events of one answer, last the Completion."""
        clock = request.clock
        clock.metrics |= {
            "attention": self.decoder.backend.name,
            "head_rows": self.head_rows,
            "quantization": self.quantization,
            "kv_cache": self.decoder.kv_cache,
            "offload": self.offload,
        }
        if self.adapter is not None:
            clock.metrics["adapter"] = "/".join(self.adapter.parts[-2:])  # no path of the host
        prompt, features = self.encoder.encode(
            request.messages, request.waves, request.options, clock
        )
        request.deadline.check()
        response = Response(
            request,
            self.generation(prompt, features, request.options, request.randomness),
            TextStream(self.text_tokenizer),
            self._pipeline(request),
            self.kimia_token_offset,
        )
        yield from response.events()
        yield response.completion()

    def check(self, options: Parameters, voice: AudioSource | None = None) -> None:
        """Raise RequestError for what this model, as it was loaded, cannot do."""
        if options.output_type == "both" and self.detokenizer is None:
            raise RequestError(
                "output_type: 'both' needs the detokenizer, but this KimiAudio was created with "
                "load_detokenizer=False; ask for 'text' or load it"
            )
        if voice is not None:
            check_source(voice)
            if options.output_type != "both":
                raise RequestError("voice: only speech has a voice; ask for output_type='both'")
            if self.voice_reader is None:
                raise RequestError("voice: these components were loaded without a vocoder folder")
        vocabulary = self.language_model.config.vocab_size
        for track in ("audio", "text"):
            sampling = getattr(options.sampling, track)
            if sampling.top_k > vocabulary and not sampling.greedy:
                raise RequestError(
                    f"{track}_top_k: {sampling.top_k} exceeds the vocabulary, {vocabulary}"
                )

    def encode_chat(
        self, messages: Sequence[Message], options: Parameters, clock: Stopwatch | None = None
    ) -> tuple[Prompt, Tensor | None]:
        """The prompt of a chat and the Whisper features [positions, dim] it refers to.

        A prompt that leaves no budget is refused before any encoder runs.
        """
        clock = clock or Stopwatch()
        waves = self.encoder.load(messages, options, clock)
        return self.encoder.encode(messages, waves, options, clock)

    def generation(
        self, prompt: Prompt, features: Tensor | None, options: Parameters, randomness: Randomness
    ) -> Generation:
        """What generates the answer to an encoded chat."""
        return Generation(
            self.decoder,
            DecodeInput(
                torch.tensor([prompt.audio_ids]).to(self.device),
                torch.tensor([prompt.text_ids]).to(self.device),
                torch.tensor([prompt.is_continuous]).to(self.device),
                features,
            ),
            options.output_type,
            options.step_limit(len(prompt)),
            options.sampling,
            randomness,
            self.poll_interval,
        )

    def _pipeline(self, request: Request) -> SpeechPipeline | None:
        if request.options.output_type == "text":
            return None
        assert self.detokenizer is not None, "checked"
        return SpeechPipeline(
            self.detokenizer,
            self._noise(request.randomness),
            request.options.preset,
            self.background,
            request.voice,
        )

    def _noise(self, randomness: Randomness) -> Callable[[int, int], Tensor]:
        assert self.detokenizer is not None, "checked"
        mel_bins = self.detokenizer.dit.config.mel_bins
        return lambda chunk, frames: randomness.noise(chunk, frames, mel_bins)


def check_head_rows(value: str) -> None:
    """Raise ConfigurationError unless ``value`` is one of HeadRows."""
    if value not in ("full", "track"):
        raise ConfigurationError(f"head_rows: expected 'full' or 'track', found {value!r}")


def _voice_reader(components: Components) -> VoiceReader | None:
    if components.detokenizer is None or components.vocoder_folder is None:
        return None
    return VoiceReader(
        components.speech_tokenizer,
        components.vocoder_folder,
        components.detokenizer.config.frames_per_code,
    )
