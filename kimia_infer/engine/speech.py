"""Speech while it is generated: codes are cut into chunks, and chunks that wait become sound.

Whose listener would run dry first goes first.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kimia_infer.models.kimi_audio.detokenizer import (
    FIRST_CHUNKS,
    ChunkJob,
    Detokenizer,
    Noise,
    SpeechStream,
    Voice,
)
from kimia_infer.utils.errors import as_request_error

log = logging.getLogger(__name__)


class Speech:
    """The speech of one answer: a growing sequence of codes, cut into chunks.

    A chunk is ready when the code after it is known, so that the last one can be marked final, as
    published. ``voice`` is the reference voice of all of it. ``seconds`` is the time that its
    chunks took to compute, with those that were computed together.
    """

    def __init__(
        self, detokenizer: Detokenizer, noise: Noise, preset: str, voice: Voice | None = None
    ):
        self._detokenizer, self._noise, self._voice = detokenizer, noise, voice
        self._stream: SpeechStream | None = None
        self._first_sizes = FIRST_CHUNKS[preset]
        self._usual_size = detokenizer.config.chunk_codes
        self._cut = 0
        self._pending: list[int] = []
        self._ready: deque[tuple[list[int], bool]] = deque()
        self._since = 0.0  # when the first of these became ready
        self._heard_until: float | None = None
        self.seconds = 0.0
        self.computing = False

    def feed(self, codes: Sequence[int]) -> None:
        """Take the next codes."""
        self._pending += codes
        while len(self._pending) > (size := self._size(self._cut)):
            self._add(self._pending[:size], final=False)
            self._pending = self._pending[size:]

    def finish(self) -> None:
        """There are no more codes: the rest is the final chunk."""
        if self._pending:
            self._add(self._pending, final=True)
            self._pending = []

    def _add(self, codes: list[int], final: bool) -> None:
        if not self._ready:
            self._since = time.monotonic()
        self._ready.append((codes, final))
        self._cut += 1

    def missing(self, ahead: int = 0) -> int:
        """Codes until a chunk is ready: the rest of it and the one after it.

        The first such number that is more than ``ahead``.
        """
        chunk = self._cut
        missing = self._size(chunk) + 1 - len(self._pending)
        while missing <= ahead:
            chunk += 1
            missing += self._size(chunk)
        return missing

    def _size(self, chunk: int) -> int:
        return self._first_sizes[chunk] if chunk < len(self._first_sizes) else self._usual_size

    @property
    def waiting(self) -> bool:
        """Whether a chunk can be computed now."""
        return bool(self._ready) and not self.computing

    @property
    def busy(self) -> bool:
        """Whether a chunk is ready or being computed."""
        return bool(self._ready) or self.computing

    @property
    def heard(self) -> bool:
        """Whether any sound was made yet."""
        return self._heard_until is not None

    @property
    def needed(self) -> float:
        """When the next chunk is needed, by the monotonic clock.

        That is when all that was made has been played; for a first chunk, since it is ready.
        """
        return self._since if self._heard_until is None else self._heard_until

    @property
    def next_size(self) -> int:
        """Codes of the next chunk, with those that wait in the stream."""
        held = 0 if self._stream is None else len(self._stream.mel_stream.pending)
        return held + len(self._ready[0][0])

    def next_job(self) -> ChunkJob:
        """The next chunk, which is to be computed now."""
        self.computing = True
        codes, final = self._ready.popleft()
        self._since = time.monotonic()
        if self._stream is None:
            self._stream = self._detokenizer.start(self._noise)
            if self._voice is not None:
                self._stream.prefill(*self._voice)
        return ChunkJob(self._stream, codes, final)

    def made(self, wave: Tensor, seconds: float) -> None:
        """The wave [samples] of the chunk was made, in so many seconds."""
        self.computing = False
        self.seconds += seconds
        if len(wave):
            begins = time.monotonic()
            if self._heard_until is not None:
                begins = max(begins, self._heard_until)
            self._heard_until = begins + len(wave) / self._detokenizer.sample_rate

    def close(self) -> None:
        """Drop what is still in it."""
        self._ready.clear()
        if self._stream is not None:
            self._stream.close()


@dataclass(frozen=True)
class Batch:
    """Chunks that are being computed: whose they are, and how to get their waves."""

    speeches: list[Speech]
    started: float
    done: Callable[[], bool]
    waves: Callable[[], list[Tensor]]


class Synthesizer:
    """Computes chunks of several answers together, one batch at a time.

    Where graphs are captured, a batch runs beside the decode steps, in the CUDA stream of the
    detokenizer; elsewhere it is computed at once.
    """

    def __init__(self, detokenizer: Detokenizer):
        self.detokenizer = detokenizer
        self._batch: Batch | None = None

    @property
    def awaited(self) -> bool:
        """Whether a batch is being computed and not done."""
        return self._batch is not None and not self._batch.done()

    @torch.inference_mode()
    def start(self, speeches: Iterable[Speech]) -> dict[Speech, BaseException]:
        """Begin to compute a chunk of each of those that need theirs first.

        Returns those that failed. What fails together is computed one by one, so that whoever is
        not to blame goes on.
        """
        waiting = sorted((s for s in speeches if s.waiting), key=lambda speech: speech.needed)
        if self._batch is not None or not waiting:
            return {}
        chosen = waiting[: self.detokenizer.fitting([speech.next_size for speech in waiting])]
        failed: dict[Speech, BaseException] = {}
        jobs: dict[Speech, ChunkJob] = {}
        started = time.perf_counter()
        with self.detokenizer.graphs.stream():
            for speech in chosen:
                try:
                    jobs[speech] = speech.next_job()
                except Exception as error:
                    failed[speech] = as_request_error(error)
            waves = self._compute(jobs, failed)
            if waves:
                self._copy(waves, started, failed)
        return failed

    def _compute(
        self, jobs: dict[Speech, ChunkJob], failed: dict[Speech, BaseException]
    ) -> dict[Speech, Tensor]:
        """The waves of those that do not fail."""
        if len(jobs) > 1:
            try:
                made = self.detokenizer.push_together(list(jobs.values()))
                return dict(zip(jobs, made, strict=True))
            except Exception as error:  # not kept, since it holds what was computed
                log.warning("%d chunks could not be computed together (%s)", len(jobs), error)
        waves: dict[Speech, Tensor] = {}
        for speech, job in jobs.items():
            try:
                (waves[speech],) = self.detokenizer.push_together([job])
            except Exception as error:
                failed[speech] = as_request_error(error)
        return waves

    def _copy(
        self, waves: dict[Speech, Tensor], started: float, failed: dict[Speech, BaseException]
    ) -> None:
        """Begin to copy the waves to the host."""
        try:
            copied = self.detokenizer.graphs.copy_to_host(torch.cat(list(waves.values())))
        except Exception as error:
            failed |= dict.fromkeys(waves, as_request_error(error))
            return
        lengths = [len(wave) for wave in waves.values()]
        self._batch = Batch(
            list(waves), started, copied.done, lambda: list(copied.wait().split(lengths))
        )

    def finished(self) -> Iterator[tuple[Speech, Tensor]]:
        """The waves float32 [samples], on the CPU, of a batch that is done."""
        batch = self._batch
        if batch is None or not batch.done():
            return
        self._batch = None
        waves = batch.waves()
        seconds = time.perf_counter() - batch.started
        for speech, wave in zip(batch.speeches, waves, strict=True):
            speech.made(wave, seconds)
            yield speech, wave


def speak(
    detokenizer: Detokenizer,
    codes: Sequence[int],
    noise: Noise,
    preset: str,
    voice: Voice | None = None,
) -> Iterator[Tensor]:
    """The waves float32 [samples], on the CPU, of the chunks of known codes."""
    speech, synthesizer = Speech(detokenizer, noise, preset, voice), Synthesizer(detokenizer)
    speech.feed(codes)
    speech.finish()
    try:
        while speech.busy:
            for error in synthesizer.start([speech]).values():
                raise error
            yield from (wave for _, wave in synthesizer.finished())
    finally:
        speech.close()
