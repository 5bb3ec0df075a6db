"""The GPU path at the published size without a GPU: loading, encoders, steps, speech.

Values are not computed. What is checked is that every operation finds its tensors on the device
and in the working dtype, and that recorded work neither reads nor waits for the host.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from kimia_infer.api import engine
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.loading import load_components
from kimia_infer.api.memory import LONGEST, Capacity, language_model, weight_bytes
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.engine.decode import Decoder
from kimia_infer.engine.generation import Tracks
from kimia_infer.layers.attention import BUCKETS
from kimia_infer.layers.quantization import SCHEMES
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.checkpoint import SPEECH_TOKENIZER_FOLDER, WHISPER_FOLDER
from kimia_infer.models.kimi_audio.detokenizer import ChunkJob
from kimia_infer.models.kimi_audio.encoders import SpeechCodes, WhisperFeatures
from kimia_infer.models.kimi_audio.prompt import EncodedMessage
from tests.rehearsal.fake_cuda import (
    CUDA,
    SECOND,
    Call,
    CannotBeRecorded,
    FakeCuda,
    FakeGraphs,
    HostWaits,
)
from tests.rehearsal.published import CODES, SAMPLED, SECONDS, WAVE, Loaded, NoFeatures, answer

HALF = torch.bfloat16
Built = TypeVar("Built")
# Operations that read weights or mix positions, by the beginnings of their names.
PRODUCTS = ("linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "conv", "_conv", "scaled_dot")
PRODUCTS += ("matrix_vector", "rotate_append_attend", "_scaled_dot")


def check_dtypes(calls: Sequence[Call], dtype: torch.dtype, widest: int = 0) -> None:
    """Products are of ``dtype``, and wider results have at most ``widest`` elements."""
    products = [call for call in calls if call.name.startswith(PRODUCTS)]
    assert products
    stored = {torch.int8, torch.uint8, torch.int64, torch.int32, torch.bool, torch.float8_e4m3fn}
    for call in products:
        assert set(call.inputs) - stored == {dtype}, call
    for call in calls:
        for made, size in call.outputs:
            wide = made.is_floating_point and made.itemsize > dtype.itemsize
            assert not wide or size <= widest, call


def recording(card: FakeCuda, build: Callable[[], Built]) -> tuple[Built, list[Call]]:
    """What ``build`` makes, and the operations of all forms of step that its decoder records, but
    for samplers."""
    calls: list[Call] = []
    original = Decoder._replay_forward

    def forward(decoder: Decoder, batch: int, tracks: Tracks, bucket: int) -> None:
        with ledger.calls() as made:
            original(decoder, batch, tracks, bucket)
        calls.extend(made)

    patched = mock.patch.object(Decoder, "_replay_forward", forward)
    with card.active() as ledger, patched:
        return build(), calls


def test_weights(card: FakeCuda, loaded: Loaded) -> None:
    """All on the device; only the speech tokenizer is in float32."""
    parts = loaded.components
    detokenizer = parts.detokenizer
    modules = [parts.language_model, parts.whisper.module, detokenizer.dit, detokenizer.vocoder]
    for module, dtype in [(m, HALF) for m in modules] + [(parts.speech_tokenizer.module, None)]:
        for name, parameter in module.named_parameters():
            assert parameter.device == CUDA and parameter.dtype is (dtype or torch.float32), name


def test_encoders(card: FakeCuda, loaded: Loaded, directory: Path, features: Tensor) -> None:
    assert (features.shape, features.dtype, features.device) == ((CODES, 5120), HALF, CUDA)
    parts = loaded.components
    whisper = WhisperFeatures(parts.whisper.module, directory / WHISPER_FOLDER)
    tokenizer = SpeechCodes(parts.speech_tokenizer.module, directory / SPEECH_TOKENIZER_FOLDER)
    whisper.extractor = tokenizer.extractor = NoFeatures()
    for seconds, segments in ((SECONDS, 1), (70, 3)):  # recorded, and launched directly
        wave = np.zeros(seconds * 16_000, dtype=np.float32)
        with card.active() as ledger, ledger.calls() as calls:
            found = whisper.encode(wave)
        assert len(found) == -(-seconds * 25 // 2)
        check_dtypes(calls, HALF, widest=segments * 128 * 3000)
        with card.active() as ledger, ledger.calls() as calls:
            codes = tokenizer.encode(wave)
        assert codes.shape == (len(found),) and codes.dtype is torch.int64 and codes.is_cuda
        check_dtypes(calls, torch.float32)


@pytest.mark.parametrize(
    ("attention", "kv_cache", "head_rows"),
    [
        ("triton", "none", "full"),
        ("triton", "fp8", "track"),
        ("sdpa", "none", "track"),
        ("sdpa", "fp8", "full"),
    ],
)
def test_generation(
    attention: str,
    kv_cache: str,
    head_rows: str,
    card: FakeCuda,
    loaded: Loaded,
    features: Tensor,
    long: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefill, all steps and samplers, with every kind of attention and cache."""
    if (attention, kv_cache) == ("sdpa", "none") and not long:
        pytest.skip("the other cache of sdpa is read in the same way; runs with --long")
    if not long:  # the steps of sdpa are the same for all buckets; the last one is the capacity
        monkeypatch.setattr(engine, "Decoder", partial(Decoder, buckets=BUCKETS[:1]))
    components = replace(loaded.components, capacity=Capacity(2, LONGEST))
    given = {"head_rows": head_rows, "attention": attention, "kv_cache": kv_cache}
    model, calls = recording(card, lambda: KimiAudio.from_components(components, **given))
    check_dtypes(calls, HALF)
    names = {call.name for call in calls}
    assert {"add_rms_norm", "rms_norm", "silu_mul"} <= names
    assert ("rotate_append_attend" in names) == (attention == "triton")
    rows = model.language_model.text_head.weight.shape[0]
    assert (rows < model.language_model.config.vocab_size) == (head_rows == "track")
    check_dtypes(answer(card, model, features), HALF, widest=168448)


def test_batch(card: FakeCuda, loaded: Loaded, features: Tensor) -> None:
    """Text and speech side by side, one of which has more to read than what is recorded first."""
    components = replace(loaded.components, capacity=Capacity(2, 2 * LONGEST))
    with card.active() as ledger, ledger.calls() as calls:
        model = KimiAudio.from_components(components, kv_cache="fp8")
        decoder = model.decoder
        for copies, output in ((1, "both"), (4, "text")):
            message = EncodedMessage("user", "audio", codes=[0] * CODES)
            prompt = model.prompt_builder.build([message] * copies, output)
            heard = torch.cat([features] * copies)
            parameters = parse_parameters(**SAMPLED | {"output_type": output})
            generation = model.generation(prompt, heard, parameters, SeededRandomness(copies))
            for _ in decoder.begin(generation):
                pass
            for _ in range(3):
                list(decoder.step())
            assert decoder.running[-1] is generation
        # The text goes to other places, by way of the host.
        room, start = decoder.room, decoder.room.starts[generation]
        assert room.spans.resize(start, generation.positions_launched) and room.spans.take(1)
        list(decoder.step())
        assert room.starts[generation] != start and decoder.running[-1] is generation
    check_dtypes(calls, HALF, widest=4 * 168448)
    # The second piece of the longer prompt, without a matrix of its scores.
    read = [call.name for call in calls].count("_scaled_dot_product_flash_attention")
    assert read == model.language_model.config.trunk_layers


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "none"])
def test_quantization(
    scheme: str, card: FakeCuda, directory: Path, features: Tensor, long: bool
) -> None:
    """Quantized while it is loaded; steps of all sizes use the kernel, a prompt is dequantized."""
    if scheme == "int8" and not long:
        pytest.skip("the other schemes have matrices in int8, too; runs with --long")
    gc.collect()
    with card.active() as ledger:
        before = ledger.live
        components = load_components(directory, False, CUDA, HALF, quantization=scheme, slots=2)
        taken = ledger.live - before
        model = KimiAudio.from_components(components)
    decoder = model.decoder  # which has recorded steps of text alone
    given = decoder.model, decoder.control, decoder.capacity
    _, calls = recording(card, lambda: Decoder(*given, slots=2, places=decoder.capacity))
    check_dtypes(calls, HALF)
    assert model.decoder.batches == [1, 2]
    sizes = decoder.model.config
    layers = sizes.trunk_layers, sizes.total_layers, sizes.fork_layer + 1 + sizes.mimo_layers
    assert sum(call.name == "matrix_vector" for call in calls) == 2 * 4 * sum(layers)
    check_dtypes(answer(card, model, features), HALF, widest=168448)
    encoders = components.whisper.module, components.speech_tokenizer.module
    weights = sum(p.nbytes for m in (components.language_model, *encoders) for p in m.parameters())
    assert weights <= taken < weights + 10**6
    with card.active():
        planned = language_model(components.language_model.config, scheme)
    model_bytes = sum(p.nbytes for p in components.language_model.parameters())
    assert model_bytes == weight_bytes(planned, HALF)


def test_offloaded_encoders(card: FakeCuda, directory: Path, patch: pytest.MonkeyPatch) -> None:
    """Their weights wait in host memory and are on the device while they encode."""
    patch.setattr(Tensor, "pin_memory", lambda tensor: tensor)  # the fake mode has no such memory
    with card.active() as ledger:
        components = load_components(directory, False, CUDA, HALF, offload="encoders")
        for encoder in (components.whisper, components.speech_tokenizer):
            module = encoder.module
            encoder.extractor = NoFeatures()
            weights, before = sum(p.nbytes for p in module.parameters()), ledger.live
            with ledger.peak_within() as peak:
                found = encoder.encode(WAVE)
            assert found.is_cuda and len(found) == CODES
            assert peak[0] - before >= weights
            assert ledger.live - before < weights / 10
            assert not any(parameter.is_cuda for parameter in module.parameters())


def test_speech(card: FakeCuda, loaded: Loaded) -> None:
    """Chunks of all sizes of both presets, after a reference voice and without."""
    detokenizer = loaded.model.detokenizer
    bins, size = detokenizer.dit.config.mel_bins, detokenizer.dit.config.hidden_size
    voice = torch.zeros(250, bins), [0] * 250
    for prepare in (lambda stream: None, lambda stream: stream.prefill(*voice)):
        with card.active() as ledger, ledger.calls() as calls:
            stream = detokenizer.start(lambda chunk, frames: torch.zeros(frames, bins))
            prepare(stream)
            waves = [
                stream.push([0] * codes, final)
                for codes, final in ((16, False), (8, False), (30, False), (5, True))
            ]
        assert sum(len(wave) for wave in waves) == 59 * detokenizer.samples_per_code
        assert all(wave.is_cuda and wave.dtype is torch.float32 for wave in waves)
        frames = 250 + detokenizer.config.largest_chunk_frames
        check_dtypes(calls, HALF, widest=2 * frames * size)


def test_speech_of_several_streams(card: FakeCuda, loaded: Loaded) -> None:
    """Chunks of many sizes together; the host waits for nothing and nothing is recorded."""
    detokenizer = loaded.model.detokenizer
    bins = detokenizer.dit.config.mel_bins
    sizes = [(16, 8, 16, 30, 7), (30, 30, 30, 30, 30), (30, 30, 30, 30, 1), (16, 8, 16, 30, 30)]
    with card.active() as ledger:
        streams = [detokenizer.start(lambda _, frames: torch.zeros(frames, bins)) for _ in range(4)]
        with (
            ledger.without_waiting(),
            mock.patch.object(FakeGraphs, "record", side_effect=AssertionError),
        ):
            for turn in range(5):
                jobs = [
                    ChunkJob(stream, [0] * codes[turn], final=turn == 4)
                    for stream, codes in zip(streams, sizes, strict=True)
                ]
                waves = detokenizer.push_together(jobs)
    assert all(wave.is_cuda and wave.dtype is torch.float32 for wave in waves)
    with card.active() as ledger, ledger.without_waiting(), pytest.raises(HostWaits):
        torch.zeros(1).to(CUDA)


def host_weight(model: KimiAudio) -> Callable[[], None]:
    norm = model.language_model.layers[3].feed_forward_norm
    kept, norm.weight = norm.weight, nn.Parameter(torch.ones(3584, dtype=HALF), False)
    return lambda: setattr(norm, "weight", kept)


def hook(change: Callable[[Tensor], Tensor]) -> Callable[[KimiAudio], Callable[[], None]]:
    """Changes what one feed-forward gives."""

    def plant(model: KimiAudio) -> Callable[[], None]:
        layer = model.language_model.layers[3].feed_forward
        return layer.register_forward_hook(lambda module, given, out: change(out)).remove

    return plant


def wide_constant(x: Tensor) -> Tensor:
    return (x * torch.ones(x.shape[-1], device=CUDA)).to(x.dtype)


def second_device(model: KimiAudio) -> Callable[[], None]:
    norm = model.language_model.layers[3].feed_forward_norm
    kept, norm.weight = norm.weight, nn.Parameter(norm.weight.to(SECOND), False)
    return lambda: setattr(norm, "weight", kept)


FAULTS = {
    "a weight on the second device": (second_device, RuntimeError),
    "a constant copied from the second device": (
        hook(lambda x: x * torch.ones(3584, dtype=HALF, device=SECOND).to(CUDA)), CannotBeRecorded
    ),
    "a weight on the host": (host_weight, CannotBeRecorded),
    "a constant on the host": (hook(lambda x: x * torch.ones(3584, dtype=HALF)), RuntimeError),
    "a constant copied from the host": (
        hook(lambda x: x * torch.ones(3584, dtype=HALF).to(CUDA)), CannotBeRecorded
    ),
    "a float32 constant": (hook(wide_constant), AssertionError),
    "a float32 activation": (hook(lambda x: x.float()), AssertionError),
    "a value that the host reads": (
        hook(lambda x: x * x[0, 0, 0].item()), DataDependentOutputException
    ),
    "a condition on a value": (
        hook(lambda x: x if x.sum() > 0 else -x), DataDependentOutputException
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, card: FakeCuda, loaded: Loaded) -> None:
    plant, error = FAULTS[fault]
    decoder = loaded.model.decoder
    given = decoder.model, decoder.control, decoder.capacity
    with card.active():
        remove = plant(loaded.model)
    try:
        with pytest.raises(error):
            _, calls = recording(card, lambda: Decoder(*given, slots=2, places=decoder.capacity))
            check_dtypes(calls, HALF)
    finally:
        with card.active():
            remove()
