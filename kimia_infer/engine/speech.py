"""Speech while codes are still being generated, chunk by chunk."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from kimia_infer.audio.mel import Voice
from kimia_infer.models.kimi_audio.detokenizer import Detokenizer, Noise, SpeechStream

# Codes per chunk. ``quality`` is the published chunking. ``low_latency`` begins with 4 codes
# and the 12 of look-ahead that they need, and grows so that each chunk is ready in time.
FIRST_CHUNKS = {"quality": (), "low_latency": (16, 8, 16)}
PRESETS = tuple(FIRST_CHUNKS)


class SpeechPipeline:
    """Cuts a growing sequence of codes in chunks and has each synthesized.

    A chunk goes out when the code after it is known, so that the last one can be marked final
    as published. In the ``background``, synthesis runs on a thread beside generation, in the
    detokenizer's lane; on the CPU, where both would fight for the same cores, within
    :meth:`feed`. ``seconds`` is what synthesis has taken so far. With a ``voice``, all of it
    is spoken in that voice.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        noise: Noise,
        preset: str,
        background: bool,
        voice: Voice | None = None,
    ):
        self._detokenizer, self._noise, self._voice = detokenizer, noise, voice
        self._stream: SpeechStream | None = None
        self._failed = False
        self._first_sizes = FIRST_CHUNKS[preset]
        self._usual_size = detokenizer.config.chunk_codes
        self._submitted = 0
        self._pending: list[int] = []
        self._executor: Executor = ThreadPoolExecutor(1) if background else _Inline()
        self._chunks: deque[Future[Tensor]] = deque()
        self.seconds = 0.0

    def feed(self, codes: Sequence[int]) -> None:
        """Take the next codes; synthesize the chunks that they complete."""
        self._pending += codes
        while len(self._pending) > (size := self._size(self._submitted)):
            self._submit(self._pending[:size], final=False)
            self._pending = self._pending[size:]

    def missing(self, ahead: int = 0) -> int:
        """Codes until a chunk can go out: the rest of it and the one after it.

        The first such number that is more than ``ahead``.
        """
        chunk = self._submitted
        missing = self._size(chunk) + 1 - len(self._pending)
        while missing <= ahead:
            chunk += 1
            missing += self._size(chunk)
        return missing

    def _size(self, chunk: int) -> int:
        return self._first_sizes[chunk] if chunk < len(self._first_sizes) else self._usual_size

    def finish(self) -> None:
        """There are no more codes: the rest is the final chunk."""
        if self._pending:
            self._submit(self._pending, final=True)

    @property
    def busy(self) -> bool:
        """Whether a chunk went out whose wave has not been taken."""
        return bool(self._chunks)

    def ready(self) -> Iterator[Tensor]:
        """Waves float32 [samples], on the CPU, of the chunks that are done, without waiting."""
        while self._chunks and self._chunks[0].done():
            yield self._chunks.popleft().result()

    def rest(self) -> Iterator[Tensor]:
        """The waves of all chunks that are left, waiting for each."""
        while self._chunks:
            yield self._chunks.popleft().result()

    def close(self) -> None:
        """Drop what is queued and wait for the chunk in progress.

        After a failure, what the stream worked with is not used again.
        """
        self._executor.shutdown(wait=True, cancel_futures=True)
        if self._stream is not None and not self._failed:
            self._stream.close()

    def _submit(self, codes: list[int], final: bool) -> None:
        self._chunks.append(self._executor.submit(self._synthesize, codes, final))
        self._submitted += 1

    def _synthesize(self, codes: list[int], final: bool) -> Tensor:
        start = time.perf_counter()
        # A thread of its own has its own mode.
        with torch.inference_mode(), self._detokenizer.graphs.stream():
            wave = self._push(codes, final).cpu()
        self.seconds += time.perf_counter() - start
        return wave

    def _push(self, codes: list[int], final: bool) -> Tensor:
        if self._failed:
            raise RuntimeError("an earlier chunk of this speech has failed")
        self._failed = True  # until this chunk is done
        if self._stream is None:
            self._stream = self._start()
        wave = self._stream.push(codes, final)
        self._failed = False
        return wave

    def _start(self) -> SpeechStream:
        stream = self._detokenizer.start(self._noise)
        if self._voice is not None:
            stream.prefill(*self._voice)
        return stream


def warm_up(detokenizer: Detokenizer) -> None:
    """Record what speech of both presets needs, so that no request has to wait for it.

    Speaks until the cache of past frames is full, which meets every usual size. Only a last
    chunk of an unusual one is recorded when it comes. Does nothing where nothing is recorded.
    """
    if not detokenizer.graphs.captures:
        return
    config, mel_bins = detokenizer.config, detokenizer.dit.config.mel_bins
    past_codes = -(-config.cache_frames // config.frames_per_code)
    # One chunk fills the cache, the next one is spoken with it, and it needs a code after it.
    codes = [0] * (past_codes + config.look_ahead_codes + 2 * config.chunk_codes + 1)
    for preset in PRESETS:
        pipeline = SpeechPipeline(
            detokenizer, lambda _, frames: torch.zeros(frames, mel_bins), preset, background=False
        )
        pipeline.feed(codes)
        pipeline.close()


class _Inline(Executor):
    """Runs what is submitted at once, on the caller's thread."""

    def submit(self, function: Callable, /, *arguments: Any, **keywords: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*arguments, **keywords))
        return future
