"""Step-Audio-EditX: say a text in the voice of a recording, or edit how a recording is spoken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kimia_infer.api.devices import parse_device, parse_dtype
from kimia_infer.api.events import AudioChunk, Completion, Event
from kimia_infer.api.request import Stopwatch
from kimia_infer.audio.files import Check
from kimia_infer.layers.sampler import MAX_SEED, SeededRandomness
from kimia_infer.models.step_audio_editx.checkpoint import load_networks
from kimia_infer.models.step_audio_editx.edits import Edit
from kimia_infer.models.step_audio_editx.packing import (
    GROUP,
    TOKENS_PER_SECOND,
)
from kimia_infer.models.step_audio_editx.prompts import PromptBuilder, speaker_name
from kimia_infer.models.step_audio_editx.reference import Reference, ReferenceReader, Source
from kimia_infer.models.step_audio_editx.sampling import AudioRange, generate
from kimia_infer.models.step_audio_editx.speech import Speech, in_chunks, in_one_piece
from kimia_infer.models.step_audio_editx.variants import VARIANTS, check_variant
from kimia_infer.utils.errors import RequestError

__all__ = ["VARIANTS", "Clone", "Edit", "EditX"]

LONGEST_POSITIONS = 8192
"""Of a prompt and its answer together, published call."""

SLOWEST = 3.0
"""An answer has at most this many times its expected length, plus this many seconds."""

FASTEST_SPEECH = 40.0
"""Characters a second; the quickest English has about 25."""


@dataclass(frozen=True)
class Clone:
    """``target`` is to be said in the voice of a recording, in which ``text`` is said."""

    text: str
    target: str


class EditX:
    """A loaded Step-Audio-EditX; several threads may use it.

    Args:
        directory: holds both published repositories, see ``models.step_audio_editx.layout``.
        device: by default the accelerator, else the CPU.
        dtype: of the language model, which does nearly all of the work; by default float32 on the
            CPU and bfloat16 elsewhere. The other networks are in float32.
        quantization: of its matrices, one of ``VARIANTS``: none, fp8, int8 and int4 as Kimi-Audio
            has them, bnb-int8 and bnb-nf4 by bitsandbytes.

    Raises:
        CheckpointError: the directory is not complete, or damaged.
        ConfigurationError: ``device`` is not there, ``dtype`` is another one than those two, or
            the quantization cannot be used there.
    """

    def __init__(
        self,
        directory: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        quantization: str = "none",
    ):
        place = parse_device(device)
        check_variant(quantization, place)
        weights = Path(directory)
        self.networks = load_networks(weights, place, parse_dtype(dtype, place), quantization)
        self._prompts = PromptBuilder(self.networks.tokenizer)
        self._references = ReferenceReader(self.networks)

    def clone(self, audio: Source, text: str, target: str, seed: int | None = None) -> Completion:
        """``target`` in the voice of ``audio``, in which ``text`` is said."""
        return self.answer(audio, Clone(text, target), seed)

    def edit(self, audio: Source, edit: Edit, seed: int | None = None) -> Completion:
        """``audio``, changed as ``edit`` says."""
        return self.answer(audio, edit, seed)

    def answer(
        self,
        audio: Source,
        task: Clone | Edit,
        seed: int | None = None,
        *,
        check: Check = lambda: None,
    ) -> Completion:
        """Carry out ``task``, its sound made in one piece as published; otherwise like stream."""
        *_, last = self._events(audio, task, seed, check, in_one_piece)
        assert isinstance(last, Completion)
        return last

    def stream(
        self,
        audio: Source,
        task: Clone | Edit,
        seed: int | None = None,
        *,
        check: Check = lambda: None,
    ) -> Iterator[Event]:
        """Carry out ``task``: an AudioChunk as soon as there is sound, others, then a Completion.

        The tokens are those of :meth:`answer`. Their sound is another one, since it begins before
        they are all known: see ``models.step_audio_editx.flow.MelStream``.

        Args:
            audio: a file of 0.5 to 30 seconds of one person, given by path or as its content.
            task: what to do with it.
            seed: of all random numbers, 0 .. 2**32 - 1; by default a random one.
            check: called between the stages of reading the recording, between tokens and within the
                making of sound; raises to end the request.

        Raises:
            RequestError: naming the field that cannot be used.
        """
        return self._events(audio, task, seed, check, in_chunks)

    def _events(
        self,
        audio: Source,
        task: Clone | Edit,
        seed: int | None,
        check: Check,
        divided: Callable[[Iterator[int]], Iterator[tuple[list[int], bool]]],
    ) -> Iterator[Event]:
        """Those of :meth:`stream`; ``divided`` makes the chunks that are spoken of the tokens."""
        if seed is not None and not 0 <= seed <= MAX_SEED:
            raise RequestError(f"seed: expected 0 .. {MAX_SEED}, found {seed}")
        randomness, notes, clock = SeededRandomness(seed), list[str](), Stopwatch()
        self._prompt(task, [], np.empty(0))  # refuses a bad task before sound is read
        with clock.timed("reference"):
            reference = self._references.read(audio, notes.append, check, clock.timed)
        _require_length(task.text, reference)
        with clock.timed("prompt"):
            prompt = self._prompt(task, reference.tokens, reference.ends)
        limit = longest_answer(task, reference, LONGEST_POSITIONS - len(prompt))
        generated = self._generate(prompt, limit, randomness, check)
        speech = Speech(self.networks, reference, randomness, check, clock.timed)
        rate, tokens, waves = self.networks.vocoder.config.sample_rate, list[int](), list[Tensor]()
        for chunk, last in divided(clock.timing("decode", generated)):
            tokens += chunk
            check()
            wave = speech.push(chunk, last)
            if len(wave):
                clock.first("first_audio")
                waves.append(wave)
                yield AudioChunk(wave, rate)
        wave, ended = torch.cat(waves), len(tokens) < limit
        metrics = {
            "stop_reason": "end" if ended else "limit",
            "seed": randomness.seed,
            "prompt_tokens": len(prompt),
            "audio_tokens": len(tokens),
            **clock.metrics,
            "total_seconds": time.perf_counter() - clock.started,
            "output_audio_seconds": len(wave) / rate,
        }
        if not ended:
            notes.append(f"the answer was cut at its limit of {limit / TOKENS_PER_SECOND:.1f} s")
        text = task.target if isinstance(task, Clone) else task.new_text or task.text
        ids = [self.networks.tokenizer.first_audio + token for token in tokens]
        yield Completion(wave[None], rate, text, [], ids, tokens, metrics, notes=notes)

    def _prompt(self, task: Clone | Edit, tokens: list[int], ends: np.ndarray) -> list[int]:
        """Ids of the prompt for a reference of audio ``tokens`` and the ``ends`` of its wave."""
        if isinstance(task, Edit):
            return self._prompts.edit(task, tokens)
        return self._prompts.clone(speaker_name(task.text, ends), task.text, tokens, task.target)

    def _generate(
        self, prompt: list[int], limit: int, randomness: SeededRandomness, check: Check
    ) -> Iterator[int]:
        """The audio tokens of an answer."""
        tokenizer, uniforms = self.networks.tokenizer, randomness.uniforms("audio", limit)
        audio = AudioRange(tokenizer.first_audio, tokenizer.turn_end)
        ids = generate(self.networks.language_model, prompt, uniforms, tokenizer.turn_end, audio)
        for found in ids:
            check()
            yield found - tokenizer.first_audio


def longest_answer(task: Clone | Edit, reference: Reference, room: int) -> int:
    """Audio tokens that an answer may have, in whole groups; at most ``room``.

    Raises RequestError for a text that is expected to take more.
    """
    expected = reference.seconds
    field = "target" if isinstance(task, Clone) else "new_text"
    said = getattr(task, field)
    if said:
        expected *= len(said) / len(task.text)
    if expected * TOKENS_PER_SECOND > room:
        raise RequestError(
            f"{field}: about {expected:.0f} s of speech, more than the "
            f"{max(0, room) / TOKENS_PER_SECOND:.0f} s that an answer can have; send it in parts"
        )
    longest = (SLOWEST * expected + SLOWEST) * TOKENS_PER_SECOND
    return min(int(longest), room) // GROUP * GROUP


def _require_length(text: str, reference: Reference) -> None:
    """Raise RequestError for more text than a recording can hold."""
    if len(text) > FASTEST_SPEECH * reference.seconds:
        raise RequestError(
            f"text: {len(text)} characters in {reference.seconds:.1f} s of speech; expected the "
            "words of the recording"
        )
