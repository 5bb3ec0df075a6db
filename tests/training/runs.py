"""Small data and small runs on the miniature."""

from __future__ import annotations

import itertools
import json
import wave
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kimia_infer.training.config import FinetuneConfig, read_config
from kimia_infer.training.trainer import TrainingResult
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


def settings(data: Path, output: Path, *assignments: str) -> FinetuneConfig:
    return read_config(FinetuneConfig, None, assignments_of(data, output, *assignments))


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


def losses(result: TrainingResult, name: str = "loss") -> list[float]:
    """What was reported under ``name``, step by step."""
    return [line[name] for line in result.metrics if name in line]


@contextmanager
def before_step(number: int, act: Callable[[torch.optim.Optimizer], None]) -> Iterator[None]:
    """Call ``act`` with the optimizer just before its step ``number``, which counts from 1."""
    steps = itertools.count(1)

    def hook(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if next(steps) == number:
            act(optimizer)

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def interrupt(run: Callable[[], object], step: int) -> None:
    """Run, and break off hard when ``step`` steps are done."""

    def stop(_: torch.optim.Optimizer) -> None:
        raise KeyboardInterrupt

    with before_step(step + 1, stop), pytest.raises(KeyboardInterrupt):
        run()
