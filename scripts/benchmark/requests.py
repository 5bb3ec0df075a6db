"""Whole requests by stage: a spoken question, answered in text or speech."""

from __future__ import annotations

import io
import statistics
import time
import wave as riff
from collections.abc import Generator, Sequence
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
REPLY_SECONDS = 10  # at most

REQUESTS = {
    "text": {"output_type": "text"},
    "speech": {"output_type": "both"},
    "speech, low latency": {"output_type": "both", "preset": "low_latency"},
}
# As the published example asks.
SAMPLING = {"audio_temperature": 0.8, "audio_top_k": 10, "seed": 0}

Audio = Path | bytes


def usual_question() -> bytes:
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


LENGTHS = ("input_audio_seconds", "output_audio_seconds", "least_lead_seconds")
MOMENTS = ("first_text_seconds", "first_audio_seconds", "total_seconds")
"""Metrics of a request that are not seconds of a stage."""
COUNTS = ("prompt_tokens", "decode_steps", "text_tokens", "speech_codes")


def measure_first(model: KimiAudio, audio: Audio, runs: int) -> Table:
    """Seconds to the first text and the first sound of warm requests, which are then stopped."""
    rows = []
    for name, options in REQUESTS.items():
        found: dict[str, list[float]] = {"text": [], "sound": []}
        for run in range(runs + 1):
            moments = first_moments(model, audio, options)
            for what, moment in moments.items() if run > 0 else ():
                found[what].append(moment)
        first = {
            f"first {what}, ms": 1e3 * statistics.median(moments) if moments else None
            for what, moments in found.items()
        }
        rows.append({"request": name, **first})
    return Table(f"First text and first sound: medians of {runs} warm requests", rows)


def first_moments(model: KimiAudio, audio: Audio, options: dict) -> dict[str, float]:
    """Seconds until the first text and, if it is asked for, the first sound of an answer."""
    wanted = {"text"} if options["output_type"] == "text" else {"text", "sound"}
    kinds: dict[type, str] = {TextDelta: "text", AudioChunk: "sound"}
    found: dict[str, float] = {}
    start = time.perf_counter()
    events = ask(model, audio, options)
    for event in events:
        if kind := kinds.get(type(event)):
            found.setdefault(kind, time.perf_counter() - start)
        if found.keys() == wanted:
            break
    events.close()
    return found


def measure_requests(model: KimiAudio, audio: Audio, runs: int) -> Table:
    """Every kind of request, warm: median seconds by stage, lengths and counts."""
    columns = {}
    for name, options in REQUESTS.items():
        if model.device.type != "cpu":
            torch.accelerator.empty_cache()  # what other measurements left behind
            torch.accelerator.reset_peak_memory_stats(model.device)
        metrics = median_metrics([answer(model, audio, options) for _ in range(runs + 1)][1:])
        if metrics["decode_steps"] > 1:  # the first step belongs to the prefill
            metrics["steps/s"] = (metrics["decode_steps"] - 1) / metrics["decode_seconds"]
        if "output_audio_seconds" in metrics:
            factor = metrics["total_seconds"] / metrics["output_audio_seconds"]
            metrics["real-time factor"] = factor
        if model.device.type != "cpu":
            peak = torch.accelerator.max_memory_reserved(model.device)
            metrics["peak memory, GB"] = peak / 1e9
        columns[name] = metrics
    return Table(
        f"Whole requests by stage: medians of {runs}, in seconds", request_rows(columns),
        ["least lead: how long before its turn the latest chunk was ready; below 0 is a gap"],
    )  # fmt: skip


def request_rows(columns: dict[str, dict]) -> list[dict]:
    """A row for each stage, moment, length and count, a column for each request."""
    names = list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    others = (*MOMENTS, *LENGTHS, *COUNTS, "steps/s", "real-time factor", "peak memory, GB")
    stages = [name for name in names if name.endswith("_seconds") and name not in others]
    return [
        {
            "": name.removesuffix("_seconds").replace("_", " "),
            **{column: metrics.get(name) for column, metrics in columns.items()},
        }
        for name in (*stages, *(name for name in others if name in names))
    ]


def median_metrics(answers: Sequence[Completion]) -> dict:
    """The metrics of the first answer, with medians in place of all seconds."""
    metrics = [answer.metrics for answer in answers]
    timed = [key for key in metrics[0] if key.endswith("_seconds")]
    return metrics[0] | {key: statistics.median(m[key] for m in metrics) for key in timed}


def ask(model: KimiAudio, audio: Audio, options: dict) -> Generator[Event]:
    """The events of the answer to one spoken question."""
    content = audio if isinstance(audio, bytes) else str(audio)
    chat = [{"role": "user", "message_type": "audio", "content": content}]
    steps = model.language_model.config.audio_delay + round(REPLY_SECONDS * CODES_PER_SECOND)
    return model.stream(chat, max_new_tokens=steps, **options, **SAMPLING)


def answer(model: KimiAudio, audio: Audio, options: dict) -> Completion:
    """The completion of one spoken question.

    To the metrics of an answer of several chunks it adds ``least_lead_seconds``.
    """
    arrivals = []
    event = None
    for event in ask(model, audio, options):
        if isinstance(event, AudioChunk):
            arrivals.append((time.perf_counter(), len(event.wav)))
    assert isinstance(event, Completion)
    if len(arrivals) > 1:
        assert model.detokenizer is not None
        rate = model.detokenizer.sample_rate
        event.metrics["least_lead_seconds"] = least_lead(arrivals, rate)
    return event


def least_lead(arrivals: Sequence[tuple[float, int]], sample_rate: int) -> float:
    """By how many seconds the latest chunk was ready before its turn, in an answer played at once.

    ``arrivals`` are the moments and samples of the chunks. Below 0, a listener hears a gap.
    """
    start, samples = arrivals[0]
    leads = []
    for moment, added in arrivals[1:]:
        leads.append(start + samples / sample_rate - moment)
        samples += added
    return min(leads)
