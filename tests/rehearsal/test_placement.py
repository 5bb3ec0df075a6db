"""Where the published model is placed: what is planned for a device, and two devices."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.loading import Components, load_components
from kimia_infer.api.memory import (
    LONGEST,
    Capacity,
    MemoryPlan,
    SpeechSizes,
    least_positions,
)
from kimia_infer.engine.decode import PIECE, Decoder
from kimia_infer.engine.generation import BOTH
from kimia_infer.layers.attention import BACKENDS, CachedAttention
from kimia_infer.layers.sampler import RECORDED_FORMS
from kimia_infer.models.kimi_audio import detokenizer as detokenizer_module
from kimia_infer.models.kimi_audio.detokenizer import ChunkJob, SpeechStream
from kimia_infer.utils.graphs import Direct
from tests.rehearsal.fake_cuda import CUDA, SECOND, FakeCuda, Ledger
from tests.rehearsal.published import WAVE, Loaded, NoFeatures, answer

HALF = torch.bfloat16


def modules_of(components: Components) -> list[nn.Module]:
    """The language model, and what hears and speaks."""
    speaking = components.detokenizer.dit, components.detokenizer.vocoder
    hearing = components.speech_tokenizer.module, components.whisper.module
    return [components.language_model, *hearing, *speaking]


def weights_of(*modules: nn.Module) -> int:
    return sum(p.nbytes for module in modules for p in module.parameters())


def test_memory(card: FakeCuda, loaded: Loaded, features: Tensor) -> None:
    """Weights, keys and values, and what every stage works with are as planned."""
    language_model, *others = modules_of(loaded.components)
    sizes = SpeechSizes.of(*others)
    plan = MemoryPlan(language_model.config, HALF, "none", sizes, CUDA, CUDA)
    capacity = loaded.components.capacity
    assert capacity == Capacity(2, 2 * LONGEST)
    spare = (capacity.positions - least_positions(2)) * plan.position_bytes(True)
    assert loaded.peak < plan.needed("none", True, 2)[CUDA] + spare

    def work(stage: Callable[[Ledger], object]) -> int:
        gc.collect()
        with card.active() as ledger:
            before = ledger.live
            with ledger.peak_within() as peak:
                kept = stage(ledger)
        del kept
        return peak[0] - before

    def read(ledger: Ledger) -> None:
        ids = torch.zeros(1, LONGEST, dtype=torch.int64, device=CUDA)
        heard = torch.zeros(LONGEST, features.shape[1], dtype=HALF, device=CUDA)
        x = language_model.embed(ids, ids, ids == 0, heard)
        del heard
        for start in (0, LONGEST - PIECE):
            language_model(x[:, start : start + PIECE], attention.sequence(0, start))

    def speak(ledger: Ledger) -> list[SpeechStream]:
        """Two streams at once, in a voice, until they have as much past as they keep."""
        bins = detokenizer.dit.config.mel_bins
        streams = [detokenizer.start(lambda _, frames: torch.zeros(frames, bins)) for _ in range(2)]
        for stream in streams:
            stream.prefill(torch.zeros(900, bins), [0] * 900)
        for codes in (30, 30):
            detokenizer.push_together([ChunkJob(stream, [0] * codes, False) for stream in streams])
        return streams

    detokenizer = loaded.components.detokenizer
    with card.active():
        cache = language_model.new_cache(LONGEST, LONGEST)
        attention = CachedAttention(BACKENDS["sdpa"], cache)
    assert cache.keys.nbytes + cache.values.nbytes == LONGEST * plan.position_bytes(True)
    calls = detokenizer.network.calls
    tensors = [x for x in vars(calls).values() if isinstance(x, Tensor)]
    recorded = sum(x.nbytes for x in tensors)
    assert abs(recorded - 2 * sizes.row) < 0.01 * recorded
    wave = np.zeros(8 * 30 * 16_000, dtype=np.float32)
    for stage, planned in (
        (read, plan.reading_bytes("none")),
        (lambda ledger: loaded.model.speech_codes.encode(wave), sizes.encoding),
        (lambda ledger: loaded.model.whisper_features.encode(wave), sizes.encoding),
        (speak, sum(sizes.speaking(2)) - recorded),
    ):
        found = work(stage)
        # Whisper, in half the bytes, is not what decides; the reserve has room for spectrograms.
        assert found <= planned * 1.1 and planned <= found * 2.1, (stage, found, planned)


@pytest.mark.parametrize("slots", [1, 8, 9, 32])
def test_memory_of_choosing(slots: int, card: FakeCuda, loaded: Loaded) -> None:
    """The logits of both tracks, and a step that draws from all ids."""
    model = loaded.components.language_model
    plan = MemoryPlan(model.config, HALF, "none", SpeechSizes((), 0), CUDA, CUDA)
    drawn = RECORDED_FORMS[-1]
    with card.active() as ledger:
        given = model, loaded.model.decoder.control, 64
        decoder = Decoder(*given, make_graphs=lambda _: Direct(), slots=slots, places=64)
        rows = decoder.batches[-1]
        with ledger.peak_within() as peak:
            decoder._choose(decoder._view(0, rows), BOTH, (drawn, drawn))
            before = ledger.live
        logits = decoder.rows.text.logits.nbytes + decoder.rows.audio.logits.nbytes
    found = peak[0] - before + logits
    assert found <= plan.choosing_bytes(slots) <= 1.1 * found


def test_two_devices(card: FakeCuda, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders and speech on the second one: features cross once per sound, and nothing else."""
    monkeypatch.setattr(detokenizer_module, "vocoded_frames", lambda config: [160])  # and no other
    with card.active():
        components = load_components(directory, True, CUDA, HALF, speech_device=SECOND, slots=1)
        model = KimiAudio.from_components(components)
    language_model, *others = modules_of(components)
    assert {p.device for p in language_model.parameters()} == {CUDA}
    assert {p.device for module in others for p in module.parameters()} == {SECOND}
    sizes = SpeechSizes.of(*others)
    assert sum(sizes.encoders) + sizes.detokenizer == weights_of(*others)
    for encoder in (model.whisper_features, model.speech_codes):
        encoder.extractor = NoFeatures()
    assert model.detokenizer is not None
    bins = model.detokenizer.dit.config.mel_bins
    with card.active() as ledger, ledger.calls() as spoken:
        heard = model.whisper_features.encode(WAVE)
        codes = model.speech_codes.encode(WAVE)
        assert heard.device == codes.device == SECOND
        stream = model.detokenizer.start(lambda chunk, frames: torch.zeros(frames, bins))
        stream.prefill(torch.zeros(250, bins), [0] * 250)
        for count, final in ((30, False), (5, True)):
            assert stream.push([0] * count, final).device == SECOND
    assert not any(CUDA in call.devices for call in spoken)
    crossing = [call for call in answer(card, model, heard, steps=8) if SECOND in call.devices]
    assert [call.name for call in crossing] == ["to"]
    assert crossing[0].devices == {CUDA, SECOND} and crossing[0].outputs == ((HALF, heard.numel()),)
