"""Training of the Whisper-style encoder: it hears what it is served, learns, goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from kimia_infer.audio.files import load_audio
from kimia_infer.data.conversations import DataError
from kimia_infer.models.kimi_audio.checkpoint import WHISPER_FOLDER
from kimia_infer.models.kimi_audio.components import whisper_component
from kimia_infer.models.kimi_audio.config import encoder_config
from kimia_infer.models.kimi_audio.encoders import WhisperFeatures, feature_extractor, segment_codes
from kimia_infer.training.config import read_config
from kimia_infer.training.run_directory import FINAL
from kimia_infer.training.tasks.recognizer import Units
from kimia_infer.training.tasks.recordings import Examples, Recording
from scripts.miniature.whisper_encoder import (
    SEGMENT_CODES,
    Place,
    WhisperNetwork,
    WhisperSize,
    WhisperTrainingConfig,
    arrange,
    encode,
    fill_segments,
    new_config,
    new_encoder,
    read_sound,
    train_whisper,
)
from tests.paths import GOLDEN
from tests.training.runs import SPOKEN_TEXTS, interrupt, losses, write_spoken

EXTRACTOR = feature_extractor(Path(), 128)
SIZE = WhisperSize(width=32, layers=1, heads=2, feed_forward=32)
SHORT = [GOLDEN / "audio" / name for name in ("a1p3.wav", "a5.wav", "a_1281.wav")]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_spoken(tmp_path_factory.mktemp("spoken"), SPOKEN_TEXTS)


def settings(data: Path, output: Path, *assignments: str) -> WhisperTrainingConfig:
    known = [
        f"data={data}", f"output={output}", "device=cpu", "size.width=32", "size.heads=2",
        "size.layers=1", "size.feed_forward=32", "batch_size=3", "full_from=1", *assignments,
    ]  # fmt: skip
    return read_config(WhisperTrainingConfig, None, known)


def mel_of(path: Path) -> torch.Tensor:
    return read_sound(Recording(str(path), path, "a"), EXTRACTOR)["mel"]


@pytest.fixture(scope="module")
def encoder() -> WhisperEncoder:
    torch.manual_seed(0)
    return new_encoder(WhisperEncoder(encoder_config(new_config(SIZE), Path("size")))).eval()


@torch.no_grad()
def test_a_sound_alone_is_heard_as_it_is_served(encoder: WhisperEncoder):
    served = WhisperFeatures(encoder, Path())
    for path in SHORT:
        wave = load_audio(path)
        count = segment_codes(len(wave))
        segment = fill_segments([mel_of(path)], [Place(0, 0)], SEGMENT_CODES)
        found = encode(encoder, segment, 0)[0, : 4 * count].reshape(count, -1)
        # The last spectrogram frame of a sound rings into the first of the silence behind it.
        torch.testing.assert_close(found, served.encode(wave), rtol=0, atol=2e-3)


def test_sounds_of_a_segment_share_its_loudness():
    quiet, loud = mel_of(SHORT[0]) - 1.5, mel_of(SHORT[1])
    segments = fill_segments([quiet, loud, quiet], [Place(0, 2), Place(0, 40), Place(1, 0)], 110)
    assert segments.shape == (2, 128, 880)
    floor = loud.max() - 2.0
    assert torch.equal(segments[0, :, 320 : 320 + loud.shape[1]], loud.clamp(min=floor))
    assert torch.equal(segments[0, :, 16 : 16 + quiet.shape[1]], quiet.clamp(min=floor))
    assert (segments[0, :, :16] == floor).all()
    assert torch.equal(segments[1, :, : quiet.shape[1]], quiet.clamp(min=quiet.max() - 2.0))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.booleans(), st.integers(0, 99))
def test_sounds_have_places_of_their_own(counts: list[int], sparse: bool, seed: int):
    places = arrange(counts, 75, sparse, torch.Generator().manual_seed(seed))
    taken = [
        (place.segment, code)
        for place, count in zip(places, counts, strict=True)
        for code in range(place.code, place.code + count)
    ]
    assert len(set(taken)) == sum(counts)
    assert max(code for _, code in taken) < 75
    assert {place.segment for place in places} == set(range(places[-1].segment + 1))


@torch.no_grad()
def test_short_segments_lie_anywhere(encoder: WhisperEncoder):
    mel = fill_segments([mel_of(SHORT[0])], [Place(0, 3)], 40)
    first, same, other = (encode(encoder, mel, place) for place in (0, 0, 200))
    assert torch.equal(first, same)
    assert first.shape == (1, 160, 32)
    assert (first - other).abs().max() > 1e-3


def test_losses_do_not_depend_on_the_other_sounds(data: Path, tmp_path: Path):
    """But for what the segment's attention mixes, which is switched off."""
    run = settings(data, tmp_path)
    torch.manual_seed(0)
    base = new_encoder(WhisperEncoder(encoder_config(new_config(SIZE), Path("size"))))
    for layer in base.layers:
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
    torch.nn.init.zeros_(base.embed_positions.weight)
    network = WhisperNetwork(base, new_config(SIZE), run, Units.of(SPOKEN_TEXTS)).eval()
    for block in network.upper:
        torch.nn.init.normal_(block.norm.bias)
    sounds = [Recording("a", data.parent / f"{i}.wav", text) for i, text in enumerate(SPOKEN_TEXTS)]
    items = tuple(read_sound(sound, EXTRACTOR) for sound in sounds)
    loudest = max(item["mel"].max() for item in items)
    for item in items:  # so that none is cut off by a louder one
        item["mel"] += loudest - item["mel"].max()
    together = network(Examples(items, torch.ones(6), ["a"] * 6))
    for place in range(6):
        alone = network(Examples(items[place : place + 1], torch.ones(1), ["a"]))
        for name, one, all_ in zip(alone, alone.values(), together.values(), strict=True):
            torch.testing.assert_close(all_[place], one[0], rtol=1e-4, atol=1e-4, msg=name)


def test_a_run_learns_and_is_served(data: Path, tmp_path: Path):
    result = train_whisper(
        settings(data, tmp_path, "max_steps=40", "save_every=40", "learning_rate=5e-3",
                 "eval_ratio=0")
    )  # fmt: skip
    found = losses(result, "characters_loss")
    assert sum(found[-5:]) < 0.6 * sum(found[:5])
    folder = tmp_path / FINAL / WHISPER_FOLDER
    encoder = whisper_component(folder).load(torch.device("cpu"), torch.float32)
    wave = load_audio(data.parent / "5.wav")
    assert WhisperFeatures(encoder, folder).encode(wave).shape == (segment_codes(len(wave)), 128)
    stored = load_file(folder / "model.safetensors")
    assert all(name.startswith("model.encoder.") for name in stored)


def test_a_resumed_run_equals_an_uninterrupted_one(data: Path, tmp_path: Path):
    options = ["max_steps=6", "save_every=2", "full_from=0.7"]
    whole = train_whisper(settings(data, tmp_path / "whole", *options))
    parts = settings(data, tmp_path / "parts", *options)
    interrupt(lambda: train_whisper(parts), step=3)
    resumed = train_whisper(parts, resume=True)
    for name in ("loss", "eval_loss"):
        assert losses(resumed, name) == losses(whole, name)


def test_what_cannot_be(data: Path, tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"audio": str(data.parent / "0.wav"), "text": "a b " * 30}) + "\n")
    with pytest.raises(
        DataError, match=r"data\.jsonl:1: text: 119 characters cannot be spoken in 0\.64 s"
    ):
        train_whisper(settings(path, tmp_path / "run"))
