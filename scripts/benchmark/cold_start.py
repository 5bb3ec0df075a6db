"""The time that a fresh process needs to load the model and answer once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict

from scripts.benchmark.report import Table
from scripts.benchmark.runner import ROOT, Setup


def cold_start(setup: Setup) -> Table:
    """Seconds from the start of a process to the end of its first spoken answer.

    Files of a checkpoint may still be in the operating system's cache. RuntimeError if the
    process fails.
    """
    command = [sys.executable, "-m", "scripts.benchmark.cold_start"]
    command += [json.dumps(asdict(setup)), str(time.monotonic())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        raise RuntimeError(f"cold start failed: {(done.stderr.splitlines() or ['?'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    loaded = "files may be cached" if setup.weights else "load: random weights are made"
    used = ", ".join(f"{name} {value:.2f}" for name, value in found["memory"].items())
    return Table(
        f"Cold start: a fresh process to the end of its first spoken answer ({loaded})",
        [{"": name, "s": seconds} for name, seconds in found["seconds"].items()],
        [f"Memory: {used}."],
    )


def first_answer(setup: Setup, started: float) -> dict[str, dict[str, float]]:
    """Seconds and memory of this process, which the parent started at ``started``."""
    from scripts.benchmark.bench import Bench
    from scripts.benchmark.measuring import memory, synchronize
    from scripts.benchmark.requests import REQUESTS, answer, is_stage

    times = [started, time.monotonic()]
    bench = Bench(setup)
    bench.components  # noqa: B018
    synchronize(bench.device)
    times.append(time.monotonic())
    model = bench.model
    for name in ("components", "language_model"):  # what the model does not use is freed
        bench.__dict__.pop(name, None)
    synchronize(bench.device)
    times.append(time.monotonic())
    metrics = answer(model, bench.question, REQUESTS["speech"]).metrics
    times.append(time.monotonic())
    names = ("import", "load", "warm-up", "first request")
    seconds = {name: times[i + 1] - times[i] for i, name in enumerate(names)}
    for key in filter(is_stage, metrics):
        seconds[f"- {key.removesuffix('_seconds').replace('_', ' ')}"] = metrics[key]
    for name in ("first_text", "first_audio"):
        if f"{name}_seconds" in metrics:
            seconds[f"to {name.replace('_', ' ')}"] = (
                times[3] - times[0] + metrics[f"{name}_seconds"]
            )
    seconds["total"] = times[-1] - times[0]
    return {"seconds": seconds, "memory": memory(bench.device)}


if __name__ == "__main__":
    print(json.dumps(first_answer(Setup(**json.loads(sys.argv[1])), float(sys.argv[2]))))
