"""What a model needs in memory, and that one which does not fit is refused before it is loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from kimia_infer.api import loading
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.memory import (
    GB,
    RESERVE,
    MemoryPlan,
    free_memory,
    language_model,
    weight_bytes,
)
from kimia_infer.layers import operators
from kimia_infer.layers.quantization import SCHEMES
from kimia_infer.models.kimi_audio.components import checkpoint_components
from kimia_infer.models.kimi_audio.dit import DiT
from kimia_infer.models.kimi_audio.slim import prepare_weights
from kimia_infer.models.kimi_audio.speech_tokenizer import SpeechTokenizer
from kimia_infer.models.kimi_audio.vocoder import Vocoder
from kimia_infer.utils.errors import ConfigurationError
from scripts.benchmark.sizes import PUBLISHED
from tests.paths import ROOT

MINI = ROOT / "weights" / "mini"
CPU, GPU, HALF = torch.device("cpu"), torch.device("cuda:0"), torch.bfloat16
CONTEXT = 0.4 * GB
"""Of a CUDA device, before anything is loaded."""

CARDS = {16: 15.6, 24: 23.6, 48: 47.4, 80: 79.2, 141: 139.8}
"""GiB that the driver shows, by the GB on the box."""


@pytest.fixture(scope="module")
def published() -> MemoryPlan:
    with torch.device("meta"):
        encoders = (
            weight_bytes(SpeechTokenizer(PUBLISHED.speech_tokenizer), torch.float32),
            weight_bytes(WhisperEncoder(PUBLISHED.whisper), HALF),
        )
        detokenizer = sum(
            weight_bytes(module, HALF)
            for module in (DiT(PUBLISHED.dit), Vocoder(PUBLISHED.vocoder))
        )
    return MemoryPlan(PUBLISHED.language_model, HALF, "none", encoders, detokenizer)


@pytest.fixture
def ada(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU is one that has everything."""

    class Ada:
        def get_device_capability(self, device: torch.device) -> tuple[int, int]:
            return 8, 9

    monkeypatch.setattr(operators, "missing", lambda device: None)
    monkeypatch.setattr(torch, "get_device_module", lambda device: Ada())


def room(card: int) -> int:
    return round(CARDS[card] * 2**30 - CONTEXT)


@pytest.mark.parametrize(
    ("card", "scheme", "speech", "offload", "fits"),
    [
        (16, "int4", True, False, False),
        (16, "int4", True, True, True),
        (16, "int4", False, False, True),
        (16, "int8", False, False, False),
        (16, "int8", True, True, False),
        (24, "none", True, False, False),
        (24, "int8", True, False, True),
        (24, "fp8", True, False, True),
        (48, "none", True, False, True),
        (80, "none", True, False, True),
        (141, "none", True, False, True),
    ],
)
def test_what_fits_where(
    card: int, scheme: str, speech: bool, offload: bool, fits: bool, published: MemoryPlan
) -> None:
    needed = replace(published, offload=offload).needed(scheme, speech)
    assert (needed <= room(card)) == fits


def test_the_limits_that_are_promised(published: MemoryPlan) -> None:
    assert published.needed("int8", True) <= 22 * GB
    assert published.needed("int4", False) <= 15 * GB


def test_what_is_counted(published: MemoryPlan) -> None:
    config = PUBLISHED.language_model
    cache = 2 * 34 * 4 * 128 * 7500
    narrow = replace(published, kv_cache="fp8")
    assert published.needed("none", True) - narrow.needed("none", True) == cache
    spoken = published.needed("int8", True) - published.needed("int8", False)
    assert spoken == published.detokenizer > 3.5 * GB
    # Attention stays in 8 bits: the feed-forward matrices lose 3.5 bits a value and the scales
    # of rows; gate and up are unpacked to bytes on their way.
    values = 34 * 3 * config.hidden_size * config.intermediate_size
    scales = 34 * 2 * (2 * config.intermediate_size + config.hidden_size)
    matrix = 2 * config.hidden_size * config.intermediate_size
    saved = published.needed("int8", True) - published.needed("int4", True)
    assert saved == values - values * 9 // 16 + scales - matrix
    offloaded = replace(published, offload=True)
    assert published.needed("int4", True) - offloaded.needed("int4", True) == sum(
        published.encoders
    )
    # Where reading a prompt takes less than an encoder, it is the encoder that needs the room.
    tiny = replace(published, config=replace(config, intermediate_size=32), offload=True)
    weights = weight_bytes(language_model(tiny.config, "int8"), HALF)
    assert tiny.needed("int8", False) == weights + max(tiny.encoders) + 2 * cache + RESERVE


@pytest.mark.parametrize(
    ("card", "scheme", "speech", "message"),
    [
        (24, "none", True, r"'none' with text and speech needs 28\.\d GB, and cuda:0 has 24\.9 GB "
         r"free; use quantization 'fp8' .* or quantization 'int8' with text and speech "
         r"\(21\.\d GB\) or quantization 'int4' with text and speech \(18\.\d GB\)$"),
        (16, "int8", True, r"use quantization 'int4' and offload 'encoders' with text and speech "
         r"\(15\.\d GB\)$"),
        (16, "int8", False, r"use quantization 'int4' with text alone \(load_detokenizer=False, in "
         r"a service KIMI_AUDIO_OUTPUT=text\) \(14\.\d GB\)$"),
    ],
)  # fmt: skip
def test_refusals_name_what_fits(
    card: int, scheme: str, speech: bool, message: str, published: MemoryPlan, ada
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        published.check(scheme, speech, GPU, room(card))


@pytest.mark.parametrize(
    ("free", "speech", "message"),
    [
        (21.0, True, r"use quantization 'int8' and kv_cache 'fp8' with text and speech \(2.*\)$"),
        (20.0, True, r"use quantization 'int8' and offload 'encoders' with text and speech "
         r"\(18\.\d GB\)$"),
        (16.0, True, r"use quantization 'int4' of the checkpoint that this one was made from and "
         r"offload 'encoders' with text and speech \(15\.\d GB\)$"),
        (15.2, True, r"use quantization 'int8' and offload 'encoders' with text alone \("),
        (9.0, True, "nothing smaller fits$"),
    ],
)  # fmt: skip
def test_quantized_checkpoints_are_offered_as_they_are_first(
    free: float, speech: bool, message: str, published: MemoryPlan, ada
) -> None:
    plan = replace(published, stored="int8")
    with pytest.raises(ConfigurationError, match=message):
        plan.check("int8", speech, GPU, round(free * GB))


def test_schemes_that_do_not_suit_the_model_are_not_offered(published: MemoryPlan, ada) -> None:
    """Rows of 48 values are no whole groups of int4, whatever was asked for."""
    odd = replace(published, config=replace(PUBLISHED.language_model, intermediate_size=48))
    with pytest.raises(ConfigurationError, match=r"'none' with text and speech needs .* GB free; "):
        odd.check("none", True, GPU, odd.needed("none", True) - 1)
    with pytest.raises(ConfigurationError) as caught:
        odd.check("int8", True, GPU, odd.needed("fp8", False) - 1)
    assert "int4" not in str(caught.value)


def test_what_the_device_cannot_compute_is_not_offered(
    published: MemoryPlan, ada, monkeypatch
) -> None:
    monkeypatch.setattr(operators, "missing", lambda device: "no C compiler is found")
    with pytest.raises(ConfigurationError, match=r"use quantization 'none' with text alone"):
        published.check("none", True, GPU, round(25.5 * GB))
    with pytest.raises(ConfigurationError, match="nothing smaller fits"):
        published.check("none", True, GPU, 10 * GB)
    published.check("none", True, GPU, 30 * GB)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_refused_before_anything_is_loaded(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "free_memory", lambda device: RESERVE)
    monkeypatch.setattr(loading, "load_modules", load)
    with pytest.raises(
        ConfigurationError, match=rf"memory: quantization '{scheme}' with text and speech"
    ):
        KimiAudio(str(MINI), device="cpu", quantization=scheme)
    with pytest.raises(ConfigurationError, match=r"with text alone .* nothing smaller fits"):
        KimiAudio(str(MINI), False, device="cpu", quantization=scheme)


def test_a_prepared_checkpoint_offers_what_can_be_done_with_it(tmp_path, monkeypatch) -> None:
    prepare_weights(MINI, tmp_path / "int8", quantization="int8")
    parts = checkpoint_components(tmp_path / "int8", quantized=True)
    plan = loading.memory_plan(tmp_path / "int8", parts, torch.float32, "none", False)
    assert plan.stored == "int8"
    monkeypatch.setattr(loading, "free_memory", lambda device: plan.needed("int8", True) - 1)
    with pytest.raises(ConfigurationError) as caught:
        KimiAudio(str(tmp_path / "int8"), device="cpu")
    assert str(caught.value).count("quantization 'int8'") == 2  # what was asked, and what fits
    assert not any(f"quantization '{other}'" in str(caught.value) for other in ("fp8", "int4"))
    monkeypatch.setattr(operators, "missing", lambda device: "no C compiler is found")
    with pytest.raises(
        ConfigurationError, match=r"use the checkpoint that .* with quantization 'none'$"
    ):
        loading.load_components(tmp_path / "int8", True, GPU, HALF)


def test_a_checkpoint_is_counted_as_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(loading, "free_memory", lambda device: 2 * RESERVE)
    plan = loading.memory_plan
    monkeypatch.setattr(loading, "memory_plan", lambda *given: seen.append(plan(*given)) or seen[0])
    components = loading.load_components(MINI, True, CPU, HALF, quantization="int8", kv_cache="fp8")

    def held(*modules: torch.nn.Module) -> int:
        return sum(p.nbytes for module in modules for p in module.parameters())

    (found,) = seen
    assert found.kv_cache == "fp8" and not found.offload
    encoders = components.speech_tokenizer.module, components.whisper.module
    assert found.encoders == tuple(held(module) for module in encoders)
    assert found.detokenizer == held(components.detokenizer.dit, components.detokenizer.vocoder)
    rest = replace(found, detokenizer=0, encoders=()).needed("int8", False)
    empty = rest - found.cache_bytes() - found.work_bytes("int8") - RESERVE
    assert empty == held(components.language_model)


def test_the_memory_of_the_host_is_left_to_it() -> None:
    assert free_memory(CPU) is free_memory(torch.device("mps")) is None


def test_what_the_allocator_holds_idle_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an earlier model, whose memory PyTorch has kept for itself."""
    idle = [3 * GB]
    monkeypatch.setattr(torch.accelerator, "empty_cache", idle.clear)
    monkeypatch.setattr(
        torch.accelerator, "get_memory_info", lambda device: (10 * GB - sum(idle), 10 * GB)
    )
    assert free_memory(GPU) == 10 * GB
