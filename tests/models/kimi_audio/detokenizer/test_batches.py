"""Chunks of several streams computed together give what each stream gives alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kimia_infer.models.kimi_audio import detokenizer as detokenizer_module
from kimia_infer.models.kimi_audio.detokenizer import (
    ChunkJob,
    Detokenizer,
    Noise,
    SpeechStream,
    Voice,
)
from kimia_infer.models.kimi_audio.dit import DiT
from kimia_infer.models.kimi_audio.flow import CallSize, StreamConfig
from kimia_infer.models.kimi_audio.vocoder import Vocoder
from kimia_infer.utils.graphs import Direct, Graphs
from tests.traced import TracedGraphs

CPU = torch.device("cpu")
CONFIGS = {
    "published": StreamConfig(ode_points=3),
    "short past, positions restart": StreamConfig(
        ode_points=3, cache_frames=60, position_limit=400
    ),
    "no look-ahead": StreamConfig(ode_points=3, look_ahead_codes=0),
}


@dataclass(frozen=True)
class Utterance:
    """The codes of a stream's chunks, the last of which is final, and the frames of its voice."""

    seed: int
    sizes: tuple[int, ...]
    voice_frames: int

    def noise(self, bins: int) -> Noise:
        def make(chunk: int, frames: int) -> Tensor:
            generator = torch.Generator().manual_seed(100 * self.seed + chunk)
            return torch.randn(frames, bins, generator=generator)

        return make

    def parts(self, codes: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(codes, (sum(self.sizes),), generator=generator)
        return [part.tolist() for part in drawn.split(list(self.sizes))]

    def start(self, detokenizer: Detokenizer) -> SpeechStream:
        config = detokenizer.dit.config
        stream = detokenizer.start(self.noise(config.mel_bins))
        if self.voice_frames:
            generator = torch.Generator().manual_seed(self.seed)
            mel = torch.randn(self.voice_frames, config.mel_bins, generator=generator) - 4
            tokens = torch.randint(config.codes, (self.voice_frames,), generator=generator)
            stream.prefill(*Voice(mel, tokens))
        return stream


utterances = st.builds(
    Utterance,
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6).map(tuple),
    voice_frames=st.sampled_from([0, 0, 50, 130]),
)


@pytest.fixture(scope="module", params=["direct", "recorded"])
def graphs(request: pytest.FixtureRequest) -> Graphs:
    return Direct() if request.param == "direct" else TracedGraphs(CPU)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(
    request: pytest.FixtureRequest, dit: DiT, small_vocoder: Vocoder, graphs: Graphs
) -> Iterator[tuple[Detokenizer, Detokenizer]]:
    """The one under test, which goes on from example to example, and one to compare with."""
    config = CONFIGS[request.param]
    tested = Detokenizer(dit, small_vocoder, config, graphs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detokenizer_module, "EAGER_CODES", config.largest_chunk_codes)
        yield tested, Detokenizer(dit, small_vocoder, config, Direct())


@settings(max_examples=settings.default.max_examples // 8)
@given(data=st.data(), spoken=st.lists(utterances, min_size=1, max_size=6))
def test_any_mixture_gives_each_its_own_wave(
    pair: tuple[Detokenizer, Detokenizer], data: st.DataObject, spoken: list[Utterance]
) -> None:
    """Streams that start, speak, end and are closed at any time beside any others."""
    tested, other = pair
    codes = tested.dit.config.codes
    expected = []
    for utterance in spoken:
        stream, parts = utterance.start(other), utterance.parts(codes)
        waves = [stream.push(p, final=i == len(parts) - 1) for i, p in enumerate(parts)]
        expected.append(waves)
    streams = [utterance.start(tested) for utterance in spoken]
    parts = [utterance.parts(codes) for utterance in spoken]
    done = [0] * len(spoken)
    while running := [i for i, count in enumerate(done) if count < len(parts[i])]:
        chosen = data.draw(st.lists(st.sampled_from(running), min_size=1, unique=True))
        jobs = [
            ChunkJob(streams[i], parts[i][done[i]], final=done[i] == len(parts[i]) - 1)
            for i in chosen
        ]
        for i, wave in zip(chosen, tested.push_together(jobs), strict=True):
            torch.testing.assert_close(wave, expected[i][done[i]], atol=1e-5, rtol=0)
            done[i] += 1
        if data.draw(st.integers(0, 9)) == 0:  # somebody hangs up
            i = chosen[0]
            streams[i].close()
            done[i] = len(parts[i])


def speaking(detokenizer: Detokenizer, count: int) -> list[SpeechStream]:
    """Streams that have spoken a chunk."""
    spoken = [Utterance(seed, (20,), 0) for seed in range(count)]
    streams = [utterance.start(detokenizer) for utterance in spoken]
    for stream in streams:
        stream.push(list(range(20)), final=False)
    return streams


def state_of(stream: SpeechStream) -> tuple:
    mel = stream.mel_stream
    return mel.pending, mel.position, mel.chunks, mel.past, stream.overlap.mel, stream.overlap.wave


@pytest.mark.parametrize("bad", [[10**6], [0] * 31])
def test_a_bad_chunk_changes_nothing(bad: list[int], dit: DiT, small_vocoder: Vocoder) -> None:
    """The other jobs can be given again, and so can the stream with other codes."""
    detokenizer = Detokenizer(dit, small_vocoder, CONFIGS["published"])
    streams, twins = speaking(detokenizer, 2), speaking(detokenizer, 2)
    before = [state_of(stream) for stream in streams]
    with pytest.raises(ValueError, match=r"speech code|at most 30 codes"):
        detokenizer.push_together(
            [ChunkJob(streams[0], [1], True), ChunkJob(streams[1], bad, True)]
        )
    for stream, state in zip(streams, before, strict=True):
        assert all(a is b or a == b for a, b in zip(state_of(stream), state, strict=True))
    found = detokenizer.push_together([ChunkJob(stream, [1], True) for stream in streams])
    for wave, twin in zip(found, twins, strict=True):
        torch.testing.assert_close(wave, twin.push([1], True), atol=1e-5, rtol=0)


def test_a_failure_while_computing_changes_nothing(
    dit: DiT, small_vocoder: Vocoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    detokenizer = Detokenizer(dit, small_vocoder, CONFIGS["published"])
    (stream,) = speaking(detokenizer, 1)
    before = state_of(stream)
    with monkeypatch.context() as patch:

        def full(mel: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("no room")

        patch.setattr(small_vocoder, "forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            stream.push([1, 2], final=True)
    assert all(a is b or a == b for a, b in zip(state_of(stream), before, strict=True))
    assert stream.push([1, 2], final=True).isfinite().all()


def test_how_many_chunks_are_computed_together(dit: DiT, small_vocoder: Vocoder) -> None:
    """On a CPU short ones alone gain enough."""
    eager = Detokenizer(dit, small_vocoder, graphs=Direct())
    recorded = Detokenizer(dit, small_vocoder, graphs=TracedGraphs(CPU))
    for sizes, on_cpu, elsewhere in (
        ([42], 1, 1),
        ([42, 42, 42, 42, 42], 1, 4),
        ([16, 20, 42, 16], 2, 4),
        ([16] * 9, 4, 4),
        ([42, 16], 1, 2),
    ):
        assert (eager.fitting(sizes), recorded.fitting(sizes)) == (on_cpu, elsewhere)


def test_two_chunks_of_a_stream_cannot_be_one_batch(dit: DiT, small_vocoder: Vocoder) -> None:
    detokenizer = Detokenizer(dit, small_vocoder)
    stream = detokenizer.start(lambda chunk, frames: torch.zeros(frames, 80))
    with pytest.raises(ValueError, match="two chunks of one stream"):
        detokenizer.push_together([ChunkJob(stream, [1], False), ChunkJob(stream, [2], True)])


def test_what_a_broken_stream_leaves_reaches_nobody(dit: DiT, small_vocoder: Vocoder) -> None:
    """Numbers that are not finite stay in their row, and are gone with it."""
    detokenizer = Detokenizer(dit, small_vocoder, CONFIGS["published"], TracedGraphs(CPU))
    broken = detokenizer.start(lambda chunk, frames: torch.full((frames, 80), torch.nan))
    beside, after, alone = (Utterance(7, (30, 30), 0).start(detokenizer) for _ in range(3))
    assert detokenizer.network.calls is not None
    expected = alone.push(list(range(30)), final=False)
    jobs = [ChunkJob(stream, list(range(30)), final=False) for stream in (broken, beside)]
    waves = detokenizer.push_together(jobs)
    assert waves[0].isnan().any() and detokenizer.network.calls.keys.isnan().any()
    torch.testing.assert_close(waves[1], expected, atol=1e-5, rtol=0)
    wave = after.push(list(range(30)), final=False)
    torch.testing.assert_close(wave, expected, atol=1e-5, rtol=0)
    broken.close()
    assert broken.mel_stream.past.frames == 0


def test_sizes_of_recorded_calls(dit: DiT, small_vocoder: Vocoder) -> None:
    """Four rows at the most; the published chunks fit."""
    detokenizer = Detokenizer(dit, small_vocoder, graphs=TracedGraphs(CPU))
    calls = detokenizer.network.calls
    assert calls is not None
    assert calls.size(1, 16, 64) == CallSize(1, 16, 576)
    assert calls.size(3, 20, 577) == CallSize(4, 32, 1088)
    assert calls.size(2, 42, 900 + 168) == CallSize(2, 42, 1088)
