"""How near variants are: by hand, and on the miniature."""

from __future__ import annotations

import math

import pytest
import torch

from kimia_infer.api.kimia import KimiAudio
from scripts.benchmark import quality
from scripts.benchmark.quality import Reference, _compare_track, compare, refer
from tests.paths import ROOT

MINI, QUESTION = ROOT / "weights" / "mini", ROOT / "scripts" / "question.wav"


def test_figures_by_hand() -> None:
    """Of four steps the first does not count, nor does the last."""
    even, sure = [0.0, 0.0], [math.log(3), 0.0]
    reference = Reference(
        {"audio": torch.tensor([9, 0, 1, 9])},
        {"audio": torch.tensor([[5.0, 0.0], sure, even, [5.0, 0.0]])},
        {"audio": 1},
        {"audio": 3},
    )
    found = torch.tensor([[0.0, 5.0], even, sure, [0.0, 5.0]])
    values = _compare_track("audio", torch.tensor([7, 0, 0, 7]), found, reference)
    assert values["leading"] == 0.5
    assert values["agreement"] == 1.0  # of equals the first is the likeliest
    # 3/4 against 1/2 and the other way round.
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    second = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert values["divergence"] == pytest.approx((first + second) / 2)
    assert values["cosine"] == 0.0


def test_a_track_without_steps_has_no_figures() -> None:
    """No text; and speech that would have begun after the end."""
    ids, logits = torch.tensor([1, 0]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    both = {"text": ids, "audio": ids}, {"text": logits, "audio": logits}
    reference = Reference(*both, {"text": 0, "audio": 6}, {"text": 0, "audio": 2})
    for track in ("text", "audio"):
        assert _compare_track(track, ids, logits, reference) is None


@pytest.fixture(scope="module")
def miniature() -> KimiAudio:
    return KimiAudio(str(MINI), device="cpu", dtype="float32", head_rows="track")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "REPLY_SECONDS", 2)


def test_a_model_is_near_itself(miniature: KimiAudio) -> None:
    """Also: given all tokens at once, it would have chosen each of them."""
    reference = refer(miniature, QUESTION)
    for track, step in (("text", 0), ("audio", reference.first["audio"])):
        end = reference.end[track]
        likeliest = reference.logits[track][step:end].argmax(-1)
        if track == "audio":
            likeliest = likeliest + miniature.language_model.first_audio_id
        assert torch.equal(likeliest, reference.ids[track][step:end]) and end > step
    for values in compare(miniature, QUESTION, reference).values():
        assert values["leading"] == values["agreement"] == 1
        assert values["cosine"] == pytest.approx(1, abs=1e-6)
        assert values["divergence"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"quantization": "int8"}, 0.999),
        ({"quantization": "fp8"}, 0.999),
        ({"quantization": "int4"}, 0.95),
        ({"kv_cache": "fp8"}, 0.98),
    ],
)
def test_variants_of_the_miniature(options: dict, bound: float, miniature: KimiAudio) -> None:
    other = KimiAudio(str(MINI), device="cpu", dtype="float32", head_rows="track", **options)
    for values in compare(other, QUESTION, refer(miniature, QUESTION)).values():
        assert bound <= values["cosine"] < 1
        assert 0 < values["divergence"] < 0.2
