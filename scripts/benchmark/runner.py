"""Runs each group of measurements in its own process, so that a failure stops nothing else.

A process keeps what it has loaded. A failure, or a measurement that takes too long, ends it; the
next measurement starts in a new one. Results are written after each. Standard library only.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from scripts.benchmark import report

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 180.0
"""Most seconds until a process has imported everything and found its device."""
CPU_FACTOR = 30
"""A measurement may take so much longer on a CPU than on an accelerator."""
LOG_LINES = 40
WORKER = (sys.executable, "-m", "scripts.benchmark.worker")


class Measurement(NamedTuple):
    """``seconds`` are allowed on an accelerator; ``default`` ones run unless others are named."""

    help: str
    seconds: float
    group: str = "main"
    default: bool = False
    model: str = "kimi"


# The order is that of a first run on a new device: what is right before what is fast.
MEASUREMENTS = {
    "references": Measurement("recorded references on the device", 120, "references"),
    "kernels": Measurement("kernels and graphs against eager steps", 150, "kernels"),
    "decode": Measurement("decode steps in each mode, and bandwidth", 150, default=True),
    "first": Measurement("time to first text and first speech", 150),
    "requests": Measurement("whole requests by stage", 90, default=True),
    "speech": Measurement("detokenizer, vocoder and chunks", 90, default=True),
    "encoders": Measurement("audio encoders", 30, default=True),
    "speaking": Measurement("decode steps while speech is synthesized", 60),
    "batches": Measurement("decode steps of 1, 2, 4, ... requests together", 90),
    "long_run": Measurement("whether anything grows in 1500 steps", 40),
    "int8": Measurement("int8 against no quantization", 90, "variants"),
    "fp8": Measurement("fp8 against no quantization", 90, "variants"),
    "int4": Measurement("int4 against no quantization", 90, "variants"),
    "fp8-cache": Measurement("an fp8 key/value cache against a plain one", 90, "variants"),
    "concurrency": Measurement("many clients who ask for speech at a time", 600, "concurrency"),
    "memory": Measurement("peak memory, and what the loader asks for", 180, "memory"),
    "cold_start": Measurement("a fresh process up to its first answer", 150, "last", default=True),
    "laptop": Measurement("steps, answers and memory of a packed checkpoint", 60, "laptop"),
    "laptop-speech": Measurement("the same with Kimi's own speech", 60, "laptop-speech"),
    "profile": Measurement("where the host waits; writes a trace to DIR", 60, "last"),
    "editx-stages": Measurement("every stage of a clone", 120, "editx-stages", True, "editx"),
    "editx-vq02": Measurement("VQ02 and the published loop", 60, "editx-vq02", True, "editx"),
    "editx-decode": Measurement("decode steps, published bias", 60, "editx-decode", True, "editx"),
    "editx-stream": Measurement("the flow in chunks", 60, "editx-stream", True, "editx"),
    "editx-variants": Measurement("quantized clones", 300, "editx-variants", False, "editx"),
}


Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Setup:
    """What is measured, in plain values for other processes.

    ``weights`` is a checkpoint directory, ``size`` names random weights instead. ``audio`` is a
    file, None for scripts/question.wav. ``device``, ``dtype`` and ``threads`` default to what
    the machine has. ``folder`` takes files such as traces. ``clients`` are numbers of clients at a
    time, None for those that suit the device, and ``server`` is the address of a server that runs.
    ``quantization`` is that of random weights in a checkpoint for a CPU.
    """

    weights: str | None = None
    size: str | None = None
    audio: str | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    steps: int = 256
    runs: int = 3
    folder: str | None = None
    clients: Sequence[int] | None = None
    server: str | None = None
    quantization: str | None = None


class Worker:
    """A process that makes measurements one after another and reports each as a line of JSON."""

    def __init__(
        self, setup: Setup, names: Sequence[str], log: IO[bytes], command: Sequence[str] = WORKER
    ):
        asked = json.dumps({"setup": asdict(setup), "names": list(names)})
        self._log, self._start = log, log.tell()
        pipe = subprocess.PIPE
        # It ends when its stdin does, so also if this process is killed.
        self.process = subprocess.Popen(
            [*command, asked], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=log
        )
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def receive(self, seconds: float, advance: Advance = lambda done, of: None) -> dict[str, Any]:
        """The next report; one with an ``error`` if the process ended or takes too long.

        ``advance`` is called with what is done and how much there is, where the process tells.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return {"error": f"stopped after {seconds:.0f} s", "traceback": self._tail()}
            if line is None:
                error = f"the process ended with status {self.process.wait()}"
                return {"error": error, "traceback": self._tail()}
            report = json.loads(line)
            if "progress" not in report:
                return report
            advance(*report["progress"])

    def _tail(self) -> str:
        """The end of what the process wrote to its log."""
        with open(self._log.name, "rb") as file:
            file.seek(self._start)
            return "\n".join(file.read().decode(errors="replace").splitlines()[-LOG_LINES:])


class Results:
    """What was measured; with a ``folder`` also in its results.json and report.md.

    Results that are in ``folder`` already are kept.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.values: dict[str, Any] = {"about": {}, "measurements": {}}
        if folder is not None and (folder / "results.json").is_file():
            self.values = json.loads((folder / "results.json").read_text(encoding="utf-8"))

    def done(self, name: str) -> bool:
        return "error" not in self.values["measurements"].get(name, {"error": "missing"})

    def add(self, name: str, entry: dict[str, Any]) -> None:
        found = self.values["measurements"] | {name: entry}
        order = [n for n in MEASUREMENTS if n in found]
        self.values["measurements"] = {n: found[n] for n in order}
        if self.folder is not None:
            from kimia_infer.utils.files import write_text

            write_text(self.folder / "results.json", json.dumps(self.values, indent=1) + "\n")
            write_text(self.folder / "report.md", report.markdown(self.values))


def run(
    setup: Setup,
    names: Sequence[str],
    results: Results,
    minutes: float | None,
    show: Callable[[str, dict[str, Any]], None],
    command: Sequence[str] = WORKER,
    advance: Advance = lambda done, of: None,
) -> bool:
    """Make the measurements ``names``; whether all are done and nothing is wrong.

    Nothing is started after ``minutes``. ``show`` is called with each result, ``advance`` within a
    measurement that tells how far it is. ``command`` starts a worker.
    """
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    waiting, good = list(names), True
    with (
        tempfile.TemporaryDirectory() as scratch,
        open(Path(setup.folder or scratch, "log.txt"), "ab") as log,
    ):
        while waiting:
            group = MEASUREMENTS[waiting[0]].group
            together = [name for name in waiting if MEASUREMENTS[name].group == group]
            for name, entry in _measure(setup, together, log, results, deadline, command, advance):
                waiting.remove(name)
                results.add(name, entry)
                show(name, entry)
                good &= report.state_of(entry) == "done"
    return good


def _measure(
    setup: Setup,
    names: Sequence[str],
    log: IO[bytes],
    results: Results,
    deadline: float,
    command: Sequence[str],
    advance: Advance,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The results of ``names`` from one process, up to the first that fails."""
    if time.monotonic() > deadline:
        yield names[0], {"error": "not started: no time was left", "tables": []}
        return
    worker = Worker(setup, names, log, command)
    try:
        start = time.monotonic()
        about = worker.receive(START_SECONDS)
        for name in names:
            entry = about
            if "error" not in about:
                results.values["about"] |= about
                factor = CPU_FACTOR if about["device"].startswith("cpu") else 1
                allowed = MEASUREMENTS[name].seconds * factor
                left = max(1.0, min(allowed, deadline - time.monotonic()))
                entry = worker.receive(left, advance)
            now = time.monotonic()
            yield name, {"tables": [], "seconds": now - start, **entry}
            start = now
            if "error" in entry:
                return
    finally:
        worker.process.kill()
        worker.process.wait()
