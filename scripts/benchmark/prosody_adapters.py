"""The measurements of scripts/bench_adapters: one adapter after the other, trained and compared."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from kimia_infer.evaluation.prosody import prosody_agreement
from kimia_infer.models.kokoro.adapters.config import SEAMS, AdapterConfig
from kimia_infer.models.kokoro.adapters.seams import adapter_parameters, attach
from kimia_infer.models.kokoro.checkpoint import load_network
from kimia_infer.models.kokoro.layers import Rows
from kimia_infer.models.kokoro.prosody import ProsodyPredictor
from kimia_infer.models.kokoro.voices import Voices
from kimia_infer.training.tasks.kokoro import ImitatingNetwork, ProsodyNetwork
from kimia_infer.training.tasks.kokoro_config import AdapterSettings, KokoroTrainingConfig
from kimia_infer.training.tasks.kokoro_data import Example, Line, Lines, Teacher, read_lines
from kimia_infer.training.trainer import Trainer
from scripts.benchmark.phoneme_sentences import SENTENCES

PHONEMES, FRAMES = 60, 400
"""Positions of a call whose time is measured: a sentence, and ten seconds of speech."""

TASKS = ("replace", "style")


@dataclass(frozen=True)
class Budget:
    """What each adapter gets: ``steps`` of ``batch_size`` of ``strings`` made-up strings."""

    strings: int
    steps: int
    style_steps: int
    batch_size: int
    learning_rate: float
    sentences: int


@dataclass(frozen=True)
class Study:
    """Who teaches whom: ``voices`` are trained, ``unheard`` is another one, for the replacements;
    for the style, ``voice`` learns the prosody of ``teacher``."""

    model: Path
    voices: tuple[str, ...]
    unheard: str
    voice: str
    teacher: str
    budget: Budget


def plan(task: str) -> Iterator[AdapterConfig]:
    """The adapters of a task: each kind at all seams, then at each of them."""
    places: list[tuple[str, ...]] = [SEAMS, *((seam,) for seam in SEAMS)]
    cells = ("cfc", "ltc", "mamba")
    kinds: list[dict[str, Any]] = [{"method": "replace", "cell": cell} for cell in cells]
    if task == "style":
        kinds = [{"method": "lora"}, *({"method": "residual", "cell": cell} for cell in cells)]
    for seams in places:
        for kind in kinds:
            yield AdapterConfig.model_validate({**kind, "seams": seams})


class Bench:
    """One network, and what its teachers say to the strings, computed once for all adapters."""

    def __init__(self, study: Study):
        self.study = study
        self.network = load_network(study.model, torch.device("cpu"))
        self.voices = Voices(study.model, 2 * self.network.config.style_dim)
        self._taught: dict[str, Lines] = {}
        self._answers: dict[str, list[Example]] = {}

    def run(self, task: str, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """A row for the model as it is and for every adapter, but those ``known``."""
        done = {(row["task"], row["kind"], row["seams"]) for row in known}
        if (task, "lstm", "all") not in done:
            lstm = self.network.predictor.lstm
            yield {
                **{"task": task, "kind": "lstm", "seams": "all"},
                "parameters": len(SEAMS) * parameters_of(lstm),
                **self._measured(task, self.network.predictor, lstm),
            }
        for adapter in plan(task):
            kind = f"{adapter.method} {adapter.cell or ''}".strip()
            seams = "all" if adapter.seams == SEAMS else adapter.seams[0]
            if (task, kind, seams) not in done:
                found = self._trained(task, adapter)
                yield {"task": task, "kind": kind, "seams": seams, **found}

    def _trained(self, task: str, adapter: AdapterConfig) -> dict[str, Any]:
        settings = self._settings(task, adapter)
        predictor = copy.deepcopy(self.network.predictor)
        attach(predictor, adapter, settings.seed)
        student: nn.Module = ProsodyNetwork(predictor, settings.adapter, settings.weights)
        if task == "replace":
            student = ImitatingNetwork(predictor, self.network.predictor, settings.adapter)
        lines = self._lines(task, settings)
        with tempfile.TemporaryDirectory() as folder:
            settings = settings.model_copy(update={"output": folder})
            trainer = Trainer(
                settings, PartialState(cpu=True), student, lines, None, Path.mkdir, lines.lengths
            )
            begun = time.process_time()
            metrics = trainer.run().metrics
            seconds = time.process_time() - begun
        predictor.eval()
        module = predictor.get_submodule(adapter.seams[0])
        return {
            "parameters": sum(p.numel() for p in adapter_parameters(predictor).values()),
            **self._measured(task, predictor, module),
            "training_cpu_seconds": seconds,
            "first_loss": metrics[0]["loss"],
            "last_loss": statistics.mean(line["loss"] for line in metrics[-10:]),
        }

    def _measured(
        self, task: str, predictor: ProsodyPredictor, module: nn.Module
    ) -> dict[str, Any]:
        width = self.network.predictor.lstm.input_size
        return {
            "phonemes_ms": milliseconds(module, PHONEMES, width),
            "frames_ms": milliseconds(module, FRAMES, width),
            **asdict(prosody_agreement(predictor, self._held_out(task))),
        }

    def _settings(self, task: str, adapter: AdapterConfig) -> KokoroTrainingConfig:
        study, budget = self.study, self.study.budget
        replacing = task == "replace"
        return KokoroTrainingConfig(
            model=str(study.model),
            output="-",
            device="cpu",
            strings=budget.strings,
            voices=study.voices if replacing else (study.voice,),
            teacher_voice=None if replacing else study.teacher,
            objective="outputs" if replacing else "prosody",
            adapter=AdapterSettings(**adapter.model_dump()),
            batch_size=budget.batch_size,
            learning_rate=budget.learning_rate,
            max_steps=budget.steps if replacing else budget.style_steps,
        )

    def _lines(self, task: str, settings: KokoroTrainingConfig) -> Lines:
        if task not in self._taught:
            teacher = Teacher(self.network, self.voices, settings.teacher_voice)
            lines = read_lines(settings, None, self.network.config)
            self._taught[task] = Lines(lines, teacher, settings.cache_gigabytes * 2**30)
            for line in lines:
                self._taught[task].example(line)
        return self._taught[task]

    def _held_out(self, task: str) -> list[Example]:
        """The teacher's answers to real sentences, which no adapter was trained on."""
        if task not in self._answers:
            study, styled = self.study, task == "style"
            teacher = Teacher(self.network, self.voices, study.teacher if styled else None)
            voice = study.voice if styled else study.unheard
            texts = SENTENCES[: study.budget.sentences]
            lines = (Line(f"sentence {n}", text, voice) for n, text in enumerate(texts, 1))
            self._answers[task] = [teacher(line) for line in lines]
        return self._answers[task]


def milliseconds(module: nn.Module, positions: int, width: int, runs: int = 7) -> float:
    """Median processor time of a call of what stands at a seam, one row of ``width`` channels.

    With one thread it is the time on a machine that does nothing else.
    """
    x = torch.randn(1, positions, width, generator=torch.Generator().manual_seed(0))
    times = []
    with torch.inference_mode():
        for _ in range(runs):
            begun = time.process_time()
            module(x, Rows())
            times.append(1000 * (time.process_time() - begun))
    return statistics.median(times)


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


COLUMNS = {
    "kind": "",
    "seams": "seam",
    "parameters": "parameters",
    "phonemes_ms": f"CPU ms, {PHONEMES} phonemes",
    "frames_ms": f"CPU ms, {FRAMES} frames",
    "equal": "durations equal",
    "within_one": "within one frame",
    "length": "total length",
    "cents": "F0, cents",
    "voicing": "voicing equal",
    "energy": "N error",
    "training_cpu_seconds": "training, CPU s",
}


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table for each task."""
    texts = []
    for task in TASKS:
        mine = [row for row in rows if row["task"] == task]
        if not mine:
            continue
        lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
        lines += [[_shown(name, row.get(name)) for name in COLUMNS] for row in mine]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        deviation = mine[0]["energy_deviation"]
        texts.append(f"## {task}\n\nStandard deviation of N: {deviation:.2f}\n\n{table}\n")
    return "\n".join(texts)


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if name == "parameters":
        return f"{value:,}"
    digits = {"phonemes_ms": 1, "frames_ms": 1, "cents": 0, "training_cpu_seconds": 0}
    return f"{value:.{digits.get(name, 3 if name in ('equal', 'within_one', 'length') else 2)}f}"
