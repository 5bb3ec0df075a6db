"""What scripts/bench_adapters does in which order, and what of it is done already."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kimia_infer.utils.errors import RequestError
from kimia_infer.utils.files import write_text
from scripts.benchmark.prosody_adapters import Study, Trainings
from scripts.benchmark.prosody_figures import Candidate, Figures, candidates
from scripts.benchmark.prosody_report import report
from scripts.benchmark.prosody_sound import Listener, listen

STAGES = ("train", "prosody", "sound")
TASKS = ("replace", "style")

Measure = Callable[[Candidate], dict[str, Any]]


def run_stages(study: Study, directory: Path, stages: Sequence[str]) -> None:
    """The ``stages`` in ``directory``, and the report of what is there.

    A signal ends it after a step of a training; the run is begun anew the next time.

    Raises:
        RequestError: a stage is not known, or espeak-ng is missing.
        CheckpointError: the model cannot be used, or a package that sound needs is missing.
    """
    for stage in stages:
        if stage not in STAGES:
            raise RequestError(f"stages: expected some of {', '.join(STAGES)}, found {stage!r}")
    listener = Listener() if "sound" in stages else None
    trainings = Trainings(study, directory)
    if "train" in stages:
        for run in trainings.missing():
            print(f"training {run.name}", flush=True)
            if not trainings.train(run):
                return
    figures = Figures(trainings)
    found = list(candidates(trainings))
    if "prosody" in stages:
        fill(directory / "prosody", found, figures.measure)
    if listener is not None:
        ear = listener
        fill(directory / "sound", heard(found), lambda one: listen(figures, ear, one))
    tables = report(*(rows(directory / name, found) for name in ("prosody", "sound")))
    write_text(directory / "report.md", tables)


def heard(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that are spoken: adapters at all LSTMs, and the teacher of the style."""
    most = {task: max(one.strings for one in found if one.task == task) for task in TASKS}
    chosen = [one for one in found if one.seam == "all" and one.strings in (0, most[one.task])]
    return [*chosen, Candidate("style", "teacher")]


def fill(folder: Path, found: Sequence[Candidate], measure: Measure) -> None:
    """A file for each candidate that has none."""
    folder.mkdir(exist_ok=True)
    for candidate in found:
        path = folder / f"{candidate.name}.json"
        if not path.is_file():
            row = measure(candidate)
            write_text(path, json.dumps(row, indent=1) + "\n")
            print(json.dumps(row), flush=True)


def rows(folder: Path, found: Sequence[Candidate]) -> list[dict[str, Any]]:
    """The rows that are there, in the order of the candidates."""
    names = dict.fromkeys([*(one.name for one in found), Candidate("style", "teacher").name])
    paths = [folder / f"{name}.json" for name in names]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
