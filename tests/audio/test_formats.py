"""Every container and codec against what ffmpeg's own program decodes from the same file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from kimia_infer.audio.files import load_audio
from tests.audio.formats import DIFFERENT, FORMATS, PAIRS
from tests.audio.sounds import ffmpeg, ffmpeg_decoded, pcm, wav
from tests.paths import ROOT

RATE = 44_100


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of every pair: a sweep with noise, two different channels that do not cancel."""
    folder = tmp_path_factory.mktemp("formats")
    time = np.arange(RATE) / RATE
    noise = np.random.default_rng(3).standard_normal(RATE) * (np.sin(20 * time) > 0)
    sweep = 0.3 * np.sin(2 * np.pi * (200 * time + 800 * time**2)) + 0.1 * noise
    stereo = sweep[:, None] + 0.1 * np.sin(2 * np.pi * time[:, None] * [523, 777])
    (folder / "source.wav").write_bytes(wav(pcm(stereo.clip(-1, 1)), channels=2, rate=RATE))
    found, outputs = {}, []
    for number, (label, (form, codec)) in enumerate(PAIRS.items()):
        found[label] = folder / f"{number}.{form.suffix}"
        outputs += ["-c:a", codec, *form.codecs[codec].split(), found[label]]
    ffmpeg("-i", folder / "source.wav", *outputs)
    return found


@pytest.fixture(scope="module")
def expected(files: dict[str, Path]) -> dict[Path, tuple[np.ndarray, int]]:
    return ffmpeg_decoded(files.values())


@pytest.mark.parametrize("label", PAIRS)
def test_equals_what_ffmpeg_decodes(
    label: str, files: dict[str, Path], expected: dict[Path, tuple[np.ndarray, int]]
) -> None:
    channels, rate = expected[files[label]]
    wave = load_audio(files[label], sample_rate=rate)
    assert wave.shape == channels[0].shape
    tolerance, _ = DIFFERENT.get(label, (1e-6, ""))
    np.testing.assert_allclose(wave, channels.mean(axis=0), rtol=0, atol=tolerance)
    assert np.abs(wave).max() > 0.1


def test_the_table_of_the_documentation() -> None:
    """docs/audio.md lists what is tested here, no more and no less."""
    rows = re.findall(
        r"^\| ([^|]+) \| `\.(\w+)` \| ([^|]+) \|$", (ROOT / "docs/audio.md").read_text(), re.M
    )
    assert rows == [
        (form.name, form.suffix, ", ".join(name.removeprefix("lib") for name in form.codecs))
        for form in FORMATS
    ]
    assert len(PAIRS) >= 60
