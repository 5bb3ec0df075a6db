"""Measurements in processes of their own: whatever one of them does, the others are still made.

Measurements that share a group share a process, which keeps what it has loaded. A failure, or more
time than a measurement may take, ends the process; the next measurement begins in a new one.
Results are written after each. Standard library only, so that this part always works.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

from scripts.benchmark import report

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 180.0
"""In which a process has to have imported everything and found its device."""
CPU_FACTOR = 30
"""How much longer than on an accelerator a measurement may take on a CPU."""
LOG_LINES = 40
WORKER = (sys.executable, "-m", "scripts.benchmark.worker")


@dataclass(frozen=True)
class Measurement:
    """``run`` names a function of :mod:`scripts.benchmark.measurements`, which gets ``arguments``.

    It may take ``seconds`` on an accelerator. ``usual`` ones are made unless others are named.
    """

    run: str
    help: str
    seconds: float
    group: str = "main"
    usual: bool = False
    arguments: tuple[str, ...] = ()


# The order is that of a first run on a new device: what is right before what is fast.
MEASUREMENTS = {
    "references": Measurement("references", "recorded references on the device", 120, "references"),
    "kernels": Measurement("kernels", "kernels and graphs against eager steps", 150, "kernels"),
    "decode": Measurement("decode", "decode steps in each mode, and bandwidth", 150, usual=True),
    "first": Measurement("first", "time to first text and first sound", 150),
    "requests": Measurement("whole_requests", "whole requests by stage", 90, usual=True),
    "speech": Measurement("speech", "detokenizer, vocoder and chunks", 90, usual=True),
    "encoders": Measurement("encoders", "audio encoders", 30, usual=True),
    "speaking": Measurement("speaking", "decode steps beside speech", 60),
    "long_run": Measurement("long_run", "whether anything grows in 1500 steps", 40),
    "int8": Measurement("variant", "int8 beside none", 90, "variants", False, ("int8", "none")),
    "fp8": Measurement("variant", "fp8 beside none", 90, "variants", False, ("fp8", "none")),
    "int4": Measurement("variant", "int4 beside none", 90, "variants", False, ("int4", "none")),
    "fp8-cache": Measurement(
        "variant", "an fp8 key/value cache beside none", 90, "variants", False, ("none", "fp8")
    ),
    "memory": Measurement("memory", "peak memory beside what is promised", 180, "memory"),
    "cold_start": Measurement("cold_start", "a start from nothing", 150, "last", usual=True),
    "profile": Measurement("profile", "where the host waits; a trace in DIR", 60, "last"),
}


@dataclass(frozen=True)
class Setup:
    """What is measured, in plain values for other processes.

    ``weights`` is a checkpoint directory, ``size`` names random weights instead. ``audio`` is a
    sound file, None for the usual question. None for ``device``, ``dtype`` and ``threads`` means
    what suits the machine. ``folder`` takes files such as traces.
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

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next report; one with an ``error`` if the process ended or takes too long."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return {"error": f"stopped after {seconds:.0f} s", "traceback": self._tail()}
        if line is None:
            status = self.process.wait()
            return {"error": f"the process ended with status {status}", "traceback": self._tail()}
        return json.loads(line)

    def _tail(self) -> str:
        """The end of what the process wrote to its log."""
        with open(self._log.name, "rb") as file:
            file.seek(self._start)
            return "\n".join(file.read().decode(errors="replace").splitlines()[-LOG_LINES:])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Results:
    """What was measured; with a ``folder`` also in its results.json and report.md."""

    folder: Path | None
    values: dict[str, Any] = field(default_factory=lambda: {"about": {}, "measurements": {}})

    @classmethod
    def resume(cls, folder: Path | None) -> Results:
        """Continue those in ``folder``, if there are any."""
        results = cls(folder)
        if folder is not None and (folder / "results.json").is_file():
            results.values = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return results

    def done(self, name: str) -> bool:
        entry = self.values["measurements"].get(name)
        return entry is not None and "error" not in entry

    def add(self, name: str, entry: dict[str, Any]) -> None:
        measurements = self.values["measurements"] | {name: entry}
        order = [*MEASUREMENTS, *measurements]
        self.values["measurements"] = dict(
            sorted(measurements.items(), key=lambda item: order.index(item[0]))
        )
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
) -> bool:
    """Make the measurements ``names``; whether all are done and nothing is wrong.

    Nothing is begun once ``minutes`` are over. ``show`` is called with each result. ``command``
    starts a worker.
    """

    def group(name: str) -> str:
        return MEASUREMENTS[name].group

    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    waiting, good = list(names), True
    with _log(setup) as log:
        while waiting:
            together = list(takewhile(lambda name: group(name) == group(waiting[0]), waiting))
            for name, entry in _measure(setup, together, log, results, deadline, command):
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
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The results of ``names`` from one process, up to the first that fails."""
    if time.monotonic() > deadline:
        yield names[0], {"error": "not begun: no time was left", "tables": []}
        return
    worker = Worker(setup, names, log, command)
    try:
        begun = time.monotonic()
        about = worker.receive(START_SECONDS)
        for name in names:
            entry = about
            if "error" not in about:
                results.values["about"] |= about
                factor = CPU_FACTOR if about["device"].startswith("cpu") else 1
                allowed = MEASUREMENTS[name].seconds * factor
                entry = worker.receive(max(1.0, min(allowed, deadline - time.monotonic())))
            now = time.monotonic()
            yield name, {"tables": [], "seconds": now - begun, **entry}
            begun = now
            if "error" in entry:
                return
    finally:
        worker.close()


@contextlib.contextmanager
def _log(setup: Setup) -> Iterator[IO[bytes]]:
    """What processes write to stderr: kept in the folder, or for the time of the run."""
    if setup.folder is not None:
        with open(Path(setup.folder) / "log.txt", "ab") as file:
            yield file
        return
    import tempfile

    with tempfile.NamedTemporaryFile("ab") as file:
        yield file


def commit() -> str:
    """The commit of the checkout; "unknown" without git."""
    # The checkout may belong to another user, as in a container.
    command = ["git", "-c", "safe.directory=*", "describe", "--always", "--dirty"]
    try:
        return subprocess.check_output(command, cwd=ROOT, stderr=subprocess.DEVNULL, text=True)[:-1]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
