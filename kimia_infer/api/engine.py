"""The engine: loaded components, set up to answer requests."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import astuple
from typing import Literal, TypeVar

import torch
from torch import Tensor

from kimia_infer.api.events import Event, Metrics
from kimia_infer.api.kokoro import Call, Kokoro, directly
from kimia_infer.api.loading import Components
from kimia_infer.api.parameters import BUDGETS, Parameters
from kimia_infer.api.request import (
    ChatEncoder,
    Deadline,
    OnStep,
    Request,
    Response,
    Stopwatch,
)
from kimia_infer.api.spoken import SpokenAnswer, voice_of
from kimia_infer.api.voice import VoiceReader
from kimia_infer.engine.decode import Decoder
from kimia_infer.engine.generation import ControlTokens, Generation, Task
from kimia_infer.engine.repetition import RepetitionGuard
from kimia_infer.engine.scheduler import Scheduler
from kimia_infer.engine.speech import Speech
from kimia_infer.layers.operators import use_onednn
from kimia_infer.layers.sampler import Randomness, SeededRandomness
from kimia_infer.models.kimi_audio.language_model import use_packed
from kimia_infer.models.kimi_audio.prompt import (
    AudioInput,
    Message,
    Prompt,
    PromptBuilder,
    parse_audio,
    parse_messages,
    require_content,
)
from kimia_infer.models.kimi_audio.text_tokenizer import TextStream
from kimia_infer.models.kokoro.config import SAMPLE_RATE as KOKORO_RATE
from kimia_infer.utils.errors import RequestError, as_request_error

HeadRows = Literal["full", "track"]
Item = TypeVar("Item")

log = logging.getLogger(__name__)


class Engine:
    """Components set up to answer requests, and what a request goes through."""

    def __init__(
        self,
        components: Components,
        head_rows: HeadRows,
        attention: str | None,
        kv_cache: str | None = None,
        kokoro: Kokoro | None = None,
    ):
        model = components.language_model
        if model.first_audio_id:  # it has no other rows
            head_rows = "track"
        self.device, self.dtype, self.head_rows = model.device, model.dtype, head_rows
        self.adapter, self.quantization = components.adapter, model.quantization
        self.offload, self.capacity = components.offload or "none", components.capacity
        self.speech_device = components.speech_device or self.device
        self.text_tokenizer = components.text_tokenizer
        self.segment_seconds = components.segment_seconds
        self.speech_codes = components.speech_tokenizer
        self.whisper_features = components.whisper
        self.language_model = model.with_cut_heads() if head_rows == "track" else model
        self.detokenizer, self.kokoro = components.detokenizer, kokoro
        self._use_cpu_kernels()
        for device in {self.device, self.speech_device}:
            # The detokenizer's CUDA stream does not wait for the one that loaded the weights.
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        config, special = self.language_model.config, self.text_tokenizer.special
        self.kimia_token_offset = config.token_offset
        self.prompt_builder = PromptBuilder(special, config.token_offset, config.audio_delay)
        self.encoder = ChatEncoder(
            self.text_tokenizer,
            self.speech_codes,
            self.whisper_features,
            self.prompt_builder,
            self.device,
        )
        self.voice_reader = VoiceReader.of(components)
        control = ControlTokens(
            special.text_blank, special.text_eos, (special.msg_end, special.media_end)
        )
        self.decoder = Decoder(
            self.language_model,
            control,
            max(BUDGETS.values()),
            attention,
            kv_cache=kv_cache or "none",
            slots=self.capacity.slots,
            places=self.capacity.positions,
            speaks=self.detokenizer is not None,
        )
        self.decoder.warm_up()
        components.warm_up()
        self.scheduler = Scheduler(self.decoder, self.detokenizer, self.encoder.encode)
        # Its thread would keep the weights in memory.
        weakref.finalize(self, self.scheduler.stop)
        log.info(
            "Kimi-Audio on %s, encoders and speech on %s, %s, slots: %s, positions: %s, "
            "quantization: %s, key/value cache: %s, offload: %s, attention: %s, head rows: %s, "
            "adapter: %s, output: %s, Kokoro: %s",
            self.device, self.speech_device, self.dtype, *astuple(self.capacity),
            self.quantization, self.decoder.kv_cache, self.offload, self.decoder.backend.name,
            head_rows, self.adapter or "none",
            "text" if self.detokenizer is None else "text and speech",
            "none" if kokoro is None else kokoro.device,
        )  # fmt: skip

    @property
    def described(self) -> Metrics:
        """How the model runs, for the metrics of answers."""
        described: Metrics = {
            "attention": self.decoder.backend.name,
            "head_rows": self.head_rows,
            "quantization": self.quantization,
            "kv_cache": self.decoder.kv_cache,
            "offload": self.offload,
        }
        if self.adapter is not None:
            described["adapter"] = "/".join(self.adapter.parts[-2:])  # no path of the host
        return described

    def _use_cpu_kernels(self) -> None:
        use_packed(self.language_model)
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
        stop: Sequence[str] = (),
    ) -> Generator[Event]:
        """:meth:`stream` with parsed options.

        ``randomness`` replaces the seeded generator of ``options.seed``; ``on_step`` is called
        with (steps done, step limit) and may raise to stop. ``deadline`` replaces that of
        ``options.timeout_seconds``; whoever gives one can cancel the request, which then raises
        RequestCancelled. A text without speech ends before the first of the sequences ``stop``.
        """
        deadline = deadline or Deadline(options.timeout_seconds)
        begin = functools.partial(
            self.start, chats, options, randomness, on_step,
            voice=voice, deadline=deadline, stop=stop,
        )  # fmt: skip
        return surviving_out_of_memory(self._events(begin))

    @torch.inference_mode()
    def _events(self, begin: Callable[[], Response]) -> Generator[Event]:
        """The answer that begins when the first of its events is asked for."""
        yield from begin().all_events()

    def start(
        self,
        chats: list[dict],
        options: Parameters,
        randomness: Randomness | None = None,
        on_step: OnStep | None = None,
        *,
        voice: AudioInput | None = None,
        deadline: Deadline,
        stop: Sequence[str] = (),
    ) -> Response:
        """:meth:`respond` as an answer under way, whose events can be read later."""
        self.check(options, voice is not None)
        if stop and options.output_type != "text":
            raise RequestError("stop: only for answers that are text; speech follows its text late")
        if options.speaker:  # the model writes what Kokoro speaks
            options = options.model_copy(update={"output_type": "text"})
        messages, clock = parse_messages(chats), Stopwatch()
        if randomness is None:
            randomness = SeededRandomness(options.seed)
            clock.metrics["seed"] = randomness.seed
        notes: list[str] = []
        with clock.timed("voice"):
            read = None
            if voice is not None and self.voice_reader is not None:  # as checked
                source = parse_audio("voice", voice)
                read = self.voice_reader.read(
                    source, self.scheduler.call, notes.append, deadline.check
                )
        return self.begin(
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
                stop,
            )
        )

    def begin(self, request: Request) -> Response:
        """Put a request in the queue of the engine. Raises ServiceBusy if that is full."""
        require_content(request.messages)
        request.clock.metrics |= self.described
        options = request.options
        chat, length = self.encoder.prepare(request.messages, request.waves, options, request.clock)
        request.deadline.check()
        offset = self.kimia_token_offset
        task = Task(
            chat=chat,
            length=length,
            max_steps=options.step_limit(length),
            output_type=options.output_type,
            sampling=options.sampling,
            randomness=request.randomness,
            check=request.deadline.check,
            codes_of=lambda audio_ids: [i - offset for i in audio_ids if i >= offset],
            guard=request.guard,
            speech=self._speech(request),
        )
        spoken, sample_rate = self._spoken(request, task), KOKORO_RATE
        if spoken is None:
            sample_rate = 0 if self.detokenizer is None else self.detokenizer.sample_rate
        self.scheduler.submit(task)
        text = TextStream(self.text_tokenizer)
        return Response(request, task, self.scheduler, text, offset, sample_rate, spoken)

    def check(self, options: Parameters, voice: bool = False) -> None:
        """Raise RequestError for what this model, as it was loaded, cannot do."""
        if options.speaker:
            self._check_speaker(options, voice)
        elif options.speed != 1:
            raise RequestError(
                "speed: the model itself speaks at 1.0; leave it out, or name a speaker of Kokoro"
            )
        elif options.output_type == "both" and self.detokenizer is None:
            raise RequestError(
                "output_type: 'both' needs the detokenizer, but this KimiAudio was created with "
                "load_detokenizer=False; ask for 'text', name a speaker of Kokoro or load it"
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

    def _check_speaker(self, options: Parameters, voice: bool) -> None:
        if options.output_type != "both":
            raise RequestError("speaker: only speech has one; ask for output_type='both'")
        if voice:
            raise RequestError("voice: a speaker of Kokoro has its own; leave one of them out")
        voice_of(self.kokoro, options.speaker)

    def speak(self, text: str, options: Parameters, deadline: Deadline) -> Iterator[Event]:
        """``text`` in the voice of ``options.speaker``: see ``Kokoro.stream``."""
        voice = voice_of(self.kokoro, options.speaker)
        assert self.kokoro is not None, "it has the voice"
        return self.kokoro.stream(
            text,
            voice,
            options.speed,
            options.seed,
            check=deadline.check,
            call=self._kokoro_call,
        )

    @property
    def _kokoro_call(self) -> Call:
        """Has a sentence of Kokoro computed by the thread that may use its device.

        Of an accelerator that is the engine's, where running requests go on between two
        sentences. The cores of a CPU are shared.
        """
        shared = self.kokoro is None or self.kokoro.device.type == "cpu"
        return directly if shared else self.scheduler.call

    def encode_chat(
        self, messages: Sequence[Message], options: Parameters, clock: Stopwatch | None = None
    ) -> tuple[Prompt, Tensor | None]:
        """The prompt of a chat and the Whisper features [positions, dim] it refers to.

        A prompt that leaves no budget is refused before any encoder runs.
        """
        clock = clock or Stopwatch()
        waves = self.encoder.load(messages, options, clock)
        chat, _ = self.encoder.prepare(messages, waves, options, clock)
        return self.scheduler.call(lambda: self.encoder.encode_all([chat])[0])

    def generation(
        self, prompt: Prompt, features: Tensor | None, options: Parameters, randomness: Randomness
    ) -> Generation:
        """The answer to an encoded chat, to be generated alone, while no request is answered."""
        return Generation(
            self.decoder,
            self.encoder.decode_input(prompt, features),
            options.output_type,
            options.step_limit(len(prompt)),
            options.sampling,
            randomness,
            self.scheduler.poll_interval,
        )

    def _speech(self, request: Request) -> Speech | None:
        if request.options.output_type == "text":
            return None
        assert self.detokenizer is not None, "checked"
        noise = self._noise(request.randomness)
        return Speech(self.detokenizer, noise, request.options.preset, request.voice)

    def _spoken(self, request: Request, task: Task) -> SpokenAnswer | None:
        options = request.options
        if self.kokoro is None or not options.speaker:
            return None
        return SpokenAnswer(
            self.kokoro,
            voice_of(self.kokoro, options.speaker),
            options.speed,
            request.randomness,
            request.deadline.check,
            self._kokoro_call,
            task.events.put,
        )

    def _noise(self, randomness: Randomness) -> Callable[[int, int], Tensor]:
        assert self.detokenizer is not None, "checked"
        mel_bins = self.detokenizer.dit.config.mel_bins
        return lambda chunk, frames: randomness.noise(chunk, frames, mel_bins)


def surviving_out_of_memory(items: Generator[Item]) -> Generator[Item]:
    """``items``, whose lack of memory becomes a RequestOutOfMemory.

    Closing this iterator closes ``items``.
    """
    try:
        yield from items
        return
    except (RuntimeError, MemoryError) as error:
        failure = as_request_error(error)
        if failure is error:
            raise
    raise failure
