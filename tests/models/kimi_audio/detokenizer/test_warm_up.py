"""After the warm-up no answer records anything."""

from __future__ import annotations

import pytest
import torch

from kimia_infer.models.kimi_audio.detokenizer import (
    FIRST_CHUNKS,
    PRESETS,
    ChunkJob,
    Detokenizer,
    vocoded_frames,
)
from kimia_infer.models.kimi_audio.dit import DiT
from kimia_infer.models.kimi_audio.flow import StreamConfig
from kimia_infer.models.kimi_audio.vocoder import BatchedVocoder, Vocoder
from tests.traced import FixedShapes, TracedGraphs

ANSWER_CODES = 400  # beyond the frames that the cache keeps
CPU = torch.device("cpu")
FEW_STEPS = StreamConfig(ode_points=3)


def noise(chunk: int, frames: int) -> torch.Tensor:
    return torch.zeros(frames, 80)


def sizes(preset: str) -> list[int]:
    """Codes of the chunks of an answer."""
    first = list(FIRST_CHUNKS[preset])
    rest = ANSWER_CODES - sum(first)
    usual = FEW_STEPS.chunk_codes
    return [*first, *[usual] * (rest // usual), rest % usual]


def test_nothing_is_recorded_in_a_request(
    dit: DiT, small_vocoder: Vocoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams of both presets one chunk apart, in batches of every size, with last chunks."""
    monkeypatch.setattr(BatchedVocoder, "record", lambda *_: None)  # tracing it takes long
    graphs = TracedGraphs(CPU)
    detokenizer = Detokenizer(dit, small_vocoder, FEW_STEPS, graphs)
    detokenizer.warm_up()
    known = graphs.recorded
    assert known == 3 * 3 * 2  # rows, codes, keys
    for count in (1, 2, 5):
        streams = [detokenizer.start(noise) for _ in range(count)]
        left = [sizes(PRESETS[index % 2])[: 3 + 6 * index] for index in range(count)]
        while any(left):
            jobs = [
                ChunkJob(stream, [0] * rest.pop(0), final=not rest)
                for stream, rest in zip(streams, left, strict=True)
                if rest
            ]
            detokenizer.push_together(jobs)
    assert graphs.recorded == known


@pytest.mark.parametrize("preset", PRESETS)
def test_the_vocoder_is_recorded_for_all_but_last_chunks(
    preset: str, dit: DiT, small_vocoder: Vocoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    waves = BatchedVocoder.waves

    def watched(self, mels):
        seen.extend(len(mel) for mel in mels)
        return waves(self, mels)

    monkeypatch.setattr(BatchedVocoder, "waves", watched)
    stream = Detokenizer(dit, small_vocoder, StreamConfig(ode_points=2)).start(noise)
    for size in sizes(preset)[:-1]:
        stream.push([0] * size, final=False)
    assert set(seen) <= set(vocoded_frames(FEW_STEPS))


def test_the_warm_up_records_every_vocoded_shape(
    dit: DiT, small_vocoder: Vocoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, int]] = []
    detokenizer = Detokenizer(dit, small_vocoder, StreamConfig(ode_points=2), FixedShapes(CPU))
    monkeypatch.setattr(
        detokenizer._vocoder._vocode, "record", lambda mel: shapes.append((len(mel), mel.shape[1]))
    )
    detokenizer.warm_up()
    rows, lengths = (set(values) for values in zip(*shapes, strict=True))
    assert rows == {1, 2, 4} and {72, 156, 204, 16} <= lengths
    assert len(shapes) == len(set(shapes)) == len(rows) * len(lengths)


@pytest.mark.parametrize(("streams", "rows"), [(1, (1,)), (3, (1, 2)), (32, (1, 2, 4))])
def test_few_streams_need_few_rows(
    streams: int, rows: tuple[int, ...], dit: DiT, small_vocoder: Vocoder
) -> None:
    """Neither memory nor recordings for more chunks than there are streams."""
    detokenizer = Detokenizer(dit, small_vocoder, FEW_STEPS, FixedShapes(CPU), streams)
    calls = detokenizer.network.calls
    assert calls is not None and calls.keys.shape[1] == calls.x.shape[0] == rows[-1]
    assert detokenizer.batch_limit == rows[-1] and detokenizer._vocoder.rows == rows
    calls.record_all()
    assert {size.rows for size in calls._recorded} == set(rows)
