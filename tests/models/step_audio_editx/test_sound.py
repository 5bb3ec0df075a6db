"""Flow and vocoder against recordings of the published ones."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kimia_infer.models.step_audio_editx import flow as flows
from kimia_infer.models.step_audio_editx import hift, packing
from kimia_infer.models.step_audio_editx.config import FlowConfig, VocoderConfig
from kimia_infer.models.step_audio_editx.flow import Flow, MelStream
from kimia_infer.models.step_audio_editx.past import Past
from kimia_infer.weights.component import Component
from kimia_infer.weights.tensors import open_safetensors
from tests.models.step_audio_editx.recorded import RECORDED, sizes, tensors

GOLDEN = tensors("flow_golden")


@pytest.fixture(scope="module")
def flow() -> Flow:
    network = Flow(FlowConfig.model_validate(sizes()["flow"]))
    network.load_state_dict({name: t.float() for name, t in tensors("flow").items()})
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vocoder() -> hift.Vocoder:
    config = VocoderConfig.model_validate(sizes()["hift"])
    store = open_safetensors([RECORDED / "hift.safetensors"])
    slots = hift.vocoder_slots(hift.Vocoder(config), store)
    part = Component("vocoder", lambda: hift.Vocoder(config), slots, store, ignored=())
    return part.load(torch.device("cpu"), torch.float32)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_rows_are_the_recorded_ones() -> None:
    prompt = GOLDEN["prompt_tokens"].tolist()
    close(packing.flow_rows(prompt), GOLDEN["prompt_rows"])
    close(packing.aligned_mel(GOLDEN["prompt_mel"], 24), GOLDEN["prompt_feat"])


def test_flow_is_the_recorded_one(flow: Flow) -> None:
    rows = torch.cat([GOLDEN["prompt_rows"], GOLDEN["rows"]])
    embedded = flow.input_embedding(rows)
    close(embedded, GOLDEN["embedded"], 0)
    close(flow.encoder(embedded[None], Past(last=True))[0], GOLDEN["encoder_out"])
    noise = GOLDEN["rand_noise"].float().T[: 2 * len(rows)]
    given = (GOLDEN[name] for name in ("rows", "prompt_rows", "prompt_feat", "spk"))
    close(flow(*given, noise), GOLDEN["mel"].T)


def spoken_in_chunks(flow: Flow, sizes: list[int]) -> Tensor:
    """The mel of the recorded rows, pushed as many at a time."""
    rows, prompt_rows = GOLDEN["rows"], GOLDEN["prompt_rows"]
    noise = iter(GOLDEN["rand_noise"].float().T)
    voice = prompt_rows, GOLDEN["prompt_feat"], GOLDEN["spk"]
    stream = MelStream(flow, *voice, lambda n: torch.stack([next(noise) for _ in range(n)]))
    parts = rows.split(sizes)
    return torch.cat([stream.push(part, part is parts[-1]) for part in parts])


def test_flow_in_chunks_is_the_flow_that_sees_no_later_chunk(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, prompt_rows = GOLDEN["rows"], GOLDEN["prompt_rows"]
    sizes = [9, 6, len(rows) - 15]
    found = spoken_in_chunks(flow, sizes)
    ahead = flow.config.encoder.ahead
    spoken = torch.tensor([len(prompt_rows) + sizes[0] - ahead, sizes[1], sizes[2] + ahead])
    chunk = torch.arange(3).repeat_interleave(spoken)
    attend = F.scaled_dot_product_attention

    def masked(query: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor | None = None):
        of = chunk.repeat_interleave(keys.shape[2] // len(chunk))
        bias = torch.zeros(len(of), len(of)).masked_fill(of[:, None] < of, -torch.inf)
        bias = bias if attn_mask is None else bias + attn_mask
        return attend(query, keys, values, attn_mask=bias)

    noise = GOLDEN["rand_noise"].float().T[: 2 * len(chunk)]
    given = (GOLDEN[name] for name in ("rows", "prompt_rows", "prompt_feat", "spk"))
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", masked)
        close(found, flow(*given, noise))
    monkeypatch.setattr(flows, "RECENT_FRAMES", 4)
    bounded = spoken_in_chunks(flow, sizes)
    first = 2 * (sizes[0] - ahead)
    close(bounded[:first], found[:first])
    assert (bounded[first:] - found[first:]).abs().amax(1).min() > 1e-4


def test_vocoder_is_the_recorded_one(vocoder: hift.Vocoder) -> None:
    mel, noise = GOLDEN["mel"], GOLDEN["source_noise"].float()
    pitch = vocoder.f0_predictor(mel[None])[0]
    close(pitch, GOLDEN["f0"], 2e-4)  # in Hz, of 400
    close(vocoder.m_source(GOLDEN["f0"][None], noise[None])[0], GOLDEN["source"])
    close(vocoder.decode(mel[None], GOLDEN["source"][None])[0], GOLDEN["wave"])


def test_the_whole_vocoder_gives_the_recorded_wave(vocoder: hift.Vocoder) -> None:
    """Folding weight norm rounds the pitch, in its last place, otherwise: a phase of 0.002."""
    close(vocoder(GOLDEN["mel"].T, GOLDEN["source_noise"].float()), GOLDEN["wave"], 4e-3)
    close(vocoder(GOLDEN["mel"].T, None), GOLDEN["wave_no_noise"], 4e-3)


@pytest.mark.parametrize("sizes", [[40, 1, 0], [21, 9]])
def test_a_wave_in_pieces_is_the_whole_one(vocoder: hift.Vocoder, sizes: list[int]) -> None:
    torch.manual_seed(0)
    mel = GOLDEN["mel"].T.repeat(3, 1)
    noise = torch.randn(len(mel) * 480, 9)
    draws = iter(noise[:, None])
    stream = hift.WaveStream(vocoder, lambda n: torch.cat([noise[:0], *itertools.islice(draws, n)]))
    parts = mel.split([*sizes, len(mel) - sum(sizes)])
    pieces = [stream.push(part, part is parts[-1]) for part in parts]
    waiting = vocoder.config.reach + hift.PITCH_LAYERS + 1
    assert len(pieces[0]) == 480 * max(0, sizes[0] - waiting)
    close(torch.cat(pieces), vocoder(mel, noise), 4e-3)
