"""What was trained is what serving answers; from the untrained miniature, in one sitting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.loading import load_stages
from kimia_infer.training.adapters import apply_adapter
from kimia_infer.training.conversations import ConversationFile
from kimia_infer.training.extraction import extract_codes
from kimia_infer.training.finetune import FINAL, finetune
from tests.training import runs
from tests.training.runs import MINI, TEXTS

PARTS = "parts=[embedding, trunk, mimo, adaptor, heads]"
NEW = "a bird sings on the red house at nine"


@pytest.fixture(autouse=True)
def _long_only(long: bool) -> None:
    if not long:
        pytest.skip("trains for a minute; run with --long")


def lesson(folder: Path, index: int, *answer: dict) -> dict:
    """A sound, longer from lesson to lesson, and what is to be answered."""
    sound = runs.write_sound(folder / f"{index}.wav", 0.6 + 0.3 * index, index)
    question = {"role": "user", "message_type": "audio", "content": str(sound)}
    return {"task_type": "understanding", "conversation": [question, *answer]}


def said(text: str) -> dict:
    return {"role": "assistant", "message_type": "text", "content": text}


def write(folder: Path, name: str, lessons: list[dict]) -> Path:
    """Lessons with their codes."""
    raw, data = folder / f"{name}.raw.jsonl", folder / f"{name}.jsonl"
    raw.write_text("".join(json.dumps(line) + "\n" for line in lessons))
    extract_codes(raw, data, MINI, folder, "cpu", 1)
    return data


def answers(model: KimiAudio, lessons: list[dict], output_type: str = "text") -> list[tuple]:
    return [model.generate(line["conversation"][:1], output_type=output_type) for line in lessons]


def test_text_answers_then_one_more_by_an_adapter(tmp_path: Path):
    lessons = [lesson(tmp_path, i, said(text)) for i, text in enumerate(TEXTS)]
    options = ("eval_ratio=0", "batch_size=5", "weight_decay=0")
    data = write(tmp_path, "known", lessons)
    full = tmp_path / "full"
    outcome = finetune(
        runs.settings(data, full, *options, PARTS, "learning_rate=2e-3", "max_steps=150")
    )
    assert outcome.metrics[-1]["loss"] < 0.02
    model = KimiAudio(str(full / FINAL), load_detokenizer=False, device="cpu")
    assert [text for _, text in answers(model, lessons)] == list(TEXTS)

    lessons.append(lesson(tmp_path, len(TEXTS), said(NEW)))
    assert answers(model, lessons[-1:])[0][1] != NEW
    data = write(tmp_path, "new", lessons)
    adapter = tmp_path / "lora"
    settings = runs.settings(
        data, adapter, *options, f"model={full / FINAL}", "method=lora", "learning_rate=5e-3",
        "max_steps=100",
    )  # fmt: skip
    finetune(settings)
    stages = load_stages(full / FINAL, False, torch.device("cpu"), torch.float32)
    apply_adapter(adapter / FINAL, stages.language_model, stages.whisper_features.encoder)
    model = KimiAudio.from_stages(stages)
    assert [text for _, text in answers(model, lessons)] == [*TEXTS, NEW]


def test_spoken_answers(tmp_path: Path):
    def spoken(index: int, text: str) -> dict:
        sound = runs.write_sound(tmp_path / f"answer{index}.wav", 1.6 + 0.2 * index, 50 + index)
        return {
            "role": "assistant", "message_type": "audio-text", "content": [str(sound), text]
        }  # fmt: skip

    lessons = [lesson(tmp_path, i, spoken(i, text)) for i, text in enumerate(TEXTS[:3])]
    data = write(tmp_path, "spoken", lessons)
    output = tmp_path / "run"
    finetune(
        runs.settings(
            data,
            output,
            PARTS,
            "eval_ratio=0",
            "batch_size=3",
            "weight_decay=0",
            "learning_rate=2e-3",
            "max_steps=200",
            "spoken_answers=true",
        )
    )
    model = KimiAudio(str(output / FINAL), device="cpu")
    found = answers(model, lessons, "both")
    assert [text for _, text in found] == list(TEXTS[:3])
    codes = [len(conversation.audio_ids[1]) for conversation in ConversationFile(data)]
    assert [wave.shape[-1] / 1920 for wave, _ in found] == codes
