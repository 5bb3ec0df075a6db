"""Measures and limits, one fault at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kimia_infer.audio.files import SAMPLE_RATE, load_audio
from kimia_infer.data.pipeline.filters import (
    Limits,
    Measured,
    repeated_share,
    sound_fault,
    text_fault,
)
from kimia_infer.data.pipeline.quality import Quality, QualityMeter, bandwidth, clipped_share
from kimia_infer.data.pipeline.recognition import Heard
from kimia_infer.data.pipeline.turns import Segment
from tests.data.pipeline.made import noise
from tests.models.kokoro.spoken import SPOKEN

GOOD = Quality(-20.0, 0.0, 7000.0, 3.5)
SEGMENT = Segment(1.0, 3.5, 0)
TEXT = "the train was late again this morning"
HEARD = Heard(TEXT, "en", 0.99, -0.2)


@pytest.mark.parametrize(
    ("name", "segment", "quality"),
    [
        (None, {}, {}),
        ("shortest", {"end": 1.9}, {}),
        ("overlap", {"overlap": 0.11}, {}),
        ("level", {}, {"level_dbfs": -46.0}),
        ("clipped", {}, {"clipped": 0.002}),
        ("bandwidth", {}, {"bandwidth_hz": 2900.0}),
        ("score", {}, {"score": 1.9}),
    ],
)
def test_faults_of_sound(name: str | None, segment: dict, quality: dict) -> None:
    assert sound_fault(replace(SEGMENT, **segment), replace(GOOD, **quality), Limits()) == name


@pytest.mark.parametrize(
    ("name", "heard"),
    [
        (None, {}),
        (None, {"language": None, "certainty": None, "confidence": None}),
        (None, {"language": "zh", "text": "今天早上火车又晚点了"}),
        (None, {"text": "5 5"}),
        ("empty", {"text": " ... "}),
        ("languages", {"language": "fr"}),
        ("certainty", {"certainty": 0.4}),
        ("repeated", {"text": "thank you thank you thank you"}),
        ("rate", {"text": "oh"}),
        ("rate", {"text": f"{TEXT} she keeps her keys in a blue bowl so we walked until dark"}),
        ("rate", {"language": "zh", "text": "早"}),
        ("confidence", {"confidence": -1.1}),
    ],
)
def test_faults_of_text(name: str | None, heard: dict) -> None:
    assert text_fault(Measured(SEGMENT, GOOD, replace(HEARD, **heard)), Limits()) == name


def test_two_recognizers_have_to_agree() -> None:
    first = Heard(TEXT)
    found = Measured(SEGMENT, GOOD, first, HEARD, 0.25)
    assert text_fault(found, Limits()) is None
    assert text_fault(replace(found, difference=0.35), Limits()) == "difference"
    # The second one tells the language, and may have heard nothing.
    spanish = replace(HEARD, language="es")
    assert text_fault(replace(found, second=spanish), Limits()) == "languages"
    assert text_fault(replace(found, second=replace(HEARD, text="")), Limits()) == "empty"


def test_share_of_repetitions() -> None:
    assert repeated_share("one two one two three", "en") == pytest.approx(2 / 5)
    assert repeated_share("No, no, no.", "en") == pytest.approx(2 / 3)
    assert repeated_share("好的好的好的", "zh") == pytest.approx(4 / 6)
    assert repeated_share(TEXT, "en") == repeated_share("", "en") == 0


def test_clipping_and_bandwidth() -> None:
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    tone = 0.5 * np.sin(2 * np.pi * 1000 * time)
    # Of 16 samples of a period the sine is above 0.9 of its peak for 2.3 twice: 3 at least never.
    assert clipped_share(tone) == 0
    assert clipped_share(np.clip(tone, -0.25, 0.25)) > 0.5
    assert bandwidth(tone) == pytest.approx(1000, abs=100)
    assert bandwidth(noise(SAMPLE_RATE, 0, color=0)) > 7900


def test_noise_scores_below_speech(models: Path) -> None:
    speech = load_audio(SPOKEN[0].path)
    meter = QualityMeter(models)
    clean = meter.measure(speech)
    noisy = meter.measure(speech + 0.1 * noise(len(speech), 1).astype(np.float32))
    assert sound_fault(replace(SEGMENT), clean, Limits()) is None
    assert clean.score > 3 and noisy.score < 2
