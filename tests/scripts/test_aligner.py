"""The recipe of the aligner, in miniature."""

from __future__ import annotations

from pathlib import Path

import torch

from kimia_infer.audio.files import load_audio
from kimia_infer.models.kokoro.aligner import WEIGHTS_NAME, load_aligner
from kimia_infer.models.kokoro.config import SAMPLE_RATE
from kimia_infer.models.kokoro.measures import mel_power
from scripts.aligner.speech import HELD_OUT, Utterance
from scripts.aligner.training import disturbed, train_aligner, write_example
from tests.models.kokoro.spoken import SPOKEN
from tests.training.runs import losses

VOICES = ["af_bella", "af_sky", "am_adam", "am_eric", "bf_emma", "bf_lily", "bm_lewis", "jf_alpha"]


def test_places_and_kinds_of_symbols_are_learned(tmp_path: Path):
    """The first recording is held out; the file that is written aligns as what was trained."""
    paths = [tmp_path / f"{spoken.name}.safetensors" for spoken in SPOKEN]
    for path, spoken in zip(paths, SPOKEN, strict=True):
        wave = torch.from_numpy(load_audio(spoken.path, sample_rate=SAMPLE_RATE))
        write_example(path, wave, spoken.durations, spoken.phonemes)
    torch.manual_seed(0)
    result = train_aligner(paths, tmp_path / "run", steps=12, width=32)
    for name in ("places_loss", "symbols_loss"):
        found = losses(result, name)
        assert sum(found[-3:]) < 0.97 * sum(found[:3]), name
    aligner = load_aligner(tmp_path / "run" / "final" / WEIGHTS_NAME)
    power = mel_power(load_audio(SPOKEN[1].path, sample_rate=SAMPLE_RATE))
    found = aligner.align(power, SPOKEN[1].phonemes)
    assert found.durations.sum() == SPOKEN[1].durations.sum()
    assert train_aligner(paths, tmp_path / "run", steps=12, width=32).step == 12


def test_speech_in_another_room_keeps_its_shape():
    power = mel_power(load_audio(SPOKEN[0].path, sample_rate=SAMPLE_RATE))
    torch.manual_seed(1)
    other = [disturbed(power) for _ in range(4)]
    for found in other:
        assert found.shape == power.shape
        assert found.isfinite().all()
        assert (found > 0).all()
        loud, quiet = (found[:, :40].sum(1).quantile(share) for share in (0.9, 0.1))
        assert loud > 2 * quiet
    assert not torch.equal(other[0], other[1])


def test_utterances_are_drawn_from_voices_that_are_not_held_out():
    drawn = [Utterance.drawn(index, VOICES) for index in range(60)]
    assert drawn == [Utterance.drawn(index, VOICES) for index in range(60)]
    assert not any(held in utterance.voice for utterance in drawn for held in HELD_OUT)
    british = [u for u in drawn if u.voice[0] == "b"]
    assert len(british) == 20
    assert {"ː", "Q", "a"} <= set("".join(u.phonemes for u in british))
    assert "T" in "".join(u.phonemes for u in drawn if u.voice[0] == "a")
