"""Several samples at once train exactly what they train one by one."""

from __future__ import annotations

import pytest
import torch
from accelerate import PartialState
from torch import Tensor

from kimia_infer.data.conversations import parse_conversation
from kimia_infer.training.dataset import join
from kimia_infer.training.model_files import build_network
from kimia_infer.training.network import TrainingNetwork, track_loss
from kimia_infer.training.samples import Sample
from tests.training import recorded
from tests.training.recorded import SAMPLES, SPECIAL

TEXT_ONLY = {
    "task_type": "understanding",
    "conversation": [
        {"role": "user", "message_type": "text", "content": "how are you?"},
        {"role": "assistant", "message_type": "text", "content": "well"},
    ],
}


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    text = recorded.builder().build(parse_conversation(TEXT_ONLY))
    return [*(recorded.sample(record) for record in SAMPLES), text]


def gradients(network: TrainingNetwork) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters()}


def test_a_padded_batch_equals_single_samples(samples: list[Sample]):
    network = recorded.network()
    singles = []
    for sample in samples:
        loss = sum(network(join([sample], SPECIAL.pad, [1.0])).values())
        (loss.sum() / len(samples)).backward()
        singles.append(loss.detach())
    expected = gradients(network)
    network.zero_grad()
    batch = join(samples, SPECIAL.pad, [1 / len(samples)] * len(samples))
    assert len({len(sample) for sample in samples}) > 1
    losses = sum(network(batch).values())
    torch.testing.assert_close(losses.detach(), torch.cat(singles), rtol=0, atol=1e-5)
    (losses * batch.weights).sum().backward()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, found in gradients(network).items():
        assert (found - expected[name]).norm() <= 1e-4 * largest, name


def test_the_loss_in_chunks_is_the_loss():
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 9, 4, requires_grad=True), torch.nn.Linear(4, 7)
    labels, mask = torch.randint(0, 7, (2, 9)), torch.rand(2, 9) < 0.7
    found = []
    for chunk in (3, 100):
        loss = track_loss(hidden, head, labels, mask, chunk)
        found.append((loss, *torch.autograd.grad(loss.sum(), (hidden, head.weight))))
    torch.testing.assert_close(*found)


def test_without_any_sound_everything_still_has_a_gradient(samples: list[Sample]):
    network = recorded.network()
    sum(network(join(samples[-1:], SPECIAL.pad, [1.0])).values()).sum().backward()
    found = gradients(network)
    assert not found["whisper.conv1.weight"].any()
    assert not found["language_model.adaptor.input.weight"].any()
    assert not found["language_model.audio_head.weight"].any()
    assert found["language_model.text_head.weight"].any()


def test_frozen_parts_have_no_gradient(samples: list[Sample]):
    network = recorded.network(("adaptor", "mimo"))
    batch = join(samples, SPECIAL.pad, [1.0] * len(samples))
    sum(network(batch).values()).sum().backward()
    trained = {n for n, p in network.named_parameters() if p.grad is not None}
    prefixes = ("language_model.adaptor.", "language_model.mimo_")
    assert trained == {n for n, _ in network.named_parameters() if n.startswith(prefixes)}
    assert network.language_model.adaptor.input.weight.grad.any()


def test_bfloat16_is_close(samples: list[Sample]):
    batch = join(samples, SPECIAL.pad, [1.0] * len(samples))
    expected = sum(recorded.network()(batch).values())
    for parts in (("trunk", "adaptor", "whisper"), tuple(recorded.TRAINABLE)):
        state = PartialState(cpu=True)
        network = build_network(recorded.components(), state, torch.bfloat16, parts)
        found = sum(network(batch).values())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0)
        found.sum().backward()
        assert {p.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)
