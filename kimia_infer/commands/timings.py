"""The metrics of an answer for people: where its time went, in the order of the stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STAGES = {
    "input": ("load_audio_seconds", "voice_seconds", "prompt_seconds"),
    "encoders": ("encoders_seconds",),
    "prefill": ("prefill_seconds",),
    "decode": ("decode_seconds",),
    "speech": ("detokenizer_seconds",),
    "total": ("total_seconds",),
}
"""Stages of a request, and the metrics that they consist of."""


def summarize(metrics: Mapping[str, Any]) -> list[str]:
    """Two lines: the seconds of each stage, and how soon and how fast the answer came.

    The real-time factor is the time that an answer took per second of its speech, or per second
    of the recording that was transcribed. Without metrics there are no lines.
    """
    stages = [
        f"{stage} {sum(metrics[name] for name in names if name in metrics):.2f}"
        for stage, names in STAGES.items()
        if any(name in metrics for name in names)
    ]
    if "total_seconds" not in metrics:
        return []
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
