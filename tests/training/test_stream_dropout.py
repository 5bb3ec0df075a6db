"""What is left of sounds of which one stream is dropped."""

from __future__ import annotations

import pytest
import torch

from kimia_infer.training.config import FinetuneConfig
from kimia_infer.training.dataset import join
from kimia_infer.training.network import StreamDropout
from kimia_infer.training.samples import Sample
from tests.training import recorded
from tests.training.recorded import SAMPLES, SPECIAL

BLANK = 3
HEARD = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 0, 1, 0]], dtype=torch.bool)
SOUNDS = [[(0, 1), (0, 2)], [(0, 4), (0, 5), (0, 6)], [(1, 0)], [(1, 5)]]
IDS = torch.arange(10, 24).reshape(2, 7)
FEATURES = torch.arange(1.0, 8.0)[:, None].expand(7, 2)


def dropped(features: float, codes: float, seed: int = 0) -> tuple[list[bool], list[bool]]:
    """By sound, whether features and codes are gone; all of a sound or nothing is."""
    torch.manual_seed(seed)
    ids, kept = StreamDropout(features, codes, BLANK)(IDS, HEARD, FEATURES)
    assert torch.equal(ids[~HEARD], IDS[~HEARD])
    rows, silent, blank = iter(kept), [], []
    for places in SOUNDS:
        gone = {bool((next(rows) == 0).all()) for _ in places}
        changed = {int(ids[place]) == BLANK for place in places}
        silent.append(gone.pop())
        blank.append(changed.pop())
        assert not gone
        assert not changed
    full = torch.tensor([s for s, places in zip(silent, SOUNDS, strict=True) for _ in places])
    assert torch.equal(kept[~full], FEATURES[~full])
    uncoded = [place for b, places in zip(blank, SOUNDS, strict=True) if not b for place in places]
    assert all(ids[place] == IDS[place] for place in uncoded)
    return silent, blank


def test_whole_sounds_lose_one_stream():
    assert dropped(1.0, 0.0) == ([True] * 4, [False] * 4)
    assert dropped(0.0, 1.0) == ([False] * 4, [True] * 4)
    assert dropped(0.0, 0.0) == ([False] * 4, [False] * 4)
    counts = torch.zeros(2)
    for seed in range(200):
        silent, blank = dropped(0.3, 0.2, seed)
        assert not any(s and b for s, b in zip(silent, blank, strict=True))
        counts += torch.tensor([float(sum(silent)), float(sum(blank))])
    assert (counts / 800).tolist() == pytest.approx([0.3, 0.2], abs=0.06)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [recorded.sample(record) for record in SAMPLES]


def test_only_training_drops_streams(samples: list[Sample]):
    network = recorded.network()
    batch = join(samples, SPECIAL.pad, [1.0] * len(samples))
    expected = sum(network.eval()(batch).values())
    network.stream_dropout = StreamDropout(1.0, 0.0, SPECIAL.text_blank)
    assert torch.equal(sum(network(batch).values()), expected)
    found = sum(network.train()(batch).values())
    assert (found - expected).abs().min() > 1e-4  # all of these samples have sounds
    found.sum().backward()
    assert not network.whisper.conv1.weight.grad.any()


def test_parts_of_one():
    values = {"model": "m", "data": "d", "output": "o"}
    shares = {"feature_dropout": 0.7, "code_dropout": 0.4}
    with pytest.raises(ValueError, match="feature_dropout: more than 1 together"):
        FinetuneConfig(**values, **shares)
