"""The metrics of an answer in two lines, in the order of the stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STAGES = {
    "input": ("load_audio", "voice", "prompt"),
    "encoders": ("encoders",),
    "prefill": ("prefill",),
    "decode": ("decode",),
    "speech": ("detokenizer",),
    "total": ("total",),
}
"""Stages of a request, and the metrics whose sum they are."""


def summarize(metrics: Mapping[str, Any]) -> list[str]:
    """The seconds of each stage; latency and speed. Nothing without metrics.

    The real-time factor is the total time per second of speech, or of the transcribed recording.
    """
    if "total_seconds" not in metrics:
        return []
    stages = []
    for stage, names in STAGES.items():
        if seconds := [metrics[f"{n}_seconds"] for n in names if f"{n}_seconds" in metrics]:
            stages.append(f"{stage} {sum(seconds):.2f}")
    facts = [
        f"first {kind} after {metrics[name]:.2f} s"
        for kind, name in (("text", "first_text_seconds"), ("speech", "first_audio_seconds"))
        if metrics.get(name) is not None
    ]
    for kind, name in (("speech", "output_audio_seconds"), ("audio", "input_audio_seconds")):
        if length := metrics.get(name):
            factor = metrics["total_seconds"] / length
            facts.append(f"{length:.2f} s of {kind}, real-time factor {factor:.2f}")
            break
    return [f"seconds: {', '.join(stages)}", ", ".join(facts)]
