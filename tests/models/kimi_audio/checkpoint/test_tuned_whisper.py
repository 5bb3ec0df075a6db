"""Fine-tuned checkpoints whose Whisper encoder is stored with the language model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.models.kimi_audio.checkpoint import LAYOUT
from kimia_infer.models.kimi_audio.components import understanding_components
from kimia_infer.models.kimi_audio.slim import prepare_weights
from kimia_infer.training.config import FinetuneConfig, read_config
from kimia_infer.training.run_directory import FINAL
from kimia_infer.training.tasks.finetune import finetune
from tests.training import runs

FOLDER, PREFIX = "whisper-large-v3", "whisper_model.speech_encoder."


@pytest.fixture
def exported(tmp_path: Path, untrained: Path) -> Path:
    """A checkpoint whose folder has the tuned encoder: one head, as its size says."""
    target = tmp_path / "exported"
    shutil.copytree(untrained, target)
    path = target / FOLDER / "config.json"
    config = json.loads(path.read_text()) | {"encoder_attention_heads": 1}
    path.write_text(json.dumps(config))
    stored = target / FOLDER / "model.safetensors"
    torch.manual_seed(0)
    tensors = {n: t + 0.05 * torch.randn(t.shape).to(t) for n, t in load_file(stored).items()}
    save_file(tensors, stored)
    return target


@pytest.fixture(params=["none", "another"])
def tuned(request, exported: Path, tmp_path: Path, untrained: Path) -> Path:
    """The same encoder in the file of the language model; its folder is missing or another."""
    target = tmp_path / "tuned"
    shutil.copytree(exported, target)
    encoder = load_file(target / FOLDER / "model.safetensors")
    tensors = load_file(target / "model.safetensors")
    names = {n: PREFIX + n.removeprefix("model.encoder.") for n in encoder if ".encoder." in n}
    save_file({**tensors, **{names[n]: encoder[n] for n in names}}, target / "model.safetensors")
    if request.param == "none":
        shutil.rmtree(target / FOLDER)
    else:
        shutil.copy(untrained / FOLDER / "model.safetensors", target / FOLDER / "model.safetensors")
    return target


def answer(path: Path, sound: Path) -> tuple[list[int], list[int]]:
    model = KimiAudio(str(path), device="cpu")
    chats = [{"role": "user", "message_type": "audio", "content": str(sound)}]
    *_, last = model.stream(chats, output_type="both", max_new_tokens=16, seed=1)
    return last.text_ids, last.audio_ids


def test_it_is_served_and_prepared(exported: Path, tuned: Path, tmp_path: Path, untrained: Path):
    sound = runs.write_sound(tmp_path / "sound.wav", 1.0, 3)
    expected = answer(exported, sound)
    assert expected != answer(untrained, sound)
    assert LAYOUT.missing_files(tuned) == []
    assert answer(tuned, sound) == expected
    prepare_weights(tuned, tmp_path / "slim", dtype="source")
    assert answer(tmp_path / "slim", sound) == expected


def test_a_run_begins_with_it_and_keeps_it(tuned: Path, tmp_path: Path):
    data = runs.write_data(tmp_path)
    known = [a for a in runs.assignments_of(data, tmp_path / "run") if not a.startswith("model=")]
    options = [f"model={tuned}", "max_steps=1", "parts=[mimo]"]
    finetune(read_config(FinetuneConfig, None, [*known, *options]))
    final = tmp_path / "run" / FINAL
    before, after = (load_file(path / "model.safetensors") for path in (tuned, final))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        changed = not torch.equal(after[name], tensor)
        assert not changed or "mimo" in name
    whisper = understanding_components(final)["whisper"]
    stored = load_file(final / FOLDER / "model.safetensors")
    module = whisper.load(torch.device("cpu"), torch.float32)
    for name, parameter in module.named_parameters():
        expected = before[PREFIX + name].float()
        assert torch.equal(parameter, expected)
        assert torch.equal(stored[f"model.encoder.{name}"].float(), expected)


def test_a_folder_is_missed_where_there_is_no_other_encoder(tmp_path: Path, untrained: Path):
    target = tmp_path / "plain"
    shutil.copytree(untrained, target)
    shutil.rmtree(target / FOLDER)
    assert LAYOUT.missing_files(target) == [f"{FOLDER}/config.json", f"{FOLDER}/model.safetensors"]
