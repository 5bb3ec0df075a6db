"""The engine: loaded components, set up to answer requests."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from kimia_infer.api.events import Event
from kimia_infer.api.loading import Components
from kimia_infer.api.parameters import BUDGETS, Parameters
from kimia_infer.api.response import (
    Deadline,
    OnStep,
    Request,
    Response,
    SpeechPipeline,
    Stopwatch,
    named,
)
from kimia_infer.api.voice import VoiceReader
from kimia_infer.audio.files import (
    SAMPLE_RATE,
    AudioError,
    AudioTooLong,
    Check,
    Note,
    load_audio,
)
from kimia_infer.engine.decode import ControlTokens, DecodeInput, Decoder, Generation
from kimia_infer.engine.repetition import RepetitionGuard
from kimia_infer.layers.onednn import use_onednn
from kimia_infer.layers.sampler import Randomness, SeededRandomness
from kimia_infer.models.kimi_audio.prompt import (
    AudioInput,
    EncodedMessage,
    Message,
    Prompt,
    PromptBuilder,
    parse_audio,
    parse_messages,
    require_content,
)
from kimia_infer.models.kimi_audio.speech_tokenizer import SpeechCodes
from kimia_infer.models.kimi_audio.text_tokenizer import TextStream, TextTokenizer
from kimia_infer.models.kimi_audio.whisper import WhisperFeatures, code_count
from kimia_infer.utils.errors import RequestError, RequestOutOfMemory

HeadRows = Literal["full", "track"]
Item = TypeVar("Item")

log = logging.getLogger(__name__)

POLL_INTERVAL = 8
"""Steps between polls where steps are recorded."""


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes chats with the tokenizers and encoders of a checkpoint."""

    text_tokenizer: TextTokenizer
    speech_codes: SpeechCodes
    whisper_features: WhisperFeatures
    prompt_builder: PromptBuilder

    def load(
        self,
        messages: Sequence[Message],
        options: Parameters,
        clock: Stopwatch,
        note: Note = log.warning,
        check: Check | None = None,
    ) -> dict[int, np.ndarray]:
        """The audio of a chat by message, float32 [samples] at 16 kHz.

        Audio that alone would exceed the budget is refused without decoding the rest. ``note`` and
        ``check`` are those of ``load_audio``; notes begin with the name of the message.
        """
        waves = {}
        with clock.timed("load_audio"):
            for index, message in enumerate(messages):
                if message.audio is None:
                    continue
                where = f"chats[{index}].content: "
                noted = named(where, note)
                try:
                    waves[index] = load_audio(
                        message.audio, options.max_audio_seconds, note=noted, check=check
                    )
                except AudioTooLong as error:
                    raise AudioTooLong(f"{where}{error} ({options.budget_explained})") from error
                except AudioError as error:
                    raise AudioError(f"{where}{error}") from error
        return waves

    def encode(
        self,
        messages: Sequence[Message],
        waves: Mapping[int, np.ndarray],
        options: Parameters,
        clock: Stopwatch,
    ) -> tuple[Prompt, Tensor | None]:
        """The prompt and the Whisper features [positions, dim] it refers to.

        A prompt that leaves no budget is refused before any encoder runs.
        """
        with clock.timed("prompt"):
            text_ids = [self.text_tokenizer.encode(m.text or "") for m in messages]
            unknown = {i: [0] * code_count(len(wave)) for i, wave in waves.items()}
            draft = self._layout(messages, text_ids, unknown, options)
            options.step_limit(len(draft))
        with clock.timed("encoders"):
            features, codes = self.encode_waves(waves, draft.feature_messages)
        with clock.timed("prompt"):
            prompt = self._layout(messages, text_ids, codes, options)
        seconds = sum(len(wave) for wave in waves.values()) / SAMPLE_RATE
        clock.metrics |= {"input_audio_seconds": seconds, "prompt_tokens": len(prompt)}
        return prompt, features

    @torch.inference_mode()
    def encode_waves(
        self, waves: Mapping[int, np.ndarray], featured: Sequence[int]
    ) -> tuple[Tensor | None, dict[int, list[int]]]:
        """Whisper features of the ``featured`` waves, joined, and the speech codes of all.

        Features are launched first and stay on the device while the host waits for the codes.
        """
        features = self.whisper_features.encode_all([waves[index] for index in featured])
        codes = self.speech_codes.encode_all(list(waves.values()))
        found = {index: part.tolist() for index, part in zip(waves, codes, strict=True)}
        return torch.cat(features) if features else None, found

    def _layout(
        self,
        messages: Sequence[Message],
        text_ids: Sequence[list[int]],
        codes: Mapping[int, list[int]],
        options: Parameters,
    ) -> Prompt:
        encoded = [
            EncodedMessage(m.role, m.message_type, text_ids[i], codes.get(i, ()))
            for i, m in enumerate(messages)
        ]
        return self.prompt_builder.build(encoded, options.output_type)


class Engine:
    """Components set up to answer requests, and what a request goes through."""

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
        self.offload, self.capacity = components.offload or "none", components.capacity
        self.speech_device = components.speech_device or self.device
        # On the CPU a poll costs nothing, and a thread would compete for its cores.
        self.background = self.device.type != "cpu"
        self.poll_interval = POLL_INTERVAL if self.background else 1
        self.text_tokenizer = components.text_tokenizer
        self.segment_seconds = components.segment_seconds
        self.speech_codes = components.speech_tokenizer
        self.whisper_features = components.whisper
        self.language_model = model.with_cut_heads() if head_rows == "track" else model
        self.detokenizer = components.detokenizer
        self._use_onednn()
        for device in {self.device, self.speech_device}:
            # The detokenizer's CUDA stream does not wait for the one that loaded the weights.
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        config, special = self.language_model.config, self.text_tokenizer.special
        self.kimia_token_offset = config.token_offset
        self.prompt_builder = PromptBuilder(special, config.token_offset, config.audio_delay)
        self.encoder = ChatEncoder(
            self.text_tokenizer, self.speech_codes, self.whisper_features, self.prompt_builder
        )
        self.voice_reader = VoiceReader.of(components)
        control = ControlTokens(
            special.text_blank, special.text_eos, (special.msg_end, special.media_end)
        )
        capacity = max(BUDGETS.values())
        self.decoder = Decoder(
            self.language_model, control, capacity, attention, kv_cache=kv_cache or "none"
        )
        self.decoder.warm_up()
        components.warm_up()
        log.info(
            "Kimi-Audio on %s, encoders and speech on %s, %s, slots: %s, positions: %s, "
            "quantization: %s, key/value cache: %s, offload: %s, attention: %s, head rows: %s, "
            "adapter: %s, output: %s",
            self.device, self.speech_device, self.dtype, *astuple(self.capacity),
            self.quantization, self.decoder.kv_cache, self.offload, self.decoder.backend.name,
            head_rows, self.adapter or "none",
            "text" if self.detokenizer is None else "text and speech",
        )  # fmt: skip

    def _use_onednn(self) -> None:
        use_onednn(self.speech_codes.module)
        use_onednn(self.whisper_features.module)
        use_onednn(self.language_model)
        if self.detokenizer is not None:
            use_onednn(self.detokenizer.dit)

    def respond(
        self,
        chats: list[dict],
        options: Parameters,
        randomness: Randomness | None = None,
        on_step: OnStep | None = None,
        *,
        voice: AudioInput | None = None,
        deadline: Deadline | None = None,
    ) -> Generator[Event]:
        """:meth:`stream` with parsed options.

        ``randomness`` replaces the seeded generator of ``options.seed``; ``on_step`` is called
        with (steps done, step limit) and may raise to stop. ``deadline`` replaces that of
        ``options.timeout_seconds``; whoever gives one can cancel the request, which then raises
        RequestCancelled.
        """
        deadline = deadline or Deadline(options.timeout_seconds)
        events = self._respond(chats, options, randomness, on_step, voice, deadline)
        return surviving_out_of_memory(events)

    @torch.inference_mode()
    def _respond(
        self,
        chats: list[dict],
        options: Parameters,
        randomness: Randomness | None,
        on_step: OnStep | None,
        voice: AudioInput | None,
        deadline: Deadline,
    ) -> Generator[Event]:
        self.check(options, voice is not None)
        messages, clock = parse_messages(chats), Stopwatch()
        if randomness is None:
            randomness = SeededRandomness(options.seed)
            clock.metrics["seed"] = randomness.seed
        notes: list[str] = []
        with clock.timed("voice"):
            read = None
            if voice is not None and self.voice_reader is not None:  # as checked
                source = parse_audio("voice", voice)
                read = self.voice_reader.read(source, notes.append, deadline.check)
        yield from self.answer(
            Request(
                messages,
                self.encoder.load(messages, options, clock, notes.append, deadline.check),
                options,
                randomness,
                deadline,
                clock,
                RepetitionGuard() if options.stop_repetition else None,
                on_step,
                read,
                notes,
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
        response = self.begin(request)
        yield from response.events()
        yield response.completion()

    def begin(self, request: Request) -> Response:
        """Encode the chat of a request, for the response that runs its generation."""
        require_content(request.messages)
        prompt, features = self.encoder.encode(
            request.messages, request.waves, request.options, request.clock
        )
        request.deadline.check()
        return Response(
            request,
            self.generation(prompt, features, request.options, request.randomness),
            TextStream(self.text_tokenizer),
            self._pipeline(request),
            self.kimia_token_offset,
            0 if self.detokenizer is None else self.detokenizer.sample_rate,
        )

    def check(self, options: Parameters, voice: bool = False) -> None:
        """Raise RequestError for what this model, as it was loaded, cannot do."""
        if options.output_type == "both" and self.detokenizer is None:
            raise RequestError(
                "output_type: 'both' needs the detokenizer, but this KimiAudio was created with "
                "load_detokenizer=False; ask for 'text' or load it"
            )
        if voice:
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
        """The generation of the answer to an encoded chat."""
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed, which on the CPU only the message says."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "DefaultCPUAllocator:" in str(error)


def surviving_out_of_memory(items: Generator[Item]) -> Generator[Item]:
    """``items``, whose lack of memory becomes a RequestOutOfMemory.

    The memory of the failed call is freed before the error is raised, and the allocator's idle
    memory goes back to the device for the next request. Closing this iterator closes ``items``.
    """
    try:
        yield from items
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["MemoryError"])[0]
        # Every frame on the way refers to tensors, and the traceback to the frames.
        traceback.clear_frames(error.__traceback__)
    del items
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    raise RequestOutOfMemory(
        f"out of memory while answering ({reason}); send less audio, text or history, or a "
        "smaller max_new_tokens. The memory is free again for other requests"
    )
