"""Codes to a wave, chunk by chunk, or all at once with the same result.

An ODE leads from noise to the mel frames of a chunk, which the vocoder turns into a wave. The last
codes of a chunk are only a look-ahead: their frames are computed, so that the frames before them
are made for what follows, but dropped and computed again with the next chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.models.kimi_audio.dit import (
    Conditioning,
    DiT,
    FlowNetwork,
    FrameCache,
)
from kimia_infer.models.kimi_audio.vocoder import Vocoder
from kimia_infer.utils.graphs import Graphs, Recorded, graphs_for

Noise = Callable[[int, int], Tensor]

# Time at which finished frames enter the cache (0.999 of the flow, published implementation).
CACHE_TIMESTEP = 999

# Codes of the first chunks. ``quality`` is the published chunking. ``low_latency`` begins with 4
# codes and the 12 of look-ahead that they need, and grows so that each chunk is ready in time.
FIRST_CHUNKS = {"quality": (), "low_latency": (16, 8, 16)}
PRESETS = tuple(FIRST_CHUNKS)


class Voice(NamedTuple):
    """A reference voice, see :meth:`SpeechStream.prefill`.

    ``mel`` fp32 [frames, mel_bins]; ``tokens`` int64 [frames], one code per mel frame.
    """

    mel: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class StreamConfig:
    """How speech is cut into chunks; defaults from the published implementation.

    A frame is one mel frame (1/50 s), a code spans ``frames_per_code`` of them. ``chunk_codes``
    is the most a chunk takes in, besides the look-ahead left over from the one before.
    ``cache_frames`` is how much past the network sees; positions restart when the next chunk
    could pass ``position_limit``. ``ode_points`` grid points make one Euler step fewer. A reference
    voice is read in at most ``voice_chunks`` chunks of ``voice_chunk_frames``, after the rest.
    """

    chunk_codes: int = 30
    look_ahead_codes: int = 12
    frames_per_code: int = 4
    cache_frames: int = 900
    position_limit: int = 4096
    ode_points: int = 30
    voice_chunk_frames: int = 120
    voice_chunks: int = 10

    @property
    def largest_chunk_codes(self) -> int:
        return self.chunk_codes + self.look_ahead_codes

    @property
    def largest_chunk_frames(self) -> int:
        return self.largest_chunk_codes * self.frames_per_code


@functools.cache
def ode_timesteps(points: int) -> tuple[int, ...]:
    """Integer times 0 .. 999 of the Euler steps over ``points`` grid points; t = 1 is not used."""
    return tuple((torch.linspace(0, 1, points)[:-1] * 1000).long().tolist())


def euler(
    network: FlowNetwork, x: Tensor, conditioning: Conditioning, rotary: Tensor, steps: int
) -> Tensor:
    """Follow the flow from noise x [frames, mel_bins] to a normalized mel in equal steps.

    Step k uses entry k of ``conditioning``.
    """
    for step in range(steps):
        velocity = network.velocity(x, conditioning.at(step), rotary)
        x = torch.add(x, velocity, alpha=1 / steps)
    return x


class MelStream:
    """The mel side of one stream.

    ``noise(chunk, frames)`` gives the start of chunk number ``chunk``, fp32 [frames, mel_bins].
    State: ``pending`` codes (the look-ahead), the ``cache`` of past frames, the ``position`` of
    the next frame and the number of ``chunks`` made.
    """

    def __init__(self, network: FlowNetwork, noise: Noise, config: StreamConfig):
        self.network, self.noise, self.config = network, noise, config
        self.dit, self.cache = network.dit, network.cache
        self.cache.filled = 0
        self.pending: list[int] = []
        self.position = 0
        self.chunks = 0
        self._voice: tuple[int, tuple[Tensor, Tensor]] | None = None

    def push(self, codes: Sequence[int], final: bool) -> Tensor:
        """Mel [frames, mel_bins] of all codes so far, less the look-ahead unless ``final``.

        Codes that do not reach beyond the look-ahead wait and give no frames.
        """
        codes = [*self.pending, *codes]
        kept = len(codes) if final else max(0, len(codes) - self.config.look_ahead_codes)
        self.pending = codes[kept:]
        if kept:
            mel = self._chunk(codes, kept, final)
            self.chunks += 1
        else:
            bins, place = self.dit.config.mel_bins, self.dit.device
            mel = torch.empty(0, bins, device=place, dtype=self.dit.dtype)
        self.position += len(mel)
        if final:
            self._voice = None
        if final or self.position + 2 * len(mel) > self.config.position_limit:
            self._restart()
        return mel

    def _chunk(self, codes: list[int], kept: int, final: bool) -> Tensor:
        repeat = self.config.frames_per_code
        frames = len(codes) * repeat
        timesteps = ode_timesteps(self.config.ode_points)
        refresh = kept < len(codes)
        times = (*timesteps, CACHE_TIMESTEP) if refresh else timesteps
        conditioning = self.dit.condition(torch.tensor(codes), times)
        rotary = self.dit.rotary(self.position, frames)
        x = euler(self.network, self._start(frames), conditioning, rotary, len(timesteps))
        x = x[: kept * repeat]
        if refresh:
            # The kept frames once more, without the look-ahead, which the next chunk computes.
            self.network.velocity(x, conditioning.at(-1, kept), rotary[: len(x)])
        if not final:
            self.cache.keep(len(x), self.config.cache_frames)
        return x * self.dit.config.mel_std + self.dit.config.mel_mean

    def _start(self, frames: int) -> Tensor:
        noise = self.noise(self.chunks, frames)
        expected = (frames, self.dit.config.mel_bins)
        if noise.shape != expected:
            raise ValueError(
                f"noise of chunk {self.chunks} has shape {list(noise.shape)}, "
                f"expected {list(expected)}"
            )
        return noise.to(self.dit.device, self.dit.dtype)

    def _restart(self) -> None:
        """Positions from the beginning: behind the reference voice if there is one, else 0."""
        self.position, self.cache.filled = 0, 0
        if self._voice is not None:
            self.position, past = self._voice
            self.cache.restore(past)

    def prefill(self, mel: Tensor, tokens: Tensor) -> None:
        """Continue in the voice of mel [frames, mel_bins], whose codes are int64 [tokens].

        ``tokens`` has one code per mel frame; as published, the mel is cut or padded with zeros
        to its length, and the frames that do not fill whole chunks come first, in one piece.
        """
        config, dit = self.config, self.dit
        mel = mel[: len(tokens)]
        mel = F.pad(mel, (0, 0, 0, len(tokens) - len(mel)))
        x = ((mel - dit.config.mel_mean) / dit.config.mel_std).to(dit.device, dit.dtype)
        chunks = min(len(tokens) // config.voice_chunk_frames, config.voice_chunks)
        rest = len(tokens) - chunks * config.voice_chunk_frames
        sizes = [rest] * (rest > 0) + [config.voice_chunk_frames] * chunks
        # A separate cache, as pieces may be larger than chunks of speech.
        cache = FrameCache(dit, config.cache_frames + max(sizes))
        for part, codes in zip(x.split(sizes), tokens.split(sizes), strict=True):
            conditioning = dit.condition(codes, [CACHE_TIMESTEP])
            dit(part, conditioning.at(0), dit.rotary(self.position, len(part)), cache.attend)
            cache.keep(len(part), config.cache_frames)
            self.position += len(part)
        self._voice = (self.position, cache.past())
        self.cache.restore(cache.past())


VOCODED_LENGTHS = 16  # that are recorded; chunks of both presets have fewer, but for the last one


class WaveOverlap:
    """The wave side of one stream: vocodes chunks with an overlap and cross-fades them.

    The end of every chunk is held back (``mel`` [frames, mel_bins] and its ``wave``
    [hop_size * frames]), vocoded again together with the next chunk and faded over. As
    published, the two halves of the Hamming window do not sum to one, so the overlap is up to
    8 % louder, and the last chunk is not faded at all. ``vocode`` is how the vocoder is run.
    """

    def __init__(self, vocoder: Vocoder, vocode: Callable[[Tensor], Tensor] | None = None):
        self.vocoder, self._vocode = vocoder, vocode or vocoder
        place = {"device": vocoder.device, "dtype": vocoder.dtype}
        self.mel = torch.empty(0, vocoder.config.mel_bins, **place)
        self.wave = torch.empty(0, **place)

    def push(self, mel: Tensor, final: bool) -> Tensor:
        """The wave [samples] that the chunk mel [frames, mel_bins] releases."""
        held, added = len(self.mel), len(mel)
        if added == 0 and not final:
            return self.wave[:0]
        mel = torch.cat([self.mel, mel.to(self.mel)])
        wave = self._vocode(mel)
        if final:
            self.mel, self.wave = mel[:0], wave[:0]
            return wave
        # Twice what was held back goes out, the first half faded; of a short chunk, half.
        frames = 2 * held if added > held > 0 else len(mel) // 2
        released = wave[: frames * self.vocoder.config.hop_size]
        if held:
            released = _cross_fade(self.wave, released)
        self.mel, self.wave = mel[frames:], wave[len(released) :]
        return released


def _cross_fade(old: Tensor, new: Tensor) -> Tensor:
    """``new`` with its first half faded in over the beginning of ``old``."""
    # As published, computed in fp32 and then rounded to the dtype of the wave.
    window = torch.hamming_window(len(new), periodic=True, device=new.device).to(new.dtype)
    half = len(new) // 2
    rise, fall = window[:half], window[len(new) - half :]
    return torch.cat([old[:half] * fall + new[:half] * rise, new[half:]])


class SpeechStream:
    """One utterance on its way from codes to sound; made by :meth:`Detokenizer.start`.

    ``mel`` [frames, mel_bins] is the mel of the last chunk, ``mel_stream`` and ``overlap`` hold
    the state. ``release`` gets the network when the stream ends.
    """

    def __init__(
        self,
        network: FlowNetwork,
        overlap: WaveOverlap,
        config: StreamConfig,
        noise: Noise,
        release: Callable[[FlowNetwork], None],
    ):
        self.mel_stream = MelStream(network, noise, config)
        self.overlap = overlap
        self.mel: Tensor | None = None
        self._config, self._release = config, release
        self._ended = False

    def close(self) -> None:
        """End the stream and drop what is still in it."""
        if not self._ended:
            self._ended = True
            self._release(self.mel_stream.network)

    @torch.no_grad()
    def push(self, codes: Sequence[int] | Tensor, final: bool) -> Tensor:
        """Take the next n codes as one chunk; return the wave fp32 [samples] it releases.

        ``n`` is at most ``chunk_codes`` and may be 0 with ``final``, which ends the stream and
        releases all the rest. Codes that do not reach beyond the look-ahead release nothing yet.
        Raises ValueError for codes that cannot be spoken and RuntimeError after the end.
        """
        if self._ended:
            raise RuntimeError("this speech stream has ended; start another one")
        codes = _checked(codes, self.mel_stream.dit.config.codes)
        if len(codes) > self._config.chunk_codes:
            raise ValueError(
                f"a chunk takes at most {self._config.chunk_codes} codes, found {len(codes)}"
            )
        waiting = len(self.mel_stream.pending) or len(self.overlap.mel)
        if final and not (len(codes) or waiting):
            raise ValueError("there are no speech codes to speak")
        self.mel = self.mel_stream.push(codes, final)
        wave = self.overlap.push(self.mel, final).float()
        if final:
            self.close()
        return wave

    @torch.no_grad()
    def prefill(self, mel: Tensor, tokens: Sequence[int] | Tensor) -> None:
        """Speak in a reference voice; only possible before the first codes.

        mel fp32 [frames, mel_bins], natural logarithm (``log_mel`` of the voice at 24 kHz);
        tokens are the voice's n codes at the mel's 50 per second, each repeated
        ``frames_per_code`` times. The mel is cut or padded with zeros to n frames. Raises
        ValueError for bad shapes or codes, or a voice that leaves no positions to speak at.
        """
        dit, config = self.mel_stream.dit, self._config
        if self._ended or self.mel_stream.position or len(self.mel_stream.pending):
            raise RuntimeError("the reference voice must come before the first speech codes")
        tokens = _checked(tokens, dit.config.codes)
        if mel.ndim != 2 or mel.shape[1] != dit.config.mel_bins:
            raise ValueError(
                f"the mel of the reference voice must be [frames, {dit.config.mel_bins}], "
                f"found {list(mel.shape)}"
            )
        longest = config.position_limit - config.largest_chunk_frames
        if not 0 < len(tokens) <= longest:
            raise ValueError(
                f"the reference voice must have 1 to {longest} frames, found {len(tokens)}"
            )
        self.mel_stream.prefill(mel, torch.tensor(tokens))


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
    the noise, the ODE state and the cross-fade. ``idle`` networks, with caches and recordings of
    streams that have ended, are used again.
    """

    def __init__(
        self,
        dit: DiT,
        vocoder: Vocoder,
        config: StreamConfig | None = None,
        graphs: Graphs | None = None,
    ):
        if dit.config.mel_bins != vocoder.config.mel_bins:
            raise ValueError(
                f"the detokenizer makes {dit.config.mel_bins} mel bins, "
                f"the vocoder takes {vocoder.config.mel_bins}"
            )
        self.dit, self.vocoder = dit, vocoder
        self.config = config or StreamConfig()
        self.graphs = graphs or graphs_for(dit.device)
        self._vocode = Recorded(vocoder, self.graphs, VOCODED_LENGTHS)
        self.idle: list[FlowNetwork] = []

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
        config = self.config
        try:
            network = self.idle.pop()
        except IndexError:
            network = FlowNetwork(
                self.dit,
                config.cache_frames,
                config.largest_chunk_codes,
                config.frames_per_code,
                self.graphs,
            )
        overlap = WaveOverlap(self.vocoder, self._vocode)
        return SpeechStream(network, overlap, config, noise, self.idle.append)

    def synthesize(self, codes: Sequence[int] | Tensor, noise: Noise) -> Tensor:
        """The wave fp32 [1, samples_per_code * n], on the CPU, of n codes.

        Chunked as published. Raises ValueError if there are no codes or one is outside the code
        book.
        """
        codes, size = _checked(codes, self.dit.config.codes), self.config.chunk_codes
        with self.graphs.stream():
            stream, waves = self.start(noise), []
            for start in range(0, max(len(codes), 1), size):
                final = start + size >= len(codes)
                waves.append(stream.push(codes[start : start + size], final))
            return torch.cat(waves)[None].cpu()
