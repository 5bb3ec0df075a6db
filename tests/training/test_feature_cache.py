"""Stored Whisper features train what computed ones do."""

from __future__ import annotations

import shutil
from copy import copy
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from transformers import WhisperFeatureExtractor

from kimia_infer.data.conversations import DataError, parse_conversation
from kimia_infer.training.dataset import join
from kimia_infer.training.feature_cache import FeatureCache
from kimia_infer.training.tasks.finetune import finetune
from kimia_infer.utils.errors import ConfigurationError
from tests.training import recorded
from tests.training.recorded import SAMPLES, SPECIAL
from tests.training.runs import losses, settings, write_data

FROZEN = ("embedding", "trunk", "mimo", "adaptor", "heads")
PARTS = f"parts=[{', '.join(FROZEN)}]"


def test_stored_features_are_the_computed_ones(tmp_path: Path):
    network, builder = recorded.network(FROZEN), recorded.builder()
    conversations = [parse_conversation(record["raw"]) for record in SAMPLES]
    cache = FeatureCache(tmp_path, network.whisper, torch.float32, builder.extractor)
    sounds = [sound for conversation in conversations for sound in builder.recordings(conversation)]
    state = PartialState(cpu=True)
    cache.fill(sounds, network.whisper_features, state)
    assert len(list(cache.folder.iterdir())) == len(set(sounds)) > 1
    reader = type(builder)(**{**vars(builder), "read_features": cache.read})
    for conversation in conversations:
        computed, stored = builder.build(conversation), reader.build(conversation)
        assert not stored.mel
        expected = sum(network(join([computed], SPECIAL.pad, [1.0])).values())
        assert torch.equal(sum(network(join([stored], SPECIAL.pad, [1.0])).values()), expected)

    def refuse(*_: object) -> None:
        raise AssertionError("computed twice")

    cache.fill(sounds, refuse, state)


def test_other_encoders_precisions_and_paddings_have_other_features(tmp_path: Path):
    whisper = recorded.network(FROZEN).whisper
    extractor = recorded.builder().extractor
    short = copy(extractor)
    short.padding_seconds = 3

    def folder(dtype: torch.dtype, extractor: WhisperFeatureExtractor) -> Path:
        return FeatureCache(tmp_path, whisper, dtype, extractor).folder

    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    folders = {folder(dtype, extractor) for dtype in dtypes}
    assert len(folders) == 2
    assert folder(torch.float32, short) not in folders
    with torch.no_grad():
        whisper.conv1.bias[0] += 1e-3
    assert folder(torch.float32, extractor) not in folders


def test_a_run_with_stored_features_is_the_same(tmp_path: Path):
    data = write_data(tmp_path)
    common = ("max_steps=3", "eval_ratio=0.2", PARTS, "batch_size=1")
    plain = finetune(settings(data, tmp_path / "plain", *common))
    cached = (*common, f"feature_cache={tmp_path / 'features'}")
    stored = finetune(settings(data, tmp_path / "stored", *cached))
    assert losses(stored) == losses(plain)
    assert losses(stored, "eval_loss") == losses(plain, "eval_loss")


def test_what_cannot_be(tmp_path: Path):
    with pytest.raises(
        ConfigurationError, match="feature_cache: features change with a trained Whisper"
    ):
        settings(tmp_path / "d.jsonl", tmp_path, f"feature_cache={tmp_path}")
    network, builder = recorded.network(FROZEN), recorded.builder()
    raw = SAMPLES[0]["raw"]
    sound = builder.recordings(parse_conversation(raw))[0]
    twin = tmp_path / "sound.wav"
    shutil.copyfile(sound, twin)
    cache = FeatureCache(tmp_path / "cache", network.whisper, torch.float32, builder.extractor)
    cache.fill([twin], lambda mel, counts: torch.zeros(3, 8), PartialState())
    messages = [
        {**m, "content": str(twin)} if m["message_type"] == "audio" else m
        for m in raw["conversation"]
    ]
    reader = type(builder)(**{**vars(builder), "read_features": cache.read})
    with pytest.raises(DataError, match="the audio gave 3 Whisper features; extract the codes"):
        reader.build(parse_conversation({**raw, "conversation": messages}))
