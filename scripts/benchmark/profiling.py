"""Where the host waits for the device between decode steps: a trace and what it shows."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from kimia_infer.models.kimi_audio.language_model import LanguageModel
from scripts.benchmark.bandwidth import BOTH
from scripts.benchmark.decoding import (
    first_timed_step,
    library_decoder,
    library_loop,
    library_models,
)
from scripts.benchmark.timing import synchronize

PROFILED_STEPS = 48
MARK = "decode steps"

HOST_CALLS = ("cuda_runtime", "cuda_driver")
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
# Copies may wait, too; those that only begin are called Async.
WAITS = re.compile("Synchronize|Memcpy")


def profile_decoding(model: LanguageModel, path: Path) -> dict:
    """Write a Chrome trace of steps with both tracks and cut heads; count what waits in them."""
    model = library_models(model)["track"]
    device, skipped = model.device, first_timed_step(model.device)
    steps = skipped + 2 * PROFILED_STEPS  # does not end within the profiled ones
    loop = library_loop(library_decoder(model, steps), BOTH, steps)
    run = loop.run()
    while loop.launched < skipped:
        next(run)
    activities = {ProfilerActivity.CPU}
    if device.type != "cpu":
        activities = supported_activities()
    with profile(activities=activities, acc_events=True) as profiler:
        synchronize(device)
        first, looks = loop.launched, 0
        with record_function(MARK):
            while loop.launched < first + PROFILED_STEPS:
                next(run)
                looks += 1
        done = loop.launched
        synchronize(device)
    run.close()
    profiler.export_chrome_trace(str(path))
    counted = count_events(json.loads(path.read_text())["traceEvents"])
    return {"steps": done - first, "looks": looks, "device": device.type, **counted}


def count_events(events: list[dict]) -> dict:
    """Calls of the host that can wait and copies to the host, by name, within the mark.

    ``busy`` is the share of the time in which the device works on something.
    """
    mark = next(e for e in events if e.get("name") == MARK and e.get("cat") == "user_annotation")
    start, end = mark["ts"], mark["ts"] + mark["dur"]

    def within(categories: tuple[str, ...]) -> Iterator[dict]:
        return (e for e in events if e.get("cat") in categories and start <= e["ts"] < end)

    calls = Counter(e["name"] for e in within(HOST_CALLS) if WAITS.search(e["name"]))
    copies = Counter(e["name"] for e in within(("gpu_memcpy",)) if "DtoH" in e["name"])
    worked = sum(e["dur"] for e in within(DEVICE_WORK))
    return {"calls": dict(calls), "copies_to_host": dict(copies), "busy": worked / mark["dur"]}
