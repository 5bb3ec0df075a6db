"""Whole requests by stage: a spoken question, answered in text or speech."""

from __future__ import annotations

import io
import statistics
import time
import wave as riff
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from kimia_infer.api.events import AudioChunk, Completion
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import CODES_PER_SECOND
from kimia_infer.audio.decode import SAMPLE_RATE
from scripts.benchmark.bandwidth import memory

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
    """scripts/question.wav, repeated for QUESTION_SECONDS, in the one format read everywhere."""
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


def measure_requests(model: KimiAudio, audio: Audio, runs: int) -> list[dict]:
    """Every kind of request, warm: medians of the seconds per stage, and the peak of memory."""
    rows = []
    for name, options in tqdm(REQUESTS.items(), desc="Requests", disable=None):
        if model.device.type != "cpu":
            torch.accelerator.empty_cache()  # what other measurements left behind
            torch.accelerator.reset_peak_memory_stats(model.device)
        answers = [answer(model, audio, options).metrics for _ in range(runs + 1)][1:]
        timed = [key for key in answers[0] if key.endswith("_seconds")]
        metrics = answers[0] | {key: statistics.median(a[key] for a in answers) for key in timed}
        # That of a CPU cannot be reset; the cold start shows it.
        peak = memory(model.device).get("peak_reserved")
        rows.append({"name": name, "metrics": metrics, "peak_memory": peak, **_speeds(metrics)})
    return rows


def _speeds(metrics: dict) -> dict:
    speeds = {}
    if metrics["decode_steps"] > 1:
        # The first step belongs to the prefill.
        speeds["steps_per_second"] = (metrics["decode_steps"] - 1) / metrics["decode_seconds"]
    if "output_audio_seconds" in metrics:
        speeds["real_time_factor"] = metrics["total_seconds"] / metrics["output_audio_seconds"]
    return speeds


def answer(model: KimiAudio, audio: Audio, options: dict) -> Completion:
    """The completion of one spoken question; it arrives as a stream.

    To the metrics of an answer of several chunks it adds ``least_lead_seconds``.
    """
    content = audio if isinstance(audio, bytes) else str(audio)
    chat = [{"role": "user", "message_type": "audio", "content": content}]
    steps = model.language_model.config.audio_delay + round(REPLY_SECONDS * CODES_PER_SECOND)
    arrivals = []
    for event in model.stream(chat, max_new_tokens=steps, **options, **SAMPLING):
        if isinstance(event, AudioChunk):
            arrivals.append((time.perf_counter(), len(event.wav)))
    if len(arrivals) > 1:
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
