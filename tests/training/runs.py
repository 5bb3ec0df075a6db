"""Small data and small runs on the miniature."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from kimia_infer.training import trainer
from kimia_infer.training.config import FinetuneSettings, read_settings
from tests.paths import MINI

TEXTS = ("the small red house", "a dog barks", "yes", "the bus stops at nine", "a blue bird sings")


def write_sound(path: Path, seconds: float, seed: int) -> Path:
    """A wav file of a few tones, 16 kHz."""
    time = np.arange(int(16_000 * seconds)) / 16_000
    tones = np.random.default_rng(seed).uniform(200, 2_000, (3, 1))
    samples = np.sin(2 * np.pi * tones * time).sum(axis=0) / 6
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((samples * 32_767).astype("<i2").tobytes())
    return path


def write_data(folder: Path, lines: int = 5) -> Path:
    """Questions about sounds; every third is answered with a sound, too. Without codes."""
    path = folder / "train.jsonl"
    with path.open("w") as file:
        for index in range(lines):
            sound = write_sound(folder / f"{index}.wav", 0.3 + 0.2 * index, index)
            messages = [
                ("user", "text", "What is it?"),
                ("user", "audio", sound.name),
                ("assistant", "text", TEXTS[index % len(TEXTS)]),
            ]
            if index % 3 == 1:
                messages.append(("assistant", "audio", sound.name))
            keys = ("role", "message_type", "content")
            values = {
                "task_type": "chat" if index % 3 == 1 else "understanding",
                "conversation": [dict(zip(keys, m, strict=True)) for m in messages],
            }
            file.write(json.dumps(values) + "\n")
    return path


SPOKEN_TEXTS = ("no", "yes it is", "oh", "a dog", "it is", "no no")


def write_spoken(folder: Path, texts: Sequence[str]) -> Path:
    """A list of sounds of growing length with these texts."""
    sounds = write_sounds(folder, len(texts), 0.6, 0.1)
    lines = ({"audio": str(path), "text": text} for path, text in zip(sounds, texts, strict=True))
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_sounds(folder: Path, count: int, seconds: float, growth: float) -> list[Path]:
    """Sounds ``0.wav`` and so on, each longer than the one before."""
    return [write_sound(folder / f"{i}.wav", seconds + growth * i, i) for i in range(count)]


def settings(data: Path, output: Path, *assignments: str) -> FinetuneSettings:
    return read_settings(FinetuneSettings, None, assignments_of(data, output, *assignments))


def assignments_of(data: Path, output: Path, *assignments: str) -> list[str]:
    return [
        f"model={MINI}",
        f"data={data}",
        f"audio_root={data.parent}",
        f"output={output}",
        "device=cpu",
        "workers=0",
        "learning_rate=1e-3",
        "batch_size=2",
        "gradient_checkpointing=false",
        *assignments,
    ]


def losses(outcome: trainer.Outcome, name: str = "loss") -> list[float]:
    """What was reported under ``name``, step by step."""
    return [line[name] for line in outcome.metrics if name in line]


def interrupt(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object], step: int) -> None:
    """Run, and break off hard when ``step`` steps are done."""
    one_step = trainer.Trainer._one_step

    def until(self, stream):
        if self.step == step:
            raise KeyboardInterrupt
        return one_step(self, stream)

    monkeypatch.setattr(trainer.Trainer, "_one_step", until)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.undo()
