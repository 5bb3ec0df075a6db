"""What a trace of decode steps shows: only what lies within the mark, by name."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from scripts.benchmark.profiling import (
    MARK,
    PROFILED_STEPS,
    count_events,
    profile_decoding,
    profile_table,
)
from scripts.benchmark.random_models import random_language_model
from scripts.benchmark.sizes import SIZES


def event(name: str, category: str, start: float, duration: float = 1.0) -> dict:
    return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": duration}


TO_HOST = "Memcpy DtoH (Device -> Pinned)"
EVENTS = [
    {"ph": "M", "name": "process_name"},
    event(MARK, "gpu_user_annotation", 0, 1000),
    event(MARK, "user_annotation", 100, 100),
    event("cudaDeviceSynchronize", "cuda_runtime", 99),  # before
    event("cudaEventSynchronize", "cuda_runtime", 110),
    event("cudaEventSynchronize", "cuda_runtime", 150),
    event("cudaMemcpyAsync", "cuda_runtime", 120),
    event("cudaGraphLaunch", "cuda_runtime", 130),
    event("cuStreamSynchronize", "cuda_driver", 140),
    event("aten::copy_", "cpu_op", 145),
    event(TO_HOST, "gpu_memcpy", 160, 2.0),
    event("Memcpy DtoD (Device -> Device)", "gpu_memcpy", 165, 3.0),
    event("gemm", "kernel", 170, 20.0),
    event("cudaStreamSynchronize", "cuda_runtime", 200),  # after
    event(TO_HOST, "gpu_memcpy", 201),
]


def test_calls_and_copies_within_the_mark_are_counted() -> None:
    assert count_events(EVENTS) == {
        "calls": {"cudaEventSynchronize": 2, "cudaMemcpyAsync": 1, "cuStreamSynchronize": 1},
        "copies": {TO_HOST: 1},
        "busy": 0.25,
        "kernels": {"gemm": (1, 20.0), "Memcpy DtoD (Device -> Device)": (1, 3.0), TO_HOST: (1, 2)},
    }


def test_table_names_every_call() -> None:
    table = profile_table("Profile", count_events(EVENTS)).markdown()
    for words in ("2 cudaEventSynchronize", f"1 {TO_HOST}", "25.0%", "gemm"):
        assert words in table


def test_profile_of_a_cpu(tmp_path: Path) -> None:
    model = random_language_model(SIZES["tiny"], torch.device("cpu"), torch.float32)
    path = tmp_path / "trace.json"
    table = profile_decoding(model, path)
    assert f"{PROFILED_STEPS} decode steps, both tracks, {PROFILED_STEPS} polls" in table.title
    names = {entry.get("name") for entry in json.loads(path.read_text())["traceEvents"]}
    assert {MARK, "aten::linear"} <= names
    assert "no device to wait for" in table.markdown()
