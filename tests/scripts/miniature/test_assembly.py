"""Checkpoints of the miniature: the base that is trained, and the whole."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.loading import load_components
from kimia_infer.models.kimi_audio.checkpoint import SPEECH_TOKENIZER_FOLDER, WHISPER_FOLDER
from kimia_infer.models.kimi_audio.text_tokenizer import TextTokenizer
from scripts.miniature.assembly import assemble
from scripts.miniature.scoring import load_model
from scripts.miniature.spoken_world import REPEAT
from scripts.miniature.world.whole import vocabulary
from tests.paths import MINI


def test_every_word_of_the_world_is_a_token(base: Path):
    tokenizer = TextTokenizer(base)
    for word in vocabulary():
        assert len(tokenizer.encode(f" {word}")) == 1
    assert len(tokenizer.encode(" ".join(vocabulary()[:10]))) <= 12
    assert len(tokenizer.encode(REPEAT)) < 10


def test_the_base_is_whole(base: Path):
    model = KimiAudio(str(base), load_detokenizer=True)
    for part in (SPEECH_TOKENIZER_FOLDER, WHISPER_FOLDER):
        expected = load_file(MINI / part / "model.safetensors")
        found = load_file(base / part / "model.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    chats = [{"role": "user", "message_type": "text", "content": "hello"}]
    wav, _ = model.generate(chats, output_type="both", max_new_tokens=9)
    assert wav is None or wav.shape[0] == 1
    size = (base / "model.safetensors").stat().st_size
    assert size < 9e6


def test_the_assembled_miniature_has_every_part(base: Path, tmp_path: Path):
    target = tmp_path / "whole"
    assemble(base, MINI / "audio_detokenizer", MINI / "vocoder", target)
    components = load_components(target, True, torch.device("cpu"), torch.float32)
    expected = load_components(MINI, True, torch.device("cpu"), torch.float32)
    for name in ("dit", "vocoder"):
        found = getattr(components.detokenizer, name).state_dict()
        for key, value in getattr(expected.detokenizer, name).state_dict().items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-3)
    found = components.language_model.state_dict()
    for name, value in load_model(base, "full").language_model.state_dict().items():
        assert torch.equal(found[name], value)
