"""A trace of decode steps: where the host waits for the device, and the slowest kernels."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from kimia_infer.models.kimi_audio.language_model import LanguageModel
from scripts.benchmark.decoding import (
    first_timed_step,
    library_decoder,
    library_loop,
    with_cut_heads,
)
from scripts.benchmark.measuring import BOTH, synchronize
from scripts.benchmark.report import Table

PROFILED_STEPS = 48
MARK = "decode steps"
KERNELS, KERNEL_NAME = 12, 60
"""Number of listed kernels, and the most characters of their names."""

HOST_CALLS = ("cuda_runtime", "cuda_driver")
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
# Copies may wait, too; those that only begin are called Async.
WAITS = re.compile("Synchronize|Memcpy")


def profile_decoding(model: LanguageModel, path: Path) -> Table:
    """Write a Chrome trace of steps with both tracks and cut heads; count what waits in them."""
    model = with_cut_heads(model)
    device, skipped = model.device, first_timed_step(model.device)
    steps = skipped + 2 * PROFILED_STEPS  # does not end within the profiled ones
    loop = library_loop(library_decoder(model, steps), BOTH, steps)
    run = loop.run()
    while loop.launched < skipped:
        next(run)
    activities = {ProfilerActivity.CPU} if device.type == "cpu" else supported_activities()
    with profile(activities=activities, acc_events=True) as profiler:
        synchronize(device)
        first, polls = loop.launched, 0
        with record_function(MARK):
            while loop.launched < first + PROFILED_STEPS:
                next(run)
                polls += 1
        done = loop.launched - first
        synchronize(device)
    run.close()
    profiler.export_chrome_trace(str(path))
    title = f"Profile of {done} decode steps, both tracks, {polls} polls"
    if device.type == "cpu":
        return Table(title, [], ["On the CPU there is no device to wait for."])
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return profile_table(title, count_events(json.load(file)["traceEvents"]))


def profile_table(title: str, counted: dict) -> Table:
    """The longest kernels; how often the host can wait; how busy the device is."""
    notes = [
        f"{what}: {', '.join(f'{n} {name}' for name, n in counted[key].items()) or 'none'}"
        for what, key in (("Calls that can wait", "calls"), ("Copies to the host", "copies"))
    ]
    rows = [
        {"kernel": name[:KERNEL_NAME], "times": times, "ms": microseconds / 1e3}
        for name, (times, microseconds) in counted["kernels"].items()
    ]
    return Table(title, rows, [*notes, f"Device busy: {counted['busy']:.1%} of the time"])


def count_events(events: list[dict]) -> dict:
    """Calls of the host that can wait and copies to the host, by name, within the mark.

    ``busy`` is the share of the time in which the device works on something; ``kernels`` are
    those that take most of it, with their number and microseconds.
    """
    mark = next(e for e in events if e.get("name") == MARK and e.get("cat") == "user_annotation")
    start, end = mark["ts"], mark["ts"] + mark["dur"]

    def within(categories: tuple[str, ...]) -> Iterator[dict]:
        return (e for e in events if e.get("cat") in categories and start <= e["ts"] < end)

    calls = Counter(e["name"] for e in within(HOST_CALLS) if WAITS.search(e["name"]))
    copies = Counter(e["name"] for e in within(("gpu_memcpy",)) if "DtoH" in e["name"])
    times, taken = Counter(), Counter()
    for event in within(DEVICE_WORK):
        times[event["name"]] += 1
        taken[event["name"]] += event["dur"]
    kernels = {name: (times[name], spent) for name, spent in taken.most_common(KERNELS)}
    busy = taken.total() / mark["dur"]
    return {"calls": dict(calls), "copies": dict(copies), "busy": busy, "kernels": kernels}
