"""How near variants are: by hand, and on the miniature."""

from __future__ import annotations

import math

import pytest
import torch

from kimia_infer.api.kimia import KimiAudio
from scripts.benchmark.quality import Reference, compare, compare_track, refer
from scripts.benchmark.variants import encoded
from tests.paths import MINI, ROOT

QUESTION = ROOT / "scripts" / "question.wav"


def test_figures_by_hand() -> None:
    """Of four steps the first does not count, nor does the last."""
    even, sure = [0.0, 0.0], [math.log(3), 0.0]
    reference = Reference(
        {"audio": torch.tensor([9, 0, 1, 9])},
        {"audio": torch.tensor([[5.0, 0.0], sure, even, [5.0, 0.0]])},
        {"audio": slice(1, 3)},
    )
    found = torch.tensor([[0.0, 5.0], even, sure, [0.0, 5.0]])
    values = compare_track("audio", torch.tensor([7, 0, 0, 7]), found, reference)
    assert values["equal tokens"] == 0.5
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
    reference = Reference(*both, {"text": slice(0, 0), "audio": slice(6, 2)})
    for track in ("text", "audio"):
        assert compare_track(track, ids, logits, reference) is None


@pytest.fixture(scope="module")
def miniature() -> KimiAudio:
    return KimiAudio(str(MINI), device="cpu", dtype="float32", head_rows="track")


STEPS = 31


def test_a_model_is_near_itself(miniature: KimiAudio) -> None:
    """Also: given all tokens at once, it would have chosen each of them."""
    decoder, prompt = miniature.decoder, encoded(miniature, QUESTION)
    reference = refer(decoder, prompt, STEPS)
    for track, steps in reference.steps.items():
        likeliest = reference.logits[track][steps].argmax(-1)
        if track == "audio":
            likeliest = likeliest + miniature.language_model.first_audio_id
        assert torch.equal(likeliest, reference.ids[track][steps]) and len(likeliest)
    rows = compare(decoder, prompt, STEPS, reference)
    assert [row["track"] for row in rows] == ["text", "audio"]
    for row in rows:
        assert row["equal tokens"] == row["agreement"] == 1
        assert row["cosine"] == pytest.approx(1, abs=1e-6)
        assert row["divergence"] == pytest.approx(0, abs=1e-6)


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
    reference = refer(miniature.decoder, encoded(miniature, QUESTION), STEPS)
    for row in compare(other.decoder, encoded(other, QUESTION), STEPS, reference):
        assert bound <= row["cosine"] < 1
        assert 0 < row["divergence"] < 0.2
