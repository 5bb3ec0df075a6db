"""A start from nothing: a process that loads the model, answers once and prints its timings."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict

from scripts.benchmark.measuring import memory, synchronize
from scripts.benchmark.report import Table
from scripts.benchmark.requests import LENGTHS, MOMENTS, REQUESTS, answer
from scripts.benchmark.runner import ROOT, Setup
from scripts.benchmark.worker import Bench


class ColdStartError(RuntimeError):
    """The process that was to start from nothing failed; the message is its own."""


def cold_start(setup: Setup) -> Table:
    """Seconds from the start of a fresh process to its first spoken answer.

    Files of a checkpoint may still be in the operating system's cache.
    """
    command = [sys.executable, "-m", "scripts.benchmark.cold_start"]
    command += [json.dumps(asdict(setup)), str(time.monotonic())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        raise ColdStartError(f"cold start failed: {(done.stderr.splitlines() or ['?'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    loaded = "files may be cached" if setup.weights else "load: random weights are made"
    used = ", ".join(f"{name} {value:.2f}" for name, value in found["memory"].items())
    return Table(
        f"Cold start: a fresh process to the end of its first spoken answer ({loaded})",
        [{"": name, "s": seconds} for name, seconds in found["seconds"].items()],
        [f"Memory: {used}."],
    )


def first_answer(setup: Setup, started: float) -> dict:
    """What :func:`cold_start` measures, seen from the inside; all modules are imported by now."""
    times = [started, time.monotonic()]
    bench = Bench(setup)
    components = bench.components
    synchronize(bench.device)
    times.append(time.monotonic())
    del components
    model = bench.model
    for name in ("components", "language_model"):  # what the model does not use is freed
        bench.__dict__.pop(name, None)
    synchronize(bench.device)
    times.append(time.monotonic())
    metrics = answer(model, bench.question, REQUESTS["speech"]).metrics
    times.append(time.monotonic())
    names = ("import", "load", "warm-up", "first request")
    seconds = {name: times[i + 1] - times[i] for i, name in enumerate(names)}
    for key, value in metrics.items():
        if key.endswith("_seconds") and key not in (*MOMENTS, *LENGTHS):
            seconds[f"- {key.removesuffix('_seconds').replace('_', ' ')}"] = value
    for name in ("first_text", "first_audio"):
        if f"{name}_seconds" in metrics:
            before = times[3] - times[0]
            seconds[f"to {name.replace('_', ' ')}"] = before + metrics[f"{name}_seconds"]
    seconds["total"] = times[-1] - times[0]
    return {"seconds": seconds, "memory": memory(bench.device)}


if __name__ == "__main__":
    print(json.dumps(first_answer(Setup(**json.loads(sys.argv[1])), float(sys.argv[2]))))
