"""The figures of adapters for scripts/bench_adapters: size, time, distance to the teacher."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from kimia_infer.evaluation.prosody import prosody_agreement
from kimia_infer.models.kokoro.adapters.config import SEAMS, Seam
from kimia_infer.models.kokoro.adapters.store import apply_adapter
from kimia_infer.models.kokoro.layers import Rows
from kimia_infer.models.kokoro.phonemes.reading import read_text
from kimia_infer.models.kokoro.prosody import ProsodyPredictor
from kimia_infer.training.tasks.kokoro_data import Example, Line, Teacher
from kimia_infer.weights.adapter import WEIGHTS_NAME
from scripts.benchmark.phoneme_sentences import LONG, SHORT
from scripts.benchmark.prosody_adapters import Trainings, plan

PHONEMES, FRAMES = 60, 400
"""Positions of a call whose time is measured: a sentence, and ten seconds of speech."""

TEXTS = {"short": SHORT, "longer": LONG[:4], "longest": LONG[4:]}


@dataclass(frozen=True)
class Candidate:
    """What is compared: the model as it is, or with an adapter that was trained at ``seams``.

    ``strings`` are those of the training; of a cell that was trained with the others, ``seams``
    are where it is used.
    """

    task: str
    kind: str
    seams: tuple[Seam, ...] = SEAMS
    strings: int = 0
    adapter: Path | None = None

    @property
    def seam(self) -> str:
        return "all" if self.seams == SEAMS else self.seams[0]

    @property
    def name(self) -> str:
        return f"{self.task} {self.kind} {self.seam} {self.strings}".replace(" ", "-")

    @property
    def labels(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "kind": self.kind,
            "seam": self.seam,
            "strings": self.strings,
        }


def candidates(trainings: Trainings) -> Iterator[Candidate]:
    """The model as it is for each task, what was trained, and each replacing cell alone."""
    yield from (Candidate(task, "lstm") for task in ("replace", "style"))
    for run in plan(trainings.study):
        path = trainings.adapter(run)
        if not path.is_dir():
            continue
        yield Candidate(run.task, run.kind, run.adapter.seams, run.strings, path)
        if run.task == "replace":
            for seam in SEAMS:
                yield Candidate(run.task, run.kind, (seam,), run.strings, path)


class Figures:
    """Measures candidates against what the teachers say to real sentences."""

    def __init__(self, trainings: Trainings):
        self.trainings, self.study = trainings, trainings.study
        self._answers: dict[tuple[str, str, str], list[Example]] = {}

    def predictor(self, candidate: Candidate) -> ProsodyPredictor:
        """As it is served. Raises CheckpointError if the adapter cannot be used."""
        plain = self.trainings.network.predictor
        changed = copy.deepcopy(plain)
        if candidate.adapter is not None:
            apply_adapter(changed, candidate.adapter)
            if candidate.task == "replace":
                for seam in set(SEAMS) - set(candidate.seams):
                    changed.set_submodule(seam, plain.get_submodule(seam))
        return changed

    def measure(self, candidate: Candidate) -> dict[str, Any]:
        """The row of a candidate; agreements by voice and length of the sentences."""
        study, predictor = self.study, self.predictor(candidate)
        module = predictor.get_submodule(candidate.seams[0])
        width = self.trainings.network.predictor.lstm.input_size
        sets = {"unheard": (study.unheard, "short")}
        if candidate.seam == "all" or candidate.task == "style":
            sets["short"] = (study.voice, "short")
        if candidate.seam == "all":
            sets |= {name: (study.voice, name) for name in TEXTS}
        return {
            **candidate.labels,
            "parameters": self._parameters(candidate),
            "phonemes_ms": milliseconds(module, PHONEMES, width),
            "frames_ms": milliseconds(module, FRAMES, width),
            **{
                name: asdict(prosody_agreement(predictor, self._taught(candidate.task, *of)))
                for name, of in sets.items()
            },
        }

    def _parameters(self, candidate: Candidate) -> int:
        """Of the adapter, at the seams where it is used; of the LSTMs, if there is none."""
        if candidate.adapter is None:
            lstm = self.trainings.network.predictor.lstm
            return len(SEAMS) * sum(parameter.numel() for parameter in lstm.parameters())
        stored = load_file(candidate.adapter / WEIGHTS_NAME)
        starts = tuple(f"{seam}." for seam in candidate.seams)
        return sum(value.numel() for name, value in stored.items() if name.startswith(starts))

    def _taught(self, task: str, voice: str, texts: str) -> list[Example]:
        """The teacher's answers to sentences, none of which an adapter was trained on."""
        key = (task, voice, texts)
        if key not in self._answers:
            trainings = self.trainings
            style = self.study.teacher if task == "style" else None
            teacher = Teacher(trainings.network, trainings.voices, style)
            lines = (Line(text, text, voice) for text in self.phonemes[texts])
            self._answers[key] = [teacher(line) for line in lines]
        return self._answers[key]

    @cached_property
    def phonemes(self) -> dict[str, list[str]]:
        """The sentences, read with espeak-ng in American English."""
        config = self.trainings.network.config

        def read(texts: Sequence[str]) -> list[str]:
            pieces = [read_text(text, "en-us", config.vocab, config.max_phonemes) for text in texts]
            return [" ".join(piece.phonemes for piece in found) for found in pieces]

        return {name: read(texts) for name, texts in TEXTS.items()}


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
