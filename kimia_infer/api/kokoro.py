"""Kokoro: text to speech in a chosen voice, sentence by sentence."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from kimia_infer.api.events import AudioChunk, Completion, Event, WordTime
from kimia_infer.api.loading import default_device
from kimia_infer.layers.sampler import MAX_SEED, SeededRandomness
from kimia_infer.models.kokoro.checkpoint import load_network
from kimia_infer.models.kokoro.config import HARMONICS, SAMPLE_RATE
from kimia_infer.models.kokoro.network import batch_of
from kimia_infer.models.kokoro.phonemes.reading import Sentence, read_phonemes, read_text
from kimia_infer.models.kokoro.voices import Voices, language_of, parse_voice
from kimia_infer.utils.errors import RequestError

DEFAULT_VOICE = "af_heart"
MIN_SPEED, MAX_SPEED = 0.25, 4.0
FRAMES_PER_SECOND = 40


class Kokoro:
    """A loaded Kokoro; several threads may use it.

    Args:
        directory: a checkpoint directory, see ``scripts/download_weights --model kokoro``.
        device: by default the accelerator, else the CPU.
        dtype: of the decoder, which does nearly all of the work; float32 by default. bfloat16 is
            faster where the device has instructions for it. Durations are always those of float32.
        lexicon: phonemes of words, written in small letters, for every text.
        adapter: the name of an adapter of its prosody in ``adapters`` of the directory.

    Raises:
        CheckpointError: the directory is not complete or holds another model, or the adapter is
            not there or does not fit.
    """

    def __init__(
        self,
        directory: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        lexicon: Mapping[str, str] | None = None,
        adapter: str | None = None,
    ):
        place = default_device() if device is None else torch.device(device)
        self.network = load_network(Path(directory), place, dtype, adapter)
        config = self.network.config
        self.voices = Voices(Path(directory), 2 * config.style_dim)
        self._lexicon = dict(lexicon or {})

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
    ) -> Iterator[Event]:
        """Speak ``text`` or ``phonemes``: an AudioChunk for each sentence, then a Completion.

        Args:
            text: read with espeak-ng. ``[word](/phonemes/)`` says how a word is spoken.
            voice: a name, or a mixture such as ``af_heart:0.7+am_michael:0.3``.
            speed: divides all durations, 0.25 .. 4.
            seed: of the noise in the voice, 0 .. 2**32 - 1; by default drawn.
            phonemes: spoken as they are, instead of a text.
            language: of the text; by default that of the voice.
            noise: False leaves the noise out, so that the wave depends on nothing drawn.
            check: called before each sentence; raises to end the request.

        Raises:
            RequestError: naming the argument, before the first event or where a text turns out
                to have nothing that can be spoken.
        """
        self._require(text, voice, speed, seed, phonemes)
        randomness = SeededRandomness(seed)
        start, waves, words, first = time.perf_counter(), [], [], None
        samples = 0
        for index, sentence in enumerate(self._sentences(text, phonemes, voice, language)):
            check()
            wave, times = self._speak(sentence, voice, speed, index, randomness if noise else None)
            chunk = AudioChunk(wave, SAMPLE_RATE, _shifted(times, samples / SAMPLE_RATE))
            first = first or time.perf_counter() - start
            samples += len(wave)
            waves.append(wave)
            words.extend(chunk.words)
            yield chunk
        metrics = {
            "stop_reason": "end",
            "sentences": len(waves),
            "seed": randomness.seed,
            "first_audio_seconds": first,
            "seconds": time.perf_counter() - start,
        }
        wav = torch.cat(waves)[None]
        yield Completion(wav, SAMPLE_RATE, text, [], [], [], metrics)

    def speak(self, text: str = "", voice: str = DEFAULT_VOICE, **options: object) -> Completion:
        """The whole of :meth:`stream` at once."""
        *_, last = self.stream(text, voice, **options)  # pyrefly: ignore[bad-argument-type]
        assert isinstance(last, Completion)
        return last

    def _require(
        self, text: str, voice: str, speed: float, seed: int | None, phonemes: str
    ) -> None:
        if bool(text) == bool(phonemes):
            raise RequestError("text: expected a text or phonemes to speak, and not both")
        if not MIN_SPEED <= speed <= MAX_SPEED:
            raise RequestError(f"speed: expected {MIN_SPEED} .. {MAX_SPEED}, found {speed}")
        if seed is not None and not 0 <= seed <= MAX_SEED:
            raise RequestError(f"seed: expected 0 .. {MAX_SEED}, found {seed}")
        parse_voice(voice, self.voices.names)

    def _sentences(
        self, text: str, phonemes: str, voice: str, language: str | None
    ) -> Iterator[Sentence]:
        config = self.network.config
        if phonemes:
            return read_phonemes(phonemes, config.vocab, config.max_phonemes)
        spoken = language or language_of(voice)
        return read_text(text, spoken, config.vocab, config.max_phonemes, self._lexicon)

    @torch.inference_mode()
    def _speak(
        self,
        sentence: Sentence,
        voice: str,
        speed: float,
        index: int,
        randomness: SeededRandomness | None,
    ) -> tuple[torch.Tensor, list[WordTime]]:
        """The wave float32 [samples] of a sentence on the CPU, and its words from its begin on."""
        network, device = self.network, self.network.device
        ids, rows = batch_of([[network.config.vocab[s] for s in sentence.phonemes]], device)
        style = self.voices.style(voice, len(sentence.phonemes)).to(device)[None]
        prosody = network.prosody(ids, style, torch.tensor([speed], device=device), rows)
        noise = None
        if randomness is not None:
            drawn = randomness

            def noise(row: int, samples: int) -> torch.Tensor:
                return drawn.noise(index, samples, HARMONICS)

        (wave,) = network.waves(prosody, style, noise)
        ends = [0, *prosody.durations[0].cumsum(0).tolist()]
        times = [
            WordTime(
                word.text,
                ends[word.start + 1] / FRAMES_PER_SECOND,
                ends[word.end + 1] / FRAMES_PER_SECOND,
            )
            for word in sentence.words
        ]
        return wave.clamp(-1, 1).cpu(), times


def _shifted(words: list[WordTime], seconds: float) -> tuple[WordTime, ...]:
    return tuple(WordTime(w.text, w.start + seconds, w.end + seconds) for w in words)
