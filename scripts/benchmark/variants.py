"""Quantized variants beside each other: the same whole requests in turns, one process for each."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from kimia_infer.layers.quantization import SCHEMES
from kimia_infer.models.kimi_audio.slim import prepare_weights
from kimia_infer.utils.errors import CheckpointError, RequestError, WeightsError

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = "none"
NARROW_CACHE = "+fp8-kv"
REQUESTS = ("text", "speech")
ROOM = 1.2
"""Each further process is expected to need as much as the first one, times this."""


MEMINFO = Path("/proc/meminfo")


class VariantError(RuntimeError):
    """A process of a variant could not go on; the message is its own."""


FAILURES = (RequestError, CheckpointError, WeightsError, VariantError)
"""Of one variant; the others are measured nevertheless."""


@dataclass(frozen=True)
class Setup:
    """What all variants share. ``size`` names random weights, ``directory`` a checkpoint."""

    directory: str | None
    size: str | None
    audio: str | None
    device: str
    dtype: str
    threads: int
    steps: int


def parse_variants(text: str) -> list[str]:
    """Names of variants, the reference first; "all" stands for every scheme.

    Raises:
        RequestError: naming what is not known.
    """
    names = list(SCHEMES) if text == "all" else text.split(",")
    for name in names:
        if name.removesuffix(NARROW_CACHE) not in SCHEMES:
            raise RequestError(
                f"--variants: expected 'all' or some of {', '.join(SCHEMES)}, separated by commas "
                f"and each with {NARROW_CACHE} behind it if wanted; found {name!r}"
            )
    return list(dict.fromkeys([REFERENCE, *names]))


class Worker:
    """A process that has loaded one variant and does what it is asked; close it in the end."""

    def __init__(self, setup: Setup, name: str, directory: Path | None):
        scheme, _, cache = name.partition("+")
        given = asdict(setup) | {
            "directory": None if directory is None else str(directory),
            "scheme": scheme,
            "kv_cache": "fp8" if cache else "none",
        }
        command = [sys.executable, "-m", "scripts.benchmark.variant_worker", json.dumps(given)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
        try:
            self.loaded = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, what: str, **details: object) -> dict:
        """What the process measured; VariantError with its message if it failed."""
        try:
            self._process.stdin.write(json.dumps({"what": what, **details}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise VariantError(f"its process ended with status {self._process.wait()}") from error
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise VariantError(f"its process ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise VariantError(answer["error"])
        return answer

    def close(self) -> None:
        with suppress(BrokenPipeError):  # it has died, and left a question unread
            self._process.stdin.close()  # which ends it
        self._process.wait()
        self._process.stdout.close()


def measure_variants(
    setup: Setup, names: Sequence[str], runs: int, prepared: Path | None = None
) -> dict:
    """Every variant on the same requests, in rounds of all of them; medians over ``runs``.

    All processes stay while memory is known to be enough for them, else each round loads them
    one after another. Checkpoints are prepared in ``prepared``, or for the time of the
    measurement. A variant that fails, in whichever round, has no row: ``left_out`` says why.

    Raises:
        VariantError: no variant could be measured.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="variants-")))
        fleet = _Fleet(setup, folder, prepared or folder)
        stack.callback(fleet.close)
        rounds = (runs + 1) * len(names)
        with tqdm(total=rounds, desc="Variants", disable=None) as bar:
            for index, name in enumerate(names):
                fleet.introduce(name, len(names) - index)
                bar.update()
            for _ in range(runs):
                for name in list(fleet.rows):
                    fleet.take_turn(name)
                    bar.update()
        if not fleet.rows:
            raise VariantError("; ".join(f"{n}: {why}" for n, why in fleet.left_out.items()))
        rows = [fleet.result(name) for name in fleet.rows]
    return {
        "runs": runs,
        "steps": setup.steps,
        "together": fleet.together,
        "left_out": fleet.left_out,
        "rows": rows,
    }


class _Fleet:
    """The processes that are there, and what they have found so far."""

    def __init__(self, setup: Setup, folder: Path, prepared: Path):
        self.setup, self.folder, self.prepared = setup, folder, prepared
        self.workers: dict[str, Worker] = {}
        self.rows: dict[str, dict] = {}
        self.left_out: dict[str, str] = {}
        self.together: bool | None = None
        self.complete: set[str] = set()

    def close(self) -> None:
        with ExitStack() as closing:  # each, whatever becomes of the others
            for worker in self.workers.values():
                closing.callback(worker.close)
        self.workers.clear()

    @contextmanager
    def _worker(self, name: str) -> Iterator[Worker]:
        worker = self.workers.pop(name, None)
        if worker is None:
            worker = Worker(self.setup, name, self._checkpoint(name))
        try:
            yield worker
        except BaseException:
            worker.close()
            raise
        if self.together:
            self.workers[name] = worker
        else:
            worker.close()

    def _checkpoint(self, name: str) -> Path | None:
        if self.setup.directory is None:
            return None
        scheme = name.removesuffix(NARROW_CACHE)
        target = self.prepared / scheme
        if scheme not in self.complete:
            kept = "served" if self.setup.dtype == "bfloat16" else "source"
            prepare_weights(Path(self.setup.directory), target, kept, quantization=scheme)
            self.complete.add(scheme)
        return target

    def introduce(self, name: str, left: int) -> None:
        """Load a variant, judge it, and see whether ``left`` like it fit in memory together."""
        reference = str(self.folder / "reference.pt")
        try:
            with self._worker(name) as worker:
                peak = worker.ask("warm_up")["peak_memory"]
                if self.together is None:
                    free = free_memory(torch.device(self.setup.device))
                    known = None not in (peak, free)
                    self.together = known and ROOM * peak * (left - 1) <= free
                quality = None
                if name == REFERENCE:
                    worker.ask("refer", path=reference)
                elif REFERENCE in self.rows:
                    quality = worker.ask("compare", path=reference)
                loaded = worker.loaded
        except FAILURES as error:
            self.left_out[name] = str(error)
            return
        measured = loaded | {"peak_memory": peak, "quality": quality}
        self.rows[name] = {"measured": measured, "turns": []}

    def take_turn(self, name: str) -> None:
        """One of every request, and decode steps of the language model alone."""
        try:
            with self._worker(name) as worker:
                if not self.together:
                    worker.ask("warm_up")
                found = {request: worker.ask("answer", request=request) for request in REQUESTS}
                decoded = worker.ask("decode")
        except FAILURES as error:
            self.left_out[name] = str(error)
            del self.rows[name]
            return
        self.rows[name]["turns"].append({"requests": found, **decoded})

    def result(self, name: str) -> dict:
        row = self.rows[name]
        turns = row["turns"]
        requests = {request: [turn["requests"][request] for turn in turns] for request in REQUESTS}
        files = None
        if self.setup.directory is not None:
            folder = self.prepared / name.removesuffix(NARROW_CACHE)
            files = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return {
            "name": name,
            "requests": {request: _medians(found) for request, found in requests.items()},
            "steps_per_second": 1 / statistics.median(turn["step_seconds"] for turn in turns),
            "disk_bytes": files,
            **row["measured"],
        }


def _medians(found: Sequence[dict]) -> dict:
    timed = {key for key in found[0] if key.endswith("_seconds")}
    return found[0] | {key: statistics.median(each[key] for each in found) for key in timed}


def free_memory(device: torch.device) -> int | None:
    """Bytes that are left on ``device``; of the host's, what Linux calls available, else None."""
    if device.type != "cpu":
        return torch.accelerator.get_memory_info(device)[0]
    if not MEMINFO.exists():
        return None
    lines = MEMINFO.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
