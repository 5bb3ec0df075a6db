"""Codes to a wave, chunk by chunk, or all at once with the same result.

An ODE leads from noise to the mel frames of a chunk, which the vocoder turns into a wave. The last
codes of a chunk are only a look-ahead: their frames are computed, so that the frames before them
are made for what follows, but dropped and computed again with the next chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.models.kimi_audio.dit import DiT
from kimia_infer.models.kimi_audio.flow import (
    RECORDED_ROWS,
    Chunk,
    FlowNetwork,
    Past,
    Solution,
    StreamConfig,
)
from kimia_infer.models.kimi_audio.vocoder import (
    BatchedVocoder,
    Vocoder,
    WaveOverlap,
    released_frames,
)
from kimia_infer.utils.graphs import Graphs, graphs_for

Noise = Callable[[int, int], Tensor]

# Codes of the first chunks. ``quality`` is the published chunking. ``low_latency`` begins with 4
# codes and the 12 of look-ahead that they need, and grows so that each chunk is ready in time.
FIRST_CHUNKS = {"quality": (), "low_latency": (16, 8, 16)}
PRESETS = tuple(FIRST_CHUNKS)

EAGER_ROWS, EAGER_CODES = 4, 20
"""Chunks that are computed together where operations are launched one by one, and the most codes
of each. On a CPU four chunks of 16 codes take 0.8 times as long together as one by one. Four full
ones take 0.97 times as long, for which the first listener would wait four times as long."""


def recorded_rows(streams: int | None) -> tuple[int, ...]:
    """Numbers of chunks that are recorded together where there are ``streams`` at a time."""
    return tuple(rows for rows in RECORDED_ROWS if streams is None or rows <= streams)


class Voice(NamedTuple):
    """A reference voice, see :meth:`SpeechStream.prefill`.

    ``mel`` fp32 [frames, mel_bins]; ``tokens`` int64 [frames], one code per mel frame.
    """

    mel: Tensor
    tokens: Tensor


class MelStream:
    """The mel side of one stream.

    ``noise(chunk, frames)`` gives the start of chunk number ``chunk``, fp32 [frames, mel_bins].
    State: ``pending`` codes (the look-ahead), the ``past``, the ``position`` of the next frame and
    the number of ``chunks`` made.
    """

    def __init__(self, network: FlowNetwork, noise: Noise):
        self.network, self.noise, self.config = network, noise, network.config
        self.chunks = 0
        self.clear()

    def chunk(self, codes: Sequence[int], final: bool) -> Chunk | None:
        """What the next codes make ready to compute, less the look-ahead unless ``final``.

        None for codes that do not reach beyond the look-ahead. Changes nothing.
        """
        codes = [*self.pending, *codes]
        kept = len(codes) if final else len(codes) - self.config.look_ahead_codes
        if kept <= 0:
            return None
        noise = self._noise(len(codes) * self.config.frames_per_code)
        return Chunk(codes, kept, self.position, self.past, noise, continues=not final)

    def advance(self, codes: Sequence[int], final: bool, solution: Solution | None) -> None:
        """Go on behind the :meth:`chunk` of these codes, None if there was none."""
        self.pending = [*self.pending, *codes]
        if solution is None:
            return
        frames, past = solution
        self.pending = self.pending[len(frames) // self.config.frames_per_code :]
        self.chunks += 1
        self.position += len(frames)
        if final:
            self.clear()
        elif past is None or self.position + 2 * len(frames) > self.config.position_limit:
            self.position, self.past = self._beginning  # behind the reference voice, if any
        else:
            self.past = past

    def clear(self) -> None:
        """Forget everything, the reference voice too."""
        self.pending = []
        self._beginning = self.position, self.past = 0, Past.nothing(self.network.dit)

    def _noise(self, frames: int) -> Tensor:
        noise = self.noise(self.chunks, frames)
        expected = (frames, self.network.dit.config.mel_bins)
        if noise.shape != expected:
            raise ValueError(
                f"noise of chunk {self.chunks} has shape {list(noise.shape)}, "
                f"expected {list(expected)}"
            )
        return noise

    def prefill(self, mel: Tensor, tokens: Tensor) -> None:
        """Continue in the voice of mel [frames, mel_bins], whose codes are int64 [tokens].

        ``tokens`` has one code per mel frame; as published, the mel is cut or padded with zeros
        to its length, and the frames that do not fill whole chunks come first, in one piece.
        """
        config, dit = self.config, self.network.dit
        mel = mel[: len(tokens)]
        mel = F.pad(mel, (0, 0, 0, len(tokens) - len(mel)))
        x = (mel - dit.config.mel_mean) / dit.config.mel_std
        x = self.network.graphs.upload(x.to(dit.dtype), dit.device)
        chunks = min(len(tokens) // config.voice_chunk_frames, config.voice_chunks)
        rest = len(tokens) - chunks * config.voice_chunk_frames
        sizes = [rest] * (rest > 0) + [config.voice_chunk_frames] * chunks
        position, past = 0, self.past
        for part, codes in zip(x.split(sizes), tokens.split(sizes), strict=True):
            past = self.network.read(part, codes, position, past)
            position += len(part)
        self._beginning = self.position, self.past = position, past


class SpeechStream:
    """One utterance on its way from codes to sound; made by :meth:`Detokenizer.start`.

    ``mel`` [frames, mel_bins] is the mel of the last chunk, ``mel_stream`` and ``overlap`` hold
    the state, all of which belongs to this stream alone.
    """

    def __init__(self, detokenizer: Detokenizer, noise: Noise):
        self.mel_stream = MelStream(detokenizer.network, noise)
        self.overlap = WaveOverlap(detokenizer.vocoder)
        self.mel: Tensor | None = None
        self._detokenizer, self._config = detokenizer, detokenizer.config
        self._ended = False

    def close(self) -> None:
        """End the stream and drop what is still in it."""
        self._ended = True
        self.mel_stream.clear()

    def push(self, codes: Sequence[int] | Tensor, final: bool) -> Tensor:
        """Take the next n codes as one chunk; return the wave fp32 [samples] it releases.

        ``n`` is at most ``chunk_codes`` and may be 0 with ``final``, which ends the stream and
        releases all the rest. Codes that do not reach beyond the look-ahead release nothing yet.
        Raises ValueError for codes that cannot be spoken and RuntimeError after the end.
        """
        return self._detokenizer.push_together([ChunkJob(self, codes, final)])[0]

    def check(self, codes: Sequence[int] | Tensor, final: bool) -> list[int]:
        """The codes on the host. Raises what :meth:`push` would; changes nothing."""
        if self._ended:
            raise RuntimeError("this speech stream has ended; start another one")
        codes = _checked(codes, self.mel_stream.network.dit.config.codes)
        if len(codes) > self._config.chunk_codes:
            raise ValueError(
                f"a chunk takes at most {self._config.chunk_codes} codes, found {len(codes)}"
            )
        waiting = len(self.mel_stream.pending) or len(self.overlap.mel)
        if final and not (len(codes) or waiting):
            raise ValueError("there are no speech codes to speak")
        return codes

    def advance(self, result: ChunkResult, codes: Sequence[int], final: bool) -> Tensor:
        """Go on behind a chunk that was computed; the wave fp32 [samples] that it releases."""
        self.mel_stream.advance(codes, final, result.solution)
        self.mel = result.mel
        if result.joined is None or result.wave is None:
            wave = self.overlap.wave[:0]
        else:
            wave = self.overlap.release(result.joined, result.wave, final)
        if final:
            self.close()
        return wave.float()

    @torch.no_grad()
    def prefill(self, mel: Tensor, tokens: Sequence[int] | Tensor) -> None:
        """Speak in a reference voice; only possible before the first codes.

        mel fp32 [frames, mel_bins], natural logarithm (``log_mel`` of the voice at 24 kHz);
        tokens are the voice's n codes at the mel's 50 per second, each repeated
        ``frames_per_code`` times. The mel is cut or padded with zeros to n frames. Raises
        ValueError for bad shapes or codes, or a voice that leaves no positions to speak at.
        """
        config, sizes = self._config, self.mel_stream.network.dit.config
        if self._ended or self.mel_stream.position or len(self.mel_stream.pending):
            raise RuntimeError("the reference voice must come before the first speech codes")
        tokens = _checked(tokens, sizes.codes)
        if mel.ndim != 2 or mel.shape[1] != sizes.mel_bins:
            raise ValueError(
                f"the mel of the reference voice must be [frames, {sizes.mel_bins}], "
                f"found {list(mel.shape)}"
            )
        longest = config.position_limit - config.largest_chunk_frames
        if not 0 < len(tokens) <= longest:
            raise ValueError(
                f"the reference voice must have 1 to {longest} frames, found {len(tokens)}"
            )
        self.mel_stream.prefill(mel, torch.tensor(tokens))


class ChunkResult(NamedTuple):
    """What was computed for a chunk, None where there was nothing to compute.

    ``mel`` [frames, mel_bins]; ``wave`` [samples] is that of ``joined``, the mel with what was
    held back before it.
    """

    solution: Solution | None
    mel: Tensor
    joined: Tensor | None
    wave: Tensor | None


class ChunkJob(NamedTuple):
    """The next codes of a stream, see :meth:`SpeechStream.push`."""

    stream: SpeechStream
    codes: Sequence[int] | Tensor
    final: bool


def _checked(codes: Sequence[int] | Tensor, size: int) -> list[int]:
    """The codes on the host; ValueError unless they are one-dimensional and below ``size``."""
    if isinstance(codes, Tensor):
        if codes.ndim != 1 or codes.dtype != torch.int64:
            found = f"{codes.dtype} {list(codes.shape)}"
            raise ValueError(f"speech codes must be int64 [n], found {found}")
        codes = codes.tolist()
    for code in codes:
        if not 0 <= code < size:
            raise ValueError(f"speech code {code} is outside 0..{size - 1}")
    return list(codes)


class Detokenizer:
    """The loaded modules and how they are used; every stream has its own state.

    DiT and vocoder each compute in the dtype of their parameters. As published, that includes
    the noise, the ODE state and the cross-fade. ``streams`` is how many there are at a time, None
    for any number; of these, chunks of up to ``batch_limit`` are computed together. Not to be used
    by two threads at once.
    """

    def __init__(
        self,
        dit: DiT,
        vocoder: Vocoder,
        config: StreamConfig | None = None,
        graphs: Graphs | None = None,
        streams: int | None = None,
    ):
        if dit.config.mel_bins != vocoder.config.mel_bins:
            raise ValueError(
                f"the detokenizer makes {dit.config.mel_bins} mel bins, "
                f"the vocoder takes {vocoder.config.mel_bins}"
            )
        self.dit, self.vocoder = dit, vocoder
        self.config = config or StreamConfig()
        self.graphs = graphs or graphs_for(dit.device)
        rows = recorded_rows(streams)
        self.batch_limit = rows[-1] if self.graphs.captures else EAGER_ROWS
        self.network = FlowNetwork(dit, self.config, self.graphs, rows)
        self._vocoder = BatchedVocoder(vocoder, self.graphs, rows)

    @property
    def sample_rate(self) -> int:
        return self.vocoder.config.sample_rate

    @property
    def samples_per_code(self) -> int:
        return self.config.frames_per_code * self.vocoder.config.hop_size

    def start(self, noise: Noise) -> SpeechStream:
        """A new stream. ``noise(chunk, frames)`` gives fp32 [frames, mel_bins], chunks from 0.

        All work of one utterance must be launched within the same ``graphs.stream()``.
        """
        return SpeechStream(self, noise)

    @torch.no_grad()
    def push_together(self, jobs: Sequence[ChunkJob]) -> list[Tensor]:
        """What :meth:`SpeechStream.push` returns for each job; on a GPU it may be still computed.

        Raises what that raises, and ValueError for two jobs of a stream. All streams then are as
        they were before, so that the other jobs can be given again.
        """
        if len({id(job.stream) for job in jobs}) < len(jobs):
            raise ValueError("two chunks of one stream cannot be synthesized together")
        codes = [job.stream.check(job.codes, job.final) for job in jobs]
        chunks = [
            job.stream.mel_stream.chunk(given, job.final)
            for job, given in zip(jobs, codes, strict=True)
        ]
        sizes = [0 if chunk is None else len(chunk.codes) for chunk in chunks]
        results: list[ChunkResult] = []
        while (first := len(results)) < len(jobs):
            batch = slice(first, first + self.fitting(sizes[first:]))
            results += self._compute(jobs[batch], chunks[batch])
        return [
            job.stream.advance(result, given, job.final)
            for job, result, given in zip(jobs, results, codes, strict=True)
        ]

    def fitting(self, sizes: Sequence[int]) -> int:
        """How many of the next chunks are computed together, at least one.

        ``sizes`` are the codes of each, those that wait in its stream included.
        """
        most = min(len(sizes), self.batch_limit)
        if self.graphs.captures:
            return most
        short = takewhile(lambda codes: codes <= EAGER_CODES, sizes[:most])
        return max(1, len(list(short)))

    def _compute(
        self, jobs: Sequence[ChunkJob], chunks: Sequence[Chunk | None]
    ) -> Iterator[ChunkResult]:
        """Mel and wave of each chunk, of which None are those that wait."""
        some = [chunk for chunk in chunks if chunk is not None]
        solved = iter(self.network.solve(some) if some else [])
        solutions = [None if chunk is None else next(solved) for chunk in chunks]
        mels = [self.network.mel(solution) for solution in solutions]
        joined = [
            job.stream.overlap.joined(mel, job.final) for job, mel in zip(jobs, mels, strict=True)
        ]
        return map(ChunkResult, solutions, mels, joined, self._vocoder.waves(joined))

    @torch.no_grad()
    def warm_up(self) -> None:
        """Record all that speech of both presets needs, so that nothing is recorded later.

        Only the vocoder runs unrecorded, for last chunks of other sizes. Does nothing where
        nothing is recorded.
        """
        if self.network.calls is not None:
            self.network.calls.record_all()
            self._vocoder.record(vocoded_frames(self.config))

    def synthesize(self, codes: Sequence[int] | Tensor, noise: Noise) -> Tensor:
        """The wave fp32 [1, samples_per_code * n], on the CPU, of n codes; see :meth:`waves`."""
        with self.graphs.stream():
            return torch.cat(list(self.waves(codes, noise)))[None].cpu()

    def waves(self, codes: Sequence[int] | Tensor, noise: Noise) -> Iterator[Tensor]:
        """The wave fp32 [samples] of each chunk of the codes, chunked as published.

        All must be launched within ``graphs.stream()``. Raises ValueError if there are no codes
        or one is outside the code book.
        """
        codes, size = _checked(codes, self.dit.config.codes), self.config.chunk_codes
        stream = self.start(noise)
        for start in range(0, max(len(codes), 1), size):
            final = start + size >= len(codes)
            yield stream.push(codes[start : start + size], final)


def vocoded_frames(config: StreamConfig) -> list[int]:
    """Numbers of mel frames that are vocoded at once in both presets, but for last chunks."""
    found: set[int] = set()
    for first in FIRST_CHUNKS.values():
        waiting, held = 0, 0
        # Sizes repeat after a few chunks.
        for codes in [*first, *[config.chunk_codes] * 8]:
            kept = max(0, waiting + codes - config.look_ahead_codes)
            waiting += codes - kept
            joined = held + kept * config.frames_per_code
            held = joined - released_frames(held, joined)
            found.add(joined)
    return sorted(found)
