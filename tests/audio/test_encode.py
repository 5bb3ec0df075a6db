"""Waves to wav files."""

from __future__ import annotations

import wave as riff
from pathlib import Path

import numpy as np
import pytest
import torch

from kimia_infer.audio import files as wav
from kimia_infer.audio.files import SAMPLE_RATE, load_audio, write_wav


def test_reading_returns_what_was_written(tmp_path: Path) -> None:
    levels = np.arange(-32_768, 32_768, dtype=np.float32) / 32_768
    write_wav(tmp_path / "levels.wav", levels, SAMPLE_RATE)
    np.testing.assert_array_equal(load_audio(tmp_path / "levels.wav"), levels)


def test_default_is_24_kilohertz_mono_16_bit(tmp_path: Path) -> None:
    write_wav(str(tmp_path / "a.wav"), torch.zeros(1, 480), 24_000)
    with riff.open(str(tmp_path / "a.wav")) as file:
        assert file.getparams()[:4] == (1, 2, 24_000, 480)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rounds_and_clips(dtype: torch.dtype, tmp_path: Path) -> None:
    wave = torch.tensor([[1.0, -1.0, 7.0, -7.0, 0.5, 2.0**-16 * 1.5, -(2.0**-16)]], dtype=dtype)
    write_wav(tmp_path / "a.wav", wave, 24_000)
    with riff.open(str(tmp_path / "a.wav")) as file:
        pcm = np.frombuffer(file.readframes(7), "<i2")
    assert pcm.tolist() == [32_767, -32_768, 32_767, -32_768, 16_384, 1, 0]


@pytest.mark.parametrize(
    ("wave", "reason"),
    [
        (np.zeros((2, 10), np.float32), r"\[2, 10\]"),
        (np.zeros((1, 1, 10), np.float32), r"\[1, 1, 10\]"),
        (torch.tensor(0.5), r"\[\]"),
        (torch.zeros(10, dtype=torch.int16), "int16"),
        (np.array([0, np.nan], np.float32), "not finite"),
        (torch.tensor([0, -torch.inf]), "not finite"),
    ],
)
def test_refuses_what_is_no_wave(
    wave: np.ndarray | torch.Tensor, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        write_wav(tmp_path / "a.wav", wave, 24_000)
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    write_wav(path, np.full(100, 0.5, np.float32), 24_000)
    before = path.read_bytes()

    def full_disk(self: riff.Wave_write, data: bytes) -> None:
        self._file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wav.riff.Wave_write, "writeframes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_wav(path, np.zeros(1_000, np.float32), 24_000)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
