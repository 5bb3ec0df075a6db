"""Features of short recordings: nearly those that are served, where the training finds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kimia_infer.audio.files import SAMPLE_RATE, load_audio, write_wav
from kimia_infer.models.kimi_audio.checkpoint import WHISPER_FOLDER
from kimia_infer.models.kimi_audio.components import whisper_component
from kimia_infer.models.kimi_audio.encoders import WhisperFeatures, feature_extractor
from kimia_infer.training.feature_cache import FeatureCache
from kimia_infer.utils.files import write_json_lines
from scripts.miniature import features
from scripts.miniature.features import encode, fill_features, recordings, served
from tests.paths import MINI, ROOT

WHISPER = MINI / WHISPER_FOLDER


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> Path:
    """Two conversations with three recordings, one of which is said twice."""
    folder = tmp_path_factory.mktemp("lists")
    speech = load_audio(ROOT / "scripts" / "question.wav")
    for index, wave in enumerate((speech, speech[8_000:], speech[:20_000])):
        write_wav(folder / f"{index}.wav", wave, SAMPLE_RATE)
    answer = {"role": "assistant", "message_type": "text", "content": "one"}
    lines = [
        {"conversation": [message(folder, first), answer, message(folder, second), answer]}
        for first, second in ((0, 1), (1, 2))
    ]
    write_json_lines(folder / "train.jsonl", ({"task_type": "understanding", **x} for x in lines))
    return folder


def message(folder: Path, index: int) -> dict:
    return {"role": "user", "message_type": "audio", "content": str(folder / f"{index}.wav")}


def test_most_recordings_are_encoded_with_little_silence(lists: Path, tmp_path: Path, monkeypatch):
    sounds = [lists / f"{index}.wav" for index in range(3)]
    assert recordings([lists / "train.jsonl"]) == sounds
    monkeypatch.setattr(features, "served", lambda path: path.name == "1.wav")
    fill_features(tmp_path, MINI, [lists / "train.jsonl"], torch.float32)
    encoder = whisper_component(WHISPER).load(torch.device("cpu"), torch.float32)
    cache, whisper = (
        FeatureCache(tmp_path, encoder, torch.float32),
        WhisperFeatures(encoder, WHISPER),
    )
    assert [cache.path(path).exists() for path in sounds] == [True, False, True]
    for path in (sounds[0], sounds[2]):
        found, expected = cache.read(path), whisper.encode(load_audio(path))
        assert found.shape == expected.shape
        error = (found - expected).square().sum() / (expected - expected.mean(0)).square().sum()
        assert 0 < error < 0.2  # of another sound it would be about 2


def test_a_whole_segment_is_encoded_as_served():
    encoder = whisper_component(WHISPER).load(torch.device("cpu"), torch.float32)
    extractor = feature_extractor(WHISPER, encoder.config.num_mel_bins)
    wave = torch.randn(480_000, generator=torch.Generator().manual_seed(0)).numpy()
    mel = extractor(wave, sampling_rate=16_000, return_tensors="pt").input_features
    with torch.no_grad():
        expected = encoder(mel).last_hidden_state
        torch.testing.assert_close(encode(encoder, mel), expected)


def test_a_small_share_is_left_to_be_encoded_as_served():
    share = sum(served(Path(f"{index}.wav")) for index in range(2000)) / 2000
    assert share == pytest.approx(features.SERVED, abs=0.02)
