"""Both tokenizers of sound against recordings, and VQ02 against the loop over chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kimia_infer.models.step_audio_editx import vq02, vq06
from kimia_infer.models.step_audio_editx.config import SanmConfig
from kimia_infer.models.step_audio_editx.frontend import whisper_mel
from kimia_infer.utils.errors import CheckpointError
from scripts.benchmark.editx_published import encode_by_chunks
from tests.models.step_audio_editx.recorded import RECORDED, WAVES, sinusoids, tensors, values

GOLDEN = tensors("vq02_golden")


@pytest.fixture(scope="module")
def first() -> vq02.Vq02:
    encoder = vq02.SanmEncoder(SanmConfig.model_validate(values("vq02")["encoder_conf"]))
    stored = {n.removeprefix("encoder."): t for n, t in tensors("vq02").items()}
    encoder.load_state_dict(stored)
    normalization = vq02.Normalization.from_file(RECORDED / "am.mvn")
    return vq02.Vq02(encoder, normalization, GOLDEN["kms"].float()).eval()


@pytest.fixture(scope="module")
def second() -> vq06.Vq06:
    model = vq06.Vq06(vq06.EncoderSizes(width=64, heads=2, layers=2, codes=96))
    table = {"encoder.positional_embedding": sinusoids(1500, 64)}
    model.load_state_dict(tensors("vq06") | table)
    return model.eval()


@torch.inference_mode()
def test_vq02_is_the_recorded_one(first: vq02.Vq02) -> None:
    for name in WAVES:
        rows = first.normalization(vq02.features(GOLDEN[f"{name}.audio16k"]))
        assert (rows - GOLDEN[f"{name}.feats"]).abs().max() < 1e-4
    encoded = first.encoder([GOLDEN[f"{name}.feats"] for name in WAVES])
    for name, found in zip(WAVES, encoded, strict=True):
        assert (found - GOLDEN[f"{name}.enc_out"]).abs().max() < 5e-6


@torch.inference_mode()
def test_vq02_gives_the_recorded_codes(first: vq02.Vq02) -> None:
    """Of both recordings in one batch."""
    codes = first([GOLDEN[f"{name}.audio16k"] for name in WAVES])
    assert codes == [GOLDEN[f"{name}.ids"].tolist() for name in WAVES]


@torch.inference_mode()
def test_one_pass_is_the_loop_over_chunks(first: vq02.Vq02) -> None:
    """For every length of the last window, alone and together."""
    torch.manual_seed(0)
    recordings = [torch.randn(rows, vq02.FEATURES) for rows in (1, 2, 3, 4, 5, 22, 41)]
    together = first.encoder(recordings)
    for rows, found in zip(recordings, together, strict=True):
        expected = encode_by_chunks(first.encoder, rows)
        assert (found - expected).abs().max() < 5e-6
        assert (first.encoder([rows])[0] - expected).abs().max() < 5e-6


def test_lengths_give_the_recorded_counts() -> None:
    for samples, rows in values("vq02")["lengths_samples_to_frames"]:
        assert vq02.row_count(samples) == rows
        assert len(vq02.features(torch.zeros(samples))) == rows


def test_a_bad_normalization_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "am.mvn"
    with pytest.raises(CheckpointError, match=r"am\.mvn: cannot be read"):
        vq02.Normalization.from_file(path)
    path.write_text("<AddShift> 2 2\n<LearnRateCoef> 0 [ 1 2 ]\n")
    with pytest.raises(CheckpointError, match=r"560 numbers, found lists of \[2\]"):
        vq02.Normalization.from_file(path)
    path.write_text("<LearnRateCoef> 0 [ 1 x ]\n")
    with pytest.raises(CheckpointError, match="not numbers"):
        vq02.Normalization.from_file(path)


@torch.inference_mode()
def test_vq06_is_the_recorded_one(second: vq06.Vq06) -> None:
    golden = tensors("vq06_golden")
    for name in WAVES:
        wave = GOLDEN[f"{name}.audio16k"]
        hidden = second.encoder(whisper_mel(wave)[None])[0]
        assert (hidden - golden[f"{name}.hidden"]).abs().max() < 1e-5
        assert second(wave) == golden[f"{name}.codes"].tolist()


@torch.inference_mode()
def test_vq06_cuts_blocks_as_recorded(second: vq06.Vq06) -> None:
    for case in values("audio")["vq06_framing"]:
        wave = torch.sin(torch.arange(case["samples"]) * 0.1)
        assert len(second(wave)) == case["codes"], case["samples"]
    long = torch.sin(torch.arange(488_000) * 0.01) * torch.rand(488_000)
    assert second(long) == second(long[:480_000]) + second(long[480_000:])
