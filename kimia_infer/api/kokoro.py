"""Kokoro: text to speech in a chosen voice, sentence by sentence."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from kimia_infer.api.devices import parse_device
from kimia_infer.api.events import AudioChunk, Completion, Event, WordTime
from kimia_infer.layers.operators import has_bfloat16
from kimia_infer.layers.sampler import MAX_SEED, Randomness, SeededRandomness
from kimia_infer.models.kokoro.checkpoint import load_network
from kimia_infer.models.kokoro.config import HARMONICS, SAMPLE_RATE
from kimia_infer.models.kokoro.network import batch_of
from kimia_infer.models.kokoro.phonemes.reading import Sentence, read_phonemes, read_text
from kimia_infer.models.kokoro.phonemes.sources import Phonemizer, source_of
from kimia_infer.models.kokoro.voices import Voices, language_of, parse_voice
from kimia_infer.utils.errors import ConfigurationError, RequestError

DEFAULT_VOICE = "af_heart"
MIN_SPEED, MAX_SPEED = 0.25, 4.0
FRAMES_PER_SECOND = 40

WORKING_BYTES = 1_000_000_000
"""What the longest sentence needs while it is computed, some 35 s at the usual speed: 27 MB for
each second of speech, measured on a CPU."""

Result = TypeVar("Result")


class Call(Protocol):
    """Has a function called by a thread that may use the device, and returns its result."""

    def __call__(self, function: Callable[[], Result], /) -> Result: ...


def directly(function: Callable[[], Result]) -> Result:
    """What ``function`` returns, computed by the thread that asks."""
    return function()


class Kokoro:
    """A loaded Kokoro; several threads may use it, and it speaks one sentence at a time.

    Args:
        directory: a checkpoint directory, see ``scripts/download_weights --model kokoro``.
        device: by default the accelerator, else the CPU.
        dtype: of the decoder, which does nearly all of the work; by default bfloat16 on a CPU that
            has instructions for it, where it takes two thirds of the time, else float32.
            Durations are always those of float32.
        lexicon: phonemes of words, written in small letters, for every text.
        adapter: an adapter of its prosody: the name of one in ``adapters`` of the directory, or
            another directory.
        phonemizer: who reads English texts: ``espeak``, or ``misaki``, which has to be installed.

    Raises:
        RequestError: misaki is asked for and not installed.
        CheckpointError: the directory is not complete or holds another model, or the adapter is
            not there or does not fit.
    """

    def __init__(
        self,
        directory: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        lexicon: Mapping[str, str] | None = None,
        adapter: str | None = None,
        phonemizer: Phonemizer = "espeak",
    ):
        source_of("en-us", phonemizer)  # raises now, not at the first text
        place = parse_device(device)
        if dtype is None:
            dtype = torch.bfloat16 if has_bfloat16(place) else torch.float32
        self.network = load_network(Path(directory), place, dtype, adapter)
        config = self.network.config
        self.voices = Voices(Path(directory), 2 * config.style_dim)
        self._lexicon, self._phonemizer = dict(lexicon or {}), phonemizer
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        return self.network.device

    def stream(
        self,
        text: str = "",
        voice: str = DEFAULT_VOICE,
        speed: float = 1.0,
        seed: int | None = None,
        *,
        phonemes: str = "",
        language: str | None = None,
        noise: bool = True,
        check: Callable[[], None] = lambda: None,
        call: Call = directly,
    ) -> Iterator[Event]:
        """Speak ``text`` or ``phonemes``: an AudioChunk for each sentence, then a Completion.

        Args:
            text: read as docs/kokoro.md says. ``[word](/phonemes/)`` says how a word is spoken.
            voice: a name, or a mixture such as ``af_heart:0.7+am_michael:0.3``.
            speed: divides all durations, 0.25 .. 4.
            seed: of the noise in the voice, 0 .. 2**32 - 1; by default drawn.
            phonemes: spoken as they are, instead of a text.
            language: of the text; by default that of the voice.
            noise: False leaves the noise out, so that the wave depends on nothing drawn.
            check: called before each sentence; raises to end the request.
            call: has each sentence computed, by the thread that owns the device.

        Raises:
            RequestError: naming the argument, before the first event or where a text turns out
                to have nothing that can be spoken.
        """
        if bool(text) == bool(phonemes):
            raise RequestError("text: expected a text or phonemes to speak, and not both")
        self.require(voice, speed, seed)
        if phonemes:
            config = self.network.config
            sentences = read_phonemes(phonemes, config.vocab, config.max_phonemes)
        else:
            sentences = self.read(text, language or language_of(voice))
        randomness = SeededRandomness(seed)
        drawn = randomness if noise else None
        start, waves, first = time.perf_counter(), [], None
        for chunk in self.chunks(sentences, voice, speed, drawn, check, call):
            first = first or time.perf_counter() - start
            waves.append(chunk.wav)
            yield chunk
        metrics = {
            "stop_reason": "end",
            "sentences": len(waves),
            "seed": randomness.seed,
            "first_audio_seconds": first,
            "total_seconds": time.perf_counter() - start,
        }
        wav = torch.cat(waves)[None]
        metrics["output_audio_seconds"] = wav.shape[1] / SAMPLE_RATE
        yield Completion(wav, SAMPLE_RATE, text, [], [], [], metrics)

    def speak(self, text: str = "", voice: str = DEFAULT_VOICE, **options: object) -> Completion:
        """The whole of :meth:`stream` at once."""
        *_, last = self.stream(text, voice, **options)  # pyrefly: ignore[bad-argument-type]
        assert isinstance(last, Completion)
        return last

    def require(self, voice: str, speed: float = 1.0, seed: int | None = None) -> None:
        """Raise RequestError, naming the argument, for what :meth:`stream` refuses."""
        if not MIN_SPEED <= speed <= MAX_SPEED:
            raise RequestError(f"speed: expected {MIN_SPEED} .. {MAX_SPEED}, found {speed}")
        if seed is not None and not 0 <= seed <= MAX_SEED:
            raise RequestError(f"seed: expected 0 .. {MAX_SEED}, found {seed}")
        parse_voice(voice, self.voices.names)

    def read(self, text: str | Iterable[str], language: str) -> Iterator[Sentence]:
        """The sentences of a text, or of its pieces as they come; see ``read_text``."""
        vocab, longest = self.network.config.vocab, self.network.config.max_phonemes
        return read_text(text, language, vocab, longest, self._lexicon, self._phonemizer)

    def chunks(
        self,
        sentences: Iterable[Sentence],
        voice: str,
        speed: float,
        randomness: Randomness | None,
        check: Callable[[], None] = lambda: None,
        call: Call = directly,
    ) -> Iterator[AudioChunk]:
        """A chunk for each of ``sentences``; the other arguments are those of :meth:`stream`."""
        samples = 0
        for index, sentence in enumerate(sentences):
            speak = partial(self._speak, sentence, voice, speed, index, randomness, check)
            wave, words = call(speak)
            yield AudioChunk(wave, SAMPLE_RATE, _shifted(words, samples / SAMPLE_RATE))
            samples += len(wave)

    @torch.inference_mode()
    def _speak(
        self,
        sentence: Sentence,
        voice: str,
        speed: float,
        index: int,
        randomness: Randomness | None,
        check: Callable[[], None],
    ) -> tuple[torch.Tensor, list[WordTime]]:
        """The wave float32 [samples] of a sentence on the CPU, and its words with times in it."""
        network, device = self.network, self.network.device
        noise = None
        if randomness is not None:
            drawn = randomness

            def noise(row: int, samples: int) -> torch.Tensor:
                return drawn.noise(index, samples, HARMONICS)

        with self._lock:
            check()  # the others before it may have taken long
            ids, rows = batch_of([[network.config.vocab[s] for s in sentence.phonemes]], device)
            style = self.voices.style(voice, len(sentence.phonemes)).to(device)[None]
            prosody = network.prosody(ids, style, torch.tensor([speed], device=device), rows)
            (wave,) = network.waves(prosody, style, noise)
            wave = wave.clamp(-1, 1).cpu()
        ends = [0, *prosody.durations[0].cumsum(0).tolist()]
        times = [
            WordTime(
                word.text,
                ends[word.start + 1] / FRAMES_PER_SECOND,
                ends[word.end + 1] / FRAMES_PER_SECOND,
            )
            for word in sentence.words
        ]
        return wave, times


def load_kokoro(
    kokoro: Kokoro | str | os.PathLike[str] | None, device: torch.device, adapter: str | None
) -> Kokoro | None:
    """The Kokoro for the voices of answers, unless it is None or loaded already.

    ``"auto"`` is the one in the cache, which is fetched if need be. ``adapter`` is that of a
    Kokoro that is loaded here.

    Raises ConfigurationError for an ``adapter`` where none is loaded here, CheckpointError, and
    WeightsError if it cannot be fetched.
    """
    if adapter is not None and kokoro is None:
        raise ConfigurationError("kokoro_adapter: needs kokoro, its directory or 'auto'")
    if adapter is not None and isinstance(kokoro, Kokoro):
        raise ConfigurationError(
            "kokoro_adapter: this Kokoro is loaded already; pass the adapter to Kokoro itself"
        )
    if kokoro is None or isinstance(kokoro, Kokoro):
        return kokoro
    if kokoro == "auto":
        from kimia_infer.models.kokoro.packages import obtain_kokoro

        kokoro = obtain_kokoro()
    return Kokoro(Path(kokoro), device, adapter=adapter)


def _shifted(words: list[WordTime], seconds: float) -> tuple[WordTime, ...]:
    return tuple(WordTime(w.text, w.start + seconds, w.end + seconds) for w in words)
