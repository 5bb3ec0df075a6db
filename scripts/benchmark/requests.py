"""Whole requests by stage: a spoken question, answered in text or speech."""

from __future__ import annotations

import io
import statistics
import time
import wave as riff
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from kimia_infer.api.events import AudioChunk, Completion, Event, TextDelta
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import CODES_PER_SECOND
from kimia_infer.audio.files import SAMPLE_RATE
from scripts.benchmark.report import Table

QUESTION = Path(__file__).resolve().parents[1] / "question.wav"
QUESTION_SECONDS = 5
REPLY_SECONDS = 10
"""Most seconds of an answer."""

REQUESTS = {
    "text": {"output_type": "text"},
    "speech": {"output_type": "both"},
    "speech, low latency": {"output_type": "both", "preset": "low_latency"},
}
# As in the published example.
SAMPLING = {"audio_temperature": 0.8, "audio_top_k": 10, "seed": 0}

Audio = Path | bytes


def default_question() -> bytes:
    """scripts/question.wav, repeated for QUESTION_SECONDS, as 16-bit mono wav at 16 kHz."""
    with riff.open(str(QUESTION), "rb") as reader:
        pcm = np.frombuffer(reader.readframes(reader.getnframes()), "<i2")
        rate = reader.getframerate()
    times = np.arange(QUESTION_SECONDS * SAMPLE_RATE) / SAMPLE_RATE
    # Linear interpolation: how it sounds does not matter to the clock.
    samples = np.interp(times, np.arange(len(pcm)) / rate, pcm, period=len(pcm) / rate)
    file = io.BytesIO()
    with riff.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE)
        writer.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


METRICS = (
    *("first_text_seconds", "first_audio_seconds", "total_seconds"),
    *("input_audio_seconds", "output_audio_seconds", "least_lead_seconds"),
    *("prompt_tokens", "decode_steps", "text_tokens", "speech_codes"),
    *("steps/s", "real-time factor", "peak memory, GB"),
)
"""What is shown of a request besides the seconds of its stages."""


def is_stage(metric: str) -> bool:
    return metric.endswith("_seconds") and metric not in METRICS


def measure_first(model: KimiAudio, audio: Audio, runs: int) -> Table:
    """Time to the first text and the first speech of warm requests, which are then stopped."""
    rows = []
    for name, options in REQUESTS.items():
        wanted = [TextDelta] if options["output_type"] == "text" else [TextDelta, AudioChunk]
        found = [first_moments(model, audio, options, wanted) for _ in range(runs + 1)][1:]
        row: dict[str, str | float | None] = {"request": name}
        for kind, column in ((TextDelta, "first text, ms"), (AudioChunk, "first speech, ms")):
            seconds = [moments[kind] for moments in found if kind in moments]
            row[column] = 1e3 * statistics.median(seconds) if seconds else None
        rows.append(row)
    return Table(f"First text and first speech: medians of {runs} warm requests", rows)


def first_moments(
    model: KimiAudio, audio: Audio, options: dict, wanted: Sequence[type]
) -> dict[type, float]:
    """Seconds until the first event of each type in ``wanted``."""
    found: dict[type, float] = {}
    start = time.perf_counter()
    with closing(ask(model, audio, options)) as events:
        for event in events:
            if type(event) in wanted:
                found.setdefault(type(event), time.perf_counter() - start)
            if len(found) == len(wanted):
                break
    return found


def measure_requests(model: KimiAudio, audio: Audio, runs: int) -> Table:
    """Every kind of request, warm: median seconds by stage, lengths and counts."""
    columns = {}
    for name, options in REQUESTS.items():
        if model.device.type != "cpu":
            torch.accelerator.empty_cache()
            torch.accelerator.reset_peak_memory_stats(model.device)
        metrics = median_metrics([answer(model, audio, options) for _ in range(runs + 1)][1:])
        if metrics["decode_steps"] > 1:  # the first step belongs to the prefill
            metrics["steps/s"] = (metrics["decode_steps"] - 1) / metrics["decode_seconds"]
        if "output_audio_seconds" in metrics:
            length = metrics["output_audio_seconds"]
            metrics["real-time factor"] = metrics["total_seconds"] / length
        if model.device.type != "cpu":
            metrics["peak memory, GB"] = torch.accelerator.max_memory_reserved(model.device) / 1e9
        columns[name] = metrics
    return Table(
        f"Whole requests by stage: medians of {runs}, in seconds", request_rows(columns),
        ["least lead: seconds that the latest chunk was early; below 0 is a gap in the speech"],
    )  # fmt: skip


def request_rows(columns: dict[str, dict]) -> list[dict]:
    """A row for each stage and metric, a column for each request."""
    names = list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    return [
        {
            "": name.removesuffix("_seconds").replace("_", " "),
            **{column: metrics.get(name) for column, metrics in columns.items()},
        }
        for name in (*filter(is_stage, names), *(name for name in METRICS if name in names))
    ]


def median_metrics(answers: Sequence[Completion]) -> dict:
    """The metrics of the first answer, with medians in place of all seconds."""
    metrics = [answer.metrics for answer in answers]
    timed = [key for key in metrics[0] if key.endswith("_seconds")]
    return metrics[0] | {key: statistics.median(m[key] for m in metrics) for key in timed}


def spoken_chat(audio: Audio) -> list[dict]:
    content = audio if isinstance(audio, bytes) else str(audio)
    return [{"role": "user", "message_type": "audio", "content": content}]


def ask(model: KimiAudio, audio: Audio, options: dict) -> Generator[Event]:
    """The events of the answer to one spoken question."""
    steps = model.language_model.config.audio_delay + round(REPLY_SECONDS * CODES_PER_SECOND)
    return model.stream(spoken_chat(audio), max_new_tokens=steps, **options, **SAMPLING)


def answer(model: KimiAudio, audio: Audio, options: dict) -> Completion:
    """The completion of one spoken question.

    To the metrics of an answer of several chunks it adds ``least_lead_seconds``.
    """
    arrivals, event = [], None
    for event in ask(model, audio, options):
        if isinstance(event, AudioChunk):
            arrivals.append((time.perf_counter(), len(event.wav)))
    assert isinstance(event, Completion)
    if len(arrivals) > 1:
        assert model.detokenizer is not None
        event.metrics["least_lead_seconds"] = least_lead(arrivals, model.detokenizer.sample_rate)
    return event


def least_lead(arrivals: Sequence[tuple[float, int]], sample_rate: int) -> float:
    """Seconds that the latest chunk was early for a listener who plays the first one at once.

    ``arrivals`` are the moments and samples of the chunks. Below 0 there is a gap.
    """
    start, samples = arrivals[0]
    leads = []
    for moment, added in arrivals[1:]:
        leads.append(start + samples / sample_rate - moment)
        samples += added
    return min(leads)
