"""A model on a CPU from a packed checkpoint: decode steps, answers in text and speech, memory."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kimia_infer.api.events import AudioChunk, Completion, TextDelta
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.audio.files import SAMPLE_RATE, load_audio
from kimia_infer.weights.resolve import cache_directory
from scripts.benchmark.bench import Bench
from scripts.benchmark.decoding import contenders, race
from scripts.benchmark.measuring import MODES, medians, memory, step_bytes
from scripts.benchmark.random_checkpoint import write_random_checkpoint
from scripts.benchmark.report import Cell, Table
from scripts.benchmark.requests import least_lead, spoken_chat

MOST_STEPS = 64
LONG_SECONDS = 30
SPEAKER = "kokoro:af_heart"
TEXT_TOKENS = 40
"""Of an answer that Kokoro speaks: three sentences of random words, some 15 s."""
SPEECH_TOKENS = 20
"""Steps of an answer in Kimi's own speech, a second of it; a chunk takes a CPU long."""
SAMPLED = {
    name: value
    for track in ("text", "audio")
    for name, value in ((f"{track}_temperature", 1.0), (f"{track}_top_k", 0))
} | {"seed": 0}
"""Greedy answers of random weights repeat one token, which cannot be spoken."""
READS = 10


def checkpoint(bench: Bench) -> Path:
    """The checkpoint that was named, or one of random weights in the cache, written once."""
    if bench.setup.weights is not None:
        return bench.directory
    scheme = bench.setup.quantization or "int4"
    target = cache_directory() / f"random-published-{scheme}"
    write_random_checkpoint(target, scheme)
    return target


def read_bandwidth() -> float:
    """Bytes per second of the best of several sums of a large tensor, on all threads."""
    values = torch.ones(2**28, dtype=torch.float32)
    best = float("inf")
    for _ in range(READS + 1):
        start = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - start)
    return values.nbytes / best


def laptop(bench: Bench) -> list[Table]:
    """Steps in every mode, then answers in text, and spoken by Kokoro, without a detokenizer."""
    directory, dtype = checkpoint(bench), bench.setup.dtype
    start = time.perf_counter()
    kokoro = os.environ.get("KIMI_AUDIO_KOKORO", "auto")
    model = KimiAudio(
        str(directory), load_detokenizer=False, device="cpu", dtype=dtype, kokoro=kokoro, slots=1
    )
    loading, bench.dtype = time.perf_counter() - start, model.dtype
    rows = [{"what": "loaded", "seconds": loading, **memory(model.device)}]
    spoken = _answer(model, bench.question)
    rows.append({"what": "answered in text and Kokoro's voice", **memory(model.device)})
    return [
        Table("A question of 5 s, answered in text that Kokoro speaks: seconds", spoken),
        _encoders(model, bench),
        Table("Memory of the process: text, with Kokoro's voice", rows),
        _steps(model, bench),
    ]


def laptop_speech(bench: Bench) -> list[Table]:
    """A short answer in Kimi's own speech."""
    model = KimiAudio(str(checkpoint(bench)), device="cpu", dtype=bench.setup.dtype, slots=1)
    bench.dtype = model.dtype
    rows = [{"what": "loaded", **memory(model.device)}]
    options = {"max_new_tokens": SPEECH_TOKENS, "preset": "low_latency", **SAMPLED}
    *_, completion = model.stream(spoken_chat(bench.question), "both", **options)
    assert isinstance(completion, Completion)
    if completion.wav is None:
        raise RuntimeError(f"no speech: {completion.audio_reason}")
    rows.append({"what": "answered in speech", **memory(model.device)})
    return [
        Table(f"{SPEECH_TOKENS} steps of both tracks, spoken: seconds", _stages(completion)),
        Table("Memory of the process: text and speech", rows),
    ]


def _steps(model: KimiAudio, bench: Bench) -> Table:
    steps, network = min(bench.steps, MOST_STEPS), model.language_model
    entered = contenders(network.quantization, network, "track", steps)
    bandwidth = read_bandwidth()
    race(entered, bench.runs)
    bandwidth = max(bandwidth, read_bandwidth())
    rows: list[dict[str, Cell]] = []
    for contender in entered:
        size, seconds = step_bytes(network, contender.mode, 160), contender.median
        rows.append(
            {
                "mode": contender.mode,
                "steps/s": 1 / seconds,
                "ms/step": 1e3 * seconds,
                "MB/step": size / 1e6,
                "GB/s": size / seconds / 1e9,
                "% of reading": 100 * size / seconds / bandwidth,
            }
        )
    assert len(rows) == len(MODES)
    note = f"A plain sum reads {bandwidth / 1e9:.1f} GB/s here."
    return Table(f"Decode steps: {steps} steps, {bench.runs} runs, medians", rows, [note])


def _encoders(model: KimiAudio, bench: Bench) -> Table:
    wave = load_audio(bench.question)
    rows: list[dict[str, Cell]] = []
    for seconds in (round(len(wave) / SAMPLE_RATE), LONG_SECONDS):
        cut = np.resize(wave, seconds * SAMPLE_RATE)
        encoders = model.speech_codes.encode, model.whisper_features.encode
        taken = medians([partial(encode, cut) for encode in encoders], 1, model.device)
        rows.append({"audio s": seconds, "speech codes, s": taken[0], "Whisper, s": taken[1]})
    return Table("Encoders on a recording", rows)


def _answer(model: KimiAudio, question: Path | bytes) -> list[dict[str, Cell]]:
    """Stages of an answer in Kokoro's voice, and whether a listener would wait.

    Raises RuntimeError if nothing of it can be spoken.
    """
    start, first_text, arrivals, event = time.perf_counter(), None, [], None
    rate = 0
    options = {"speaker": SPEAKER, "max_new_tokens": TEXT_TOKENS, **SAMPLED}
    for event in model.stream(spoken_chat(question), "both", **options):
        now = time.perf_counter()
        if isinstance(event, TextDelta) and first_text is None:
            first_text = now - start
        if isinstance(event, AudioChunk):
            arrivals.append((now, len(event.wav)))
            rate = event.sample_rate
    assert isinstance(event, Completion)
    if not arrivals:
        raise RuntimeError(f"{event.audio_reason or 'no speech'}: {event.text[:80]!r}")
    rows: list[dict[str, Cell]] = [
        {"stage": "first text", "s": first_text},
        {"stage": "first sound", "s": arrivals[0][0] - start},
        {"stage": "sound in all", "s": sum(n for _, n in arrivals) / rate},
    ]
    if len(arrivals) > 1:
        rows.append({"stage": "least lead (below 0: a pause)", "s": least_lead(arrivals, rate)})
    return [*_stages(event), *rows]


def _stages(completion: Completion) -> list[dict[str, Cell]]:
    return [
        {"stage": name.removesuffix("_seconds"), "s": value}
        for name, value in completion.metrics.items()
        if name.endswith("_seconds") and isinstance(value, float)
    ]
