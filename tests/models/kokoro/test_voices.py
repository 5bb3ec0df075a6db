"""Voices by name, mixtures, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kimia_infer.models.kokoro.voices import Voices, language_of
from kimia_infer.utils.errors import CheckpointError, RequestError


@pytest.fixture
def voices(whole: Path) -> Voices:
    return Voices(whole, 256)


def test_rows_by_number_of_phonemes(voices: Voices) -> None:
    assert voices.names == ["af_heart", "am_michael"]
    first, last = voices.style("af_heart", 1), voices.style("af_heart", 510)
    assert first.shape == (256,) and not torch.equal(first, last)
    assert torch.equal(voices.style("af_heart", 9999), last)


def test_mixtures(voices: Voices) -> None:
    one, other = voices.style("af_heart", 7), voices.style("am_michael", 7)
    mixed = voices.style("af_heart:0.7+am_michael:0.3", 7)
    torch.testing.assert_close(mixed, 0.7 * one + 0.3 * other)
    torch.testing.assert_close(voices.style("af_heart + am_michael", 7), (one + other) / 2)


@pytest.mark.parametrize(
    ("voice", "message"),
    [
        ("af_hart", "unknown voice 'af_hart'; did you mean af_heart"),
        ("../af_heart", "expected a name or NAME:WEIGHT"),
        ("", "expected a name"),
        ("af_heart:0", "a weight above 0, found '0'"),
        ("af_heart:1.2.3", "a weight above 0"),
        ("+".join(["af_heart"] * 9), "at most 8 voices"),
    ],
)
def test_refused(voices: Voices, voice: str, message: str) -> None:
    with pytest.raises(RequestError, match=f"voice: .*{message}"):
        voices.style(voice, 7)


def test_published_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no voices/NAME\.pt.* --model kokoro"):
        Voices(tmp_path, 4)
    (tmp_path / "voices").mkdir()
    torch.save(torch.arange(12.0).view(3, 1, 4), tmp_path / "voices" / "bf_emma.pt")
    (tmp_path / "voices" / "bm_bad.pt").write_bytes(b"no tensor")
    torch.save(torch.zeros(3, 5), tmp_path / "voices" / "bm_wide.pt")
    voices = Voices(tmp_path, 4)
    assert voices.style("bf_emma", 2).tolist() == [4, 5, 6, 7]
    for name in ("bm_bad", "bm_wide"):
        with pytest.raises(CheckpointError, match=name):
            voices.style(name, 1)


def test_language_of_a_voice() -> None:
    assert [language_of(v) for v in ("af_heart", "bf_emma", "ff_siwis")] == [
        "en-us",
        "en-gb",
        "fr-fr",
    ]
