"""After the warm-up an answer of usual length records nothing but its last chunk."""

from __future__ import annotations

import pytest
import torch

from kimia_infer.api.loading import warm_up
from kimia_infer.api.response import SpeechPipeline
from kimia_infer.models.kimi_audio import detokenizer as stream
from kimia_infer.models.kimi_audio.detokenizer import PRESETS, Detokenizer, StreamConfig
from kimia_infer.models.kimi_audio.dit import DiT
from kimia_infer.models.kimi_audio.vocoder import Vocoder
from kimia_infer.utils.graphs import Direct
from tests.traced import TracedGraphs

ANSWER_CODES = 400  # beyond the frames that the cache keeps
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def warm(dit: DiT, vocoder: Vocoder) -> Detokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "VOCODED_LENGTHS", 0)  # tracing a vocoder takes long
        detokenizer = Detokenizer(dit, vocoder, StreamConfig(ode_points=3), TracedGraphs(CPU))
    warm_up(detokenizer)
    return detokenizer


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_is_recorded_before_the_last_chunk(preset: str, warm: Detokenizer) -> None:
    config, graphs = warm.config, warm.graphs
    known = graphs.recorded
    assert known > len(PRESETS)
    assert ANSWER_CODES * config.frames_per_code > config.cache_frames
    pipeline = SpeechPipeline(
        warm, lambda _, frames: torch.zeros(frames, warm.dit.config.mel_bins), preset, False
    )
    for code in range(ANSWER_CODES):
        pipeline.feed([code % warm.dit.config.codes])
    assert graphs.recorded == known
    pipeline.finish()
    assert graphs.recorded <= known + 1  # its evaluation
    pipeline.close()
    assert sum(map(len, pipeline.rest())) == ANSWER_CODES * warm.samples_per_code


def test_without_recording_there_is_nothing_to_do(dit: DiT, vocoder: Vocoder) -> None:
    detokenizer = Detokenizer(dit, vocoder, graphs=Direct())
    warm_up(detokenizer)
    assert not detokenizer.idle
