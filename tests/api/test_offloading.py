"""Encoders that wait in host memory: the same results, on the device only while they compute."""

from __future__ import annotations

import pytest
import torch

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.loading import load_components
from kimia_infer.api.offloading import check_offload, copied_to
from kimia_infer.serving.cog.self_test import self_test
from kimia_infer.utils.errors import ConfigurationError
from kimia_infer.utils.graphs import Direct
from tests.paths import ROOT

MINI, QUESTION = ROOT / "weights" / "mini", ROOT / "scripts" / "question.wav"
CPU, META = torch.device("cpu"), torch.device("meta")


def test_a_module_visits_and_returns() -> None:
    module = torch.nn.Linear(3, 2)
    before = [p.data_ptr() for p in module.parameters()]
    with copied_to(module, META):
        assert all(p.is_meta for p in module.parameters())
        assert module(torch.empty(1, 3, device=META)).is_meta
    assert [p.data_ptr() for p in module.parameters()] == before


def test_it_returns_after_a_failure() -> None:
    module = torch.nn.Linear(3, 2)
    before = [p.data_ptr() for p in module.parameters()]
    with pytest.raises(KeyError), copied_to(module, META):
        raise KeyError
    assert [p.data_ptr() for p in module.parameters()] == before


@pytest.fixture(scope="module")
def models() -> tuple[KimiAudio, KimiAudio]:
    """Plain and offloaded, both on the CPU."""
    return tuple(
        KimiAudio.from_components(load_components(MINI, True, CPU, torch.float32, offload=offload))
        for offload in (None, "encoders")
    )


def test_answers_are_the_same(models, monkeypatch: pytest.MonkeyPatch) -> None:
    """One encoder at a time visits, and each for every sound."""
    from kimia_infer.api import offloading

    visits, inside = [], []

    def watched(module, device):
        assert device == CPU and not inside
        visits.append(module)
        return copied_to(module, device)

    monkeypatch.setattr(offloading, "copied_to", watched)
    chat = [{"role": "user", "message_type": "audio", "content": str(QUESTION)}]
    plain, offloaded = (
        model.generate(chat, "both", max_new_tokens=20, seed=1, voice=str(QUESTION))
        for model in models
    )
    assert plain[1] == offloaded[1] and torch.equal(plain[0], offloaded[0])
    codes, features = models[1].speech_codes.module, models[1].whisper_features.module
    assert visits == [codes, features, codes]  # the voice, then the question


def test_answers_say_what_is_offloaded(models) -> None:
    chat = [{"role": "user", "message_type": "text", "content": "one"}]
    metrics = [list(model.stream(chat, max_new_tokens=1))[-1].metrics for model in models]
    assert [found["offload"] for found in metrics] == ["none", "encoders"]
    assert {found["kv_cache"] for found in metrics} == {"none"}


def test_nothing_is_recorded(models) -> None:
    """A recording holds addresses; encoders in host memory are launched directly anywhere."""
    offloaded = models[1]
    assert type(offloaded.speech_codes.graphs) is Direct
    assert type(offloaded.whisper_features.graphs) is Direct


def test_the_self_test_passes(models) -> None:
    self_test(models[1])


def test_what_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="offload: expected encoders, found 'detokenizer'"):
        check_offload("detokenizer", torch.device("cuda"))
    check_offload("encoders", torch.device("cuda"))
    with pytest.raises(
        ConfigurationError, match=r"offload: .* host memory on the CPU; leave it out"
    ):
        KimiAudio(str(MINI), device="cpu", offload="encoders")
