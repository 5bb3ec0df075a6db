"""What was trained is what serving answers; from the untrained miniature, in one sitting."""

from __future__ import annotations

import json
from pathlib import Path

import cog
import pytest

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.audio.files import write_wav
from kimia_infer.data.conversations import ConversationFile
from kimia_infer.data.extraction import extract_codes
from kimia_infer.serving.cog.schema import read_inputs
from kimia_infer.training.export import export
from kimia_infer.training.run_directory import FINAL
from kimia_infer.training.tasks.finetune import finetune
from predict import Predictor
from scripts.miniature.espeak import RATE, speak_all
from scripts.miniature.voices import Utterance, Voice
from tests.training import runs
from tests.training.runs import TEXTS

PARTS = "parts=[embedding, trunk, mimo, adaptor, heads]"
NEW = "a bird sings on the red house at nine"


@pytest.fixture(autouse=True)
def _long_only(long: bool) -> None:
    if not long:
        pytest.skip("trains for a minute; run with --long")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> dict[str, Path]:
    """The sentences as espeak-ng speaks them."""
    folder, texts = tmp_path_factory.mktemp("speech"), (*TEXTS, NEW)
    speeches = speak_all([Utterance(text, Voice("en-us", 150, 50)) for text in texts])
    paths = {text: folder / f"{number}.wav" for number, text in enumerate(texts)}
    for path, speech in zip(paths.values(), speeches, strict=True):
        write_wav(path, speech.wave / 2**15, RATE)
    return paths


def lesson(sound: Path, *answer: dict) -> dict:
    """What is said and what is to be answered."""
    question = {"role": "user", "message_type": "audio", "content": str(sound)}
    return {"task_type": "understanding", "conversation": [question, *answer]}


def said(text: str) -> dict:
    return {"role": "assistant", "message_type": "text", "content": text}


def write(folder: Path, name: str, lessons: list[dict], model: Path) -> Path:
    """Lessons with their codes."""
    raw, data = folder / f"{name}.raw.jsonl", folder / f"{name}.jsonl"
    raw.write_text("".join(json.dumps(line) + "\n" for line in lessons))
    extract_codes(raw, data, model, folder, "cpu", 1)
    return data


def answers(model: KimiAudio, lessons: list[dict], output_type: str = "text") -> list[tuple]:
    return [model.generate(line["conversation"][:1], output_type=output_type) for line in lessons]


def test_transcripts_then_one_more_by_an_adapter(
    sounds: dict[str, Path], untrained: Path, tmp_path: Path, monkeypatch
):
    lessons = [lesson(sounds[text], said(text)) for text in TEXTS]
    options = ("eval_ratio=0", "batch_size=5", "weight_decay=0")
    data = write(tmp_path, "known", lessons, untrained)
    full = tmp_path / "full"
    first = (f"model={untrained}", PARTS, "learning_rate=2e-3", "max_steps=150")
    result = finetune(runs.settings(data, full, *options, *first))
    assert result.metrics[-1]["loss"] < 0.02
    model = KimiAudio(str(full / FINAL), load_detokenizer=False, device="cpu")
    assert [text for _, text in answers(model, lessons)] == list(TEXTS)

    lessons.append(lesson(sounds[NEW], said(NEW)))
    assert answers(model, lessons[-1:])[0][1] != NEW
    data = write(tmp_path, "new", lessons, untrained)
    adapter = tmp_path / "lora"
    settings = runs.settings(
        data, adapter, *options, f"model={full / FINAL}", "method=lora", "learning_rate=5e-3",
        "max_steps=100",
    )  # fmt: skip
    finetune(settings)
    model = KimiAudio(
        str(full / FINAL), load_detokenizer=False, device="cpu", adapter=adapter / FINAL
    )
    assert [text for _, text in answers(model, lessons)] == [*TEXTS, NEW]

    export(adapter, tmp_path / "merged", merge=True)
    assert served(tmp_path / "merged", monkeypatch, lessons) == [*TEXTS, NEW]


def served(weights: Path, monkeypatch: pytest.MonkeyPatch, lessons: list[dict]) -> list[str]:
    """What the Cog predictor answers, set up with ``weights``."""
    monkeypatch.setenv("KIMI_AUDIO_WEIGHTS", str(weights))
    monkeypatch.setenv("KIMI_AUDIO_DEVICE", "cpu")
    predictor = Predictor()
    predictor.setup()
    inputs = {name: schema["default"] for name, schema in read_inputs("Predictor").items()}
    inputs["output_type"] = "text"
    questions = [line["conversation"][0]["content"] for line in lessons]
    return [predictor.run(**inputs | {"audio": cog.Path(path)}).text for path in questions]


def test_spoken_answers(sounds: dict[str, Path], untrained: Path, tmp_path: Path):
    def spoken(index: int, text: str) -> dict:
        sound = runs.write_sound(tmp_path / f"answer{index}.wav", 1.6 + 0.2 * index, 50 + index)
        return {
            "role": "assistant", "message_type": "audio-text", "content": [str(sound), text]
        }  # fmt: skip

    lessons = [lesson(sounds[text], spoken(i, text)) for i, text in enumerate(TEXTS[:3])]
    data = write(tmp_path, "spoken", lessons, untrained)
    output = tmp_path / "run"
    finetune(
        runs.settings(
            data,
            output,
            f"model={untrained}",
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
