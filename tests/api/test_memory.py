"""What a model needs in memory, and that one which does not fit is refused before it is loaded."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from kimia_infer.api import devices, loading, memory
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.memory import (
    CONVERSATION,
    DEFAULT_CAPACITY,
    GB,
    LONGEST,
    RESERVE,
    Capacity,
    MemoryPlan,
    SpeechSizes,
    free_memory,
)
from kimia_infer.api.parameters import MAX_SLOTS
from kimia_infer.layers import operators
from kimia_infer.layers.quantization import SCHEMES
from kimia_infer.models.kimi_audio.slim import prepare_weights
from kimia_infer.utils.errors import ConfigurationError
from scripts.benchmark.serving_memory import FIRST as GPU
from scripts.benchmark.serving_memory import SECOND, free_bytes, published_plan
from scripts.benchmark.sizes import PUBLISHED
from tests.paths import ROOT

MINI = ROOT / "weights" / "mini"
CPU, HALF = torch.device("cpu"), torch.bfloat16


@pytest.fixture(scope="module")
def published() -> MemoryPlan:
    return published_plan()


@pytest.fixture
def ada(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU is one that has everything."""

    class Ada:
        def get_device_capability(self, device: torch.device) -> tuple[int, int]:
            return 8, 9

        def device_count(self) -> int:
            return 1

    monkeypatch.setattr(operators, "missing", lambda device: None)
    monkeypatch.setattr(torch, "get_device_module", lambda device: Ada())


@pytest.mark.parametrize(
    ("card", "scheme", "speech", "offload", "fits"),
    [
        (16, "int4", True, False, False),
        (16, "int4", True, True, True),
        (16, "int4", False, False, True),
        (16, "int8", False, False, True),
        (16, "none", False, True, False),
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
    plan = replace(published, offload=offload)
    found = plan.capacity(scheme, speech, {GPU: free_bytes(card)})
    assert (found is not None) == fits == (plan.needed(scheme, speech)[GPU] <= free_bytes(card))


def test_the_limits_that_are_promised(published: MemoryPlan) -> None:
    assert published.needed("int8", True)[GPU] <= 22 * GB
    assert published.needed("int4", False)[GPU] <= 15 * GB


def test_what_is_counted(published: MemoryPlan) -> None:
    config, sizes = PUBLISHED.language_model, published.sizes

    def total(plan: MemoryPlan, scheme: str, speech: bool, slots: int = 1) -> int:
        return plan.needed(scheme, speech, slots)[GPU]

    cache = 2 * 34 * 4 * 128
    narrow = replace(published, kv_cache="fp8")
    assert total(published, "none", True) - total(narrow, "none", True) == cache * 7500
    spoken = total(published, "int8", True) - total(published, "int8", False)
    mimo = 2 * 6 * 4 * 128 * 2 * 7500  # keys and values of layers that text does without
    assert sizes.detokenizer > 3.5 * GB
    # Alone, speech is made when the prompt was read.
    synthesis = sizes.past + sizes.conditioning - published.reading_bytes("int8")
    assert spoken == mimo + sizes.detokenizer + 2 * sizes.past + sizes.row + synthesis
    assert sizes.past == 2 * 16 * 18 * 900 * 128 * 2
    # A slot has past frames, those of a voice, and from the sixth on a conversation.
    each = 2 * sizes.past
    steps = [total(published, "int8", True, slots) for slots in range(1, 8)]
    # Steps, and the draws of them, are recorded for powers of two.
    choosing = [config.vocab_size * (rows * (47 + 2 * 2) + 2 * 2) for rows in (1, 2, 4, 4, 8, 8, 8)]
    steps = [total - chosen for total, chosen in zip(steps, choosing, strict=True)]
    row = sizes.row + sizes.past  # of chunks that are made together: one, two or four
    reading = published.reading_bytes("int8")
    expected = [row + reading, 0, 2 * row, 0, 2 * cache * 1500, 2 * cache * 1500]
    assert [b - a - each for a, b in pairwise(steps)] == expected
    # Attention stays in 8 bits: the feed-forward matrices lose 3.5 bits a value and the scales
    # of rows; gate and up are unpacked to bytes on their way.
    values = 34 * 3 * config.hidden_size * config.intermediate_size
    scales = 34 * 2 * (2 * config.intermediate_size + config.hidden_size)
    matrix = 2 * config.hidden_size * config.intermediate_size
    reading = published.reading_bytes("int8"), published.reading_bytes("int4")
    saved = total(published, "int8", False) - total(published, "int4", False)
    assert saved == values - values * 9 // 16 + scales + reading[0] - reading[1]
    assert reading[1] == reading[0] + matrix
    # Reading a prompt takes more than encoding, unless an encoder has to be copied for that.
    offloaded = replace(published, offload=True)
    visiting = max(sizes.encoders) + sizes.encoding
    saved = total(published, "int4", False) - total(offloaded, "int4", False)
    assert saved == sum(sizes.encoders) + reading[1] - visiting


def test_two_devices(published: MemoryPlan) -> None:
    """Everything is counted once, and what both need on both."""
    plan, sizes = replace(published, speech_device=SECOND), published.sizes
    for scheme, slots in (("none", 2), ("int4", 9)):
        needed = plan.needed(scheme, True, slots)
        together = published.needed(scheme, True, slots)[GPU]
        spared = min(plan.reading_bytes(scheme), sizes.encoding)  # not at the same time
        assert list(needed) == [GPU, SECOND]
        assert sum(needed.values()) == together + RESERVE + spared
        heard = sum(sizes.encoders) + sizes.encoding
        speaking = sum(sizes.speaking(slots))
        assert needed[SECOND] == heard + sizes.detokenizer + speaking + RESERVE
    alone = plan.needed("none", True)[SECOND]
    kept, synthesis = sizes.speaking(1)
    assert alone == sum(sizes.encoders) + sizes.detokenizer + kept + synthesis + RESERVE
    silent = plan.needed("none", False)
    assert silent[SECOND] == heard + RESERVE
    host = replace(plan, speech_device=CPU)
    free = {GPU: needed[GPU]}
    assert host.capacity("int4", True, free, 9) == Capacity(9, 9 * CONVERSATION)
    assert host.capacity("int4", True, {GPU: needed[GPU] - 1}, 9) is None


def test_as_many_slots_as_fit(published: MemoryPlan) -> None:
    for slots in (1, 2, 5, 7, MAX_SLOTS):
        needed = published.needed("int8", True, slots)[GPU]
        least = max(LONGEST, slots * CONVERSATION)
        assert published.capacity("int8", True, {GPU: needed}) == Capacity(slots, least)
        assert published.capacity("int8", True, {GPU: needed}, slots) == Capacity(slots, least)
        fewer = published.capacity("int8", True, {GPU: needed - 1})
        assert fewer is None if slots == 1 else fewer.slots == slots - 1
        assert published.capacity("int8", True, {GPU: needed - 1}, slots) is None
    # What is left is for longer requests, down to the last position, up to the longest in each.
    size = published.position_bytes(True)
    spare = {GPU: published.needed("int8", True, 2)[GPU] + 9 * size - 1}
    assert published.capacity("int8", True, spare, 2) == Capacity(2, LONGEST + 8)
    assert published.capacity("int8", True, {GPU: 80 * GB}) == Capacity(32, 32 * LONGEST)
    # The scarcer of two devices decides.
    plan = replace(published, speech_device=SECOND)
    needed = plan.needed("none", True, 4)
    for free in ({**needed, GPU: 80 * GB}, {**needed, SECOND: 80 * GB}):
        found = plan.capacity("none", True, free)
        assert found is not None and found.slots == 4


def test_slots_that_do_not_fit_are_refused(published: MemoryPlan) -> None:
    free = {GPU: free_bytes(24)}
    with pytest.raises(
        ConfigurationError,
        match=r"^slots: quantization 'int8' with text and speech needs 33\.\d GB on cuda:0, where "
        r"24\.9 GB are free, for 32 requests at a time; 9 fit$",
    ):
        published.check("int8", True, free, 32)
    assert published.check("int8", True, free, 9).slots == 9


@pytest.mark.parametrize(
    ("card", "scheme", "speech", "message"),
    [
        (24, "none", True, r"'none' with text and speech needs 28\.\d GB on cuda:0, where 24\.9 GB "
         r"are free; use quantization 'fp8' .* or quantization 'int8' with text and speech "
         r"\(20\.\d GB\) or quantization 'int4' with text and speech \(17\.\d GB\)$"),
        (16, "int8", True, r"use quantization 'int4' and offload 'encoders' with text and speech "
         r"\(15\.\d GB\)$"),
        (16, "none", False, r"use quantization 'fp8' with text alone \(load_detokenizer=False, in "
         r"a service KIMI_AUDIO_OUTPUT=text\) \(16\.\d GB\) or quantization 'int8' with "
         r"text alone .* or quantization 'int4' with text alone"),
    ],
)  # fmt: skip
def test_refusals_name_what_fits(
    card: int, scheme: str, speech: bool, message: str, published: MemoryPlan, ada
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        published.check(scheme, speech, {GPU: free_bytes(card)})


@pytest.mark.parametrize(
    ("free", "speech", "message"),
    [
        (20.5, True, r"use quantization 'int8' and kv_cache 'fp8' with text and speech \(2.*\)$"),
        (20.0, True, r"use quantization 'int8' and offload 'encoders' with text and speech "
         r"\(19\.\d GB\)$"),
        (16.5, True, r"use quantization 'int4' of the checkpoint that this one was made from and "
         r"offload 'encoders' with text and speech \(15\.\d GB\)$"),
        (15.0, True, r"use quantization 'int8' and offload 'encoders' with text alone \("),
        (9.0, True, "nothing smaller fits$"),
    ],
)  # fmt: skip
def test_quantized_checkpoints_are_offered_as_they_are_first(
    free: float, speech: bool, message: str, published: MemoryPlan, ada
) -> None:
    plan = replace(published, stored="int8")
    with pytest.raises(ConfigurationError, match=message):
        plan.check("int8", speech, {GPU: round(free * GB)})


def test_schemes_that_do_not_suit_the_model_are_not_offered(published: MemoryPlan, ada) -> None:
    """Rows of 48 values are no whole groups of int4, whatever was asked for."""
    odd = replace(published, config=replace(PUBLISHED.language_model, intermediate_size=48))
    with pytest.raises(
        ConfigurationError, match=r"'none' with text and speech needs .* are free; "
    ):
        odd.check("none", True, {GPU: odd.needed("none", True)[GPU] - 1})
    with pytest.raises(ConfigurationError) as caught:
        odd.check("int8", True, {GPU: odd.needed("fp8", False)[GPU] - 1})
    assert "int4" not in str(caught.value)


def test_what_the_device_cannot_compute_is_not_offered(
    published: MemoryPlan, ada, monkeypatch
) -> None:
    monkeypatch.setattr(operators, "missing", lambda device: "no C compiler is found")
    with pytest.raises(ConfigurationError, match=r"use quantization 'none' with text alone"):
        published.check("none", True, {GPU: round(25.5 * GB)})
    with pytest.raises(ConfigurationError, match="nothing smaller fits"):
        published.check("none", True, {GPU: 10 * GB})
    published.check("none", True, {GPU: 30 * GB})


@pytest.mark.parametrize(
    ("scheme", "second", "message"),
    [
        ("none", 15.6, r"use quantization 'none' and speech_device 'cuda:1' with text and speech "
         r"\(21\.\d GB and 8\.\d GB\) or quantization 'fp8' with text and speech \(20\.\d GB\)"),
        ("none", 7.0, r"use quantization 'fp8' with text and speech \("),
    ],
)  # fmt: skip
def test_a_second_device_is_offered(
    scheme: str, second: float, message: str, published: MemoryPlan, ada, monkeypatch
) -> None:
    free = {GPU: free_bytes(24), SECOND: round(second * 2**30)}
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(memory, "free_memory", lambda devices: {d: free[d] for d in devices})
    with pytest.raises(ConfigurationError, match=message):
        published.check(scheme, True, {GPU: free[GPU]})
    plan = replace(published, speech_device=SECOND)
    if second > 10:
        assert plan.check(scheme, True, free).slots == 26
    else:
        with pytest.raises(
            ConfigurationError,
            match=r"'none' and speech_device 'cuda:1' with text and speech needs 8\.\d GB on "
            r"cuda:1, where 7\.\d GB are free; ",
        ):
            plan.check(scheme, True, free)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_refused_before_anything_is_loaded(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "free_memory", lambda devices: {CPU: RESERVE})
    monkeypatch.setattr(loading, "load_modules", load)
    with pytest.raises(
        ConfigurationError, match=rf"memory: quantization '{scheme}' with text and speech"
    ):
        KimiAudio(str(MINI), device="cpu", quantization=scheme)
    with pytest.raises(ConfigurationError, match=r"with text alone .* nothing smaller fits"):
        KimiAudio(str(MINI), False, device="cpu", quantization=scheme)


def planned(monkeypatch: pytest.MonkeyPatch, free: int | None, *given, **named):
    """The components loaded with ``free`` bytes, None for the host's, and the plan for them."""
    seen, check = [], MemoryPlan.check

    def watched(plan: MemoryPlan, *asked) -> Capacity:
        seen.append(plan)
        return check(plan, *asked)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryPlan, "check", watched)
        if free is not None:
            patch.setattr(loading, "free_memory", lambda devices: dict.fromkeys(devices, free))
        components = loading.load_components(*given, **named)
    return components, seen[0]


def test_a_prepared_checkpoint_offers_what_can_be_done_with_it(tmp_path, monkeypatch) -> None:
    prepare_weights(MINI, tmp_path / "int8", quantization="int8")
    _, plan = planned(monkeypatch, None, tmp_path / "int8", True, CPU, torch.float32)
    assert plan.stored == "int8"
    free = {CPU: plan.needed("int8", True)[CPU] - 1}
    monkeypatch.setattr(loading, "free_memory", lambda devices: free)
    with pytest.raises(ConfigurationError) as caught:
        KimiAudio(str(tmp_path / "int8"), device="cpu")
    assert str(caught.value).count("quantization 'int8'") == 2  # what was asked, and what fits
    assert not any(f"quantization '{other}'" in str(caught.value) for other in ("fp8", "int4"))
    monkeypatch.setattr(operators, "missing", lambda device: "no C compiler is found")
    with pytest.raises(
        ConfigurationError, match=r"use the checkpoint that .* with quantization 'none'$"
    ):
        loading.load_components(tmp_path / "int8", True, GPU, HALF)


def test_what_is_reserved_for_others_is_not_given_to_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, plan = planned(monkeypatch, None, MINI, True, CPU, HALF)
    least = plan.needed("none", True)[CPU]
    for reserved, fits in ((1000, True), (1001, False)):
        monkeypatch.setattr(loading, "free_memory", lambda devices: {CPU: least + 1000})
        with contextlib.nullcontext() if fits else pytest.raises(ConfigurationError):
            loading.load_components(MINI, True, CPU, HALF, reserved=reserved)


def test_a_checkpoint_is_counted_as_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    components, found = planned(
        monkeypatch, 2 * RESERVE, MINI, True, CPU, HALF, quantization="int8", kv_cache="fp8"
    )

    def held(*modules: torch.nn.Module) -> int:
        return sum(p.nbytes for module in modules for p in module.parameters())

    assert found.kv_cache == "fp8" and not found.offload
    assert found.device == found.speech_device == CPU
    encoders = components.speech_tokenizer.module, components.whisper.module
    speaking = components.detokenizer.dit, components.detokenizer.vocoder
    assert found.sizes == SpeechSizes.of(*encoders, *speaking)
    assert found.sizes.encoders == tuple(held(module) for module in encoders)
    assert found.sizes.detokenizer == held(*speaking)
    rest = replace(found, sizes=SpeechSizes((), 0)).needed("int8", False)[CPU]
    cache = LONGEST * found.position_bytes(False)
    weights = rest - cache - found.choosing_bytes(1) - found.reading_bytes("int8") - RESERVE
    assert weights == held(components.language_model)
    assert components.capacity.slots == 32 and components.capacity.positions > LONGEST


def test_slots_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's memory is not counted: 8 requests by default, each as long as it may be."""
    assert KimiAudio(str(MINI), device="cpu").capacity == DEFAULT_CAPACITY == Capacity(8, 60000)
    assert KimiAudio(str(MINI), device="cpu", slots=3).capacity == Capacity(3, 22500)
    monkeypatch.setattr(loading, "load_modules", None)
    for wrong in (0, 33, -1, 2.0, True, "8"):
        with pytest.raises(ConfigurationError, match=r"^slots: expected 1 to 32, found "):
            KimiAudio(str(MINI), device="cpu", slots=wrong)
    with pytest.raises(ConfigurationError, match=r"^speech_device: .* found 'cuda:99'"):
        KimiAudio(str(MINI), device="cpu", speech_device="cuda:99")


def test_devices_are_told_apart_by_their_index(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["cpu", "cuda", "cuda:0", "cuda:1"]
    monkeypatch.setattr(devices, "available_devices", lambda: names)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    for name, device in (("cuda", SECOND), ("cuda:1", SECOND), ("cuda:0", GPU), ("cpu:0", CPU)):
        assert devices.parse_device(name) == device
    monkeypatch.setattr(devices, "default_device", lambda: torch.device("cuda"))
    assert devices.parse_device(None) == SECOND
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    assert memory.other_devices(SECOND) == [GPU, torch.device("cuda:2")]
    assert memory.other_devices(CPU) == []


def test_the_memory_of_the_host_is_left_to_it() -> None:
    assert free_memory([CPU, torch.device("mps")]) == {}


def test_what_the_allocator_holds_idle_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an earlier model, whose memory PyTorch has kept for itself."""
    idle = [3 * GB]
    monkeypatch.setattr(torch.accelerator, "empty_cache", idle.clear)
    monkeypatch.setattr(
        torch.accelerator, "get_memory_info", lambda device: (10 * GB - sum(idle), 10 * GB)
    )
    assert free_memory([GPU, CPU]) == {GPU: 10 * GB}
