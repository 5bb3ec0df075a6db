"""The trainings of scripts/bench_adapters: which there are, and each of them in its directory."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor, nn

from kimia_infer.models.kokoro.adapters.config import SEAMS, AdapterConfig
from kimia_infer.models.kokoro.adapters.seams import adapter_parameters, attach, fingerprint
from kimia_infer.models.kokoro.adapters.store import save_adapter
from kimia_infer.models.kokoro.albert import Albert
from kimia_infer.models.kokoro.checkpoint import load_network
from kimia_infer.models.kokoro.layers import Rows
from kimia_infer.models.kokoro.prosody import ProsodyPredictor
from kimia_infer.models.kokoro.voices import Voices
from kimia_infer.training.run_directory import FINAL
from kimia_infer.training.tasks.kokoro import ImitatingNetwork, ProsodyNetwork
from kimia_infer.training.tasks.kokoro_config import AdapterSettings, KokoroTrainingConfig
from kimia_infer.training.tasks.kokoro_data import Example, Line, Lines, Teacher, read_lines
from kimia_infer.training.trainer import Trainer
from kimia_infer.utils.files import replacing, write_text
from kimia_infer.weights.adapter import WEIGHTS_NAME

CELLS = ("cfc", "mamba", "ltc")
FEW = (500, 50, 5)
"""Smaller numbers of strings, from which a speaking style is learned as well."""


@dataclass(frozen=True)
class Study:
    """What all trainings share.

    ``voices`` are trained to replace LSTMs; ``voice`` learns the prosody of ``teacher``;
    ``unheard`` is another voice, for the figures. A training has ``strings`` made-up strings and
    ``steps`` of ``batch_size`` of them, one of few sentences ``few_steps``.
    """

    model: Path
    voices: tuple[str, ...] = ("af_heart", "am_michael", "bf_emma")
    unheard: str = "af_bella"
    voice: str = "af_heart"
    teacher: str = "am_santa"
    strings: int = 2000
    steps: int = 250
    few_steps: int = 63
    batch_size: int = 8
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class Run:
    """One training: its task, ``replace`` or ``style``, its adapter, strings and steps."""

    task: str
    adapter: AdapterConfig
    strings: int
    steps: int

    @property
    def kind(self) -> str:
        return f"{self.adapter.method} {self.adapter.cell or ''}".strip()

    @property
    def seam(self) -> str:
        return "all" if self.adapter.seams == SEAMS else self.adapter.seams[0]

    @property
    def name(self) -> str:
        return f"{self.task} {self.kind} {self.seam} {self.strings}".replace(" ", "-")


def plan(study: Study) -> Iterator[Run]:
    """The trainings, the most telling ones first.

    A cell learns the outputs of its LSTM alone, whatever the others do, so that the cells of a
    single LSTM are those that were trained for all five.
    """
    replacing = [AdapterConfig(method="replace", cell=cell) for cell in CELLS]
    light = [AdapterConfig(), *(AdapterConfig(method="residual", cell=cell) for cell in CELLS)]
    for adapter in replacing:
        yield Run("replace", adapter, study.strings, study.steps)
    for adapter in (*light, *replacing):
        yield Run("style", adapter, study.strings, study.steps)
    for strings in (count for count in FEW if count < study.strings):
        for adapter in light:
            yield Run("style", adapter, strings, study.few_steps)
    for seam in ("shared", "lstm", "text_encoder.lstms.4", *SEAMS[:2]):
        for adapter in light:
            single = adapter.model_copy(update={"seams": (seam,)})
            yield Run("style", single, study.strings, study.steps)


class CachedAlbert(nn.Module):
    """ALBERT that reads each string once: what it gives does not depend on the voice."""

    def __init__(self, albert: Albert):
        super().__init__()
        self.albert = albert
        self._read: dict[tuple[int, ...], Tensor] = {}

    def encode(self, ids: Tensor, rows: Rows) -> Tensor:
        """ids int64 [1, time] -> [1, time, channels]."""
        key = tuple(ids[0].tolist())
        if key not in self._read:
            self._read[key] = self.albert.encode(ids, rows)
        return self._read[key]


class Trainings:
    """Trains in ``directory``/runs; what the teachers say is kept in ``directory``/teachers."""

    def __init__(self, study: Study, directory: Path):
        self.study, self.directory = study, directory
        self.network = load_network(study.model, torch.device("cpu"))
        self.base = fingerprint(self.network.predictor)
        self.network.bert = CachedAlbert(self.network.bert)  # pyrefly: ignore[bad-assignment]
        self.voices = Voices(study.model, 2 * self.network.config.style_dim)
        self._kept: dict[str, dict[Line, Example]] = {}

    def adapter(self, run: Run) -> Path:
        """Where the trained adapter of a run is."""
        return self.directory / "runs" / run.name / FINAL

    def missing(self) -> list[Run]:
        return [run for run in plan(self.study) if not self.adapter(run).is_dir()]

    def train(self, run: Run) -> bool:
        """One run from its first step; whether it came to its end and was not interrupted.

        ``training.json`` beside its adapter says the processor time of all steps.
        """
        settings = self._settings(run)
        predictor = copy.deepcopy(self.network.predictor)
        attach(predictor, run.adapter, settings.seed)
        student: nn.Module = ProsodyNetwork(predictor, run.adapter, settings.weights)
        if run.task == "replace":
            student = ImitatingNetwork(predictor, self.network.predictor, run.adapter)
        elif run.adapter.method == "replace":
            self._begin_as_trained(run, predictor)
        lines = self._lines(run, settings)
        write = partial(
            save_adapter,
            predictor=predictor,
            config=run.adapter,
            base=self.base,
            model=str(self.study.model),
        )
        trainer = Trainer(
            settings, PartialState(cpu=True), student, lines, None, write, lines.lengths
        )
        begun = time.process_time()
        result = trainer.run()
        if result.complete:
            seconds = {"cpu_seconds": time.process_time() - begun}
            write_text(self.adapter(run).parent / "training.json", json.dumps(seconds) + "\n")
        return result.complete

    def _begin_as_trained(self, run: Run, predictor: ProsodyPredictor) -> None:
        """Cells that replace LSTMs have learned to be like them before they learn a style."""
        taught = next(
            other
            for other in plan(self.study)
            if (other.task, other.adapter) == ("replace", run.adapter)
        )
        tensors = load_file(self.adapter(taught) / WEIGHTS_NAME)
        with torch.no_grad():
            for name, parameter in adapter_parameters(predictor).items():
                parameter.copy_(tensors[name])

    def _settings(self, run: Run) -> KokoroTrainingConfig:
        study, replacing = self.study, run.task == "replace"
        return KokoroTrainingConfig(
            model=str(study.model),
            output=str(self.directory / "runs" / run.name),
            device="cpu",
            strings=run.strings,
            voices=study.voices if replacing else (study.voice,),
            teacher_voice=None if replacing else study.teacher,
            objective="outputs" if replacing else "prosody",
            adapter=AdapterSettings(**run.adapter.model_dump()),
            batch_size=study.batch_size,
            learning_rate=study.learning_rate,
            max_steps=run.steps,
            save_every=run.steps,
        )

    def _lines(self, run: Run, settings: KokoroTrainingConfig) -> Lines:
        """The lines of a run, with what the teacher of its task says to them."""
        path = self.directory / "teachers" / f"{run.task}.pt"
        if run.task not in self._kept:
            stored = torch.load(path, weights_only=True) if path.is_file() else {}
            self._kept[run.task] = {Line(*k): Example(**v) for k, v in stored.items()}
        kept = self._kept[run.task]
        teacher = Teacher(self.network, self.voices, settings.teacher_voice)
        items = read_lines(settings, None, self.network.config)
        lines = Lines(items, teacher, settings.cache_gigabytes * 2**30, kept)
        before = len(kept)
        for line in items:
            lines.example(line)
        if len(kept) > before:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partly:
                stored = {(k.where, k.phonemes, k.voice): v.tensors() for k, v in kept.items()}
                torch.save(stored, partly)
        return lines
