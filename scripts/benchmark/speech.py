"""Speech synthesis and the audio encoders, each alone, and speech beside decode steps."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import CODES_PER_SECOND
from kimia_infer.api.request import Chat
from kimia_infer.audio.files import SAMPLE_RATE
from kimia_infer.layers.operators import use_onednn
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.detokenizer import (
    FIRST_CHUNKS,
    ChunkJob,
    Detokenizer,
    Noise,
    SpeechStream,
)
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from kimia_infer.models.kimi_audio.prompt import Message
from scripts.benchmark.decoding import (
    Contender,
    library_decoder,
    library_loop,
    race,
    with_cut_heads,
)
from scripts.benchmark.measuring import BOTH, medians, synchronize
from scripts.benchmark.plain_detokenizer import PlainDetokenizer
from scripts.benchmark.report import Table

SEED = 0
SPEECH_CODES = 60  # two published chunks
CHUNKS = 5
VOCODER_FRAMES = 120  # about those of a chunk
FRAMES_PER_SECOND = 50


def utterance(detokenizer: Detokenizer, count: int = SPEECH_CODES) -> tuple[Tensor, Noise]:
    """Random codes int64 [count] and the noise to speak them from."""
    randomness, mel_bins = SeededRandomness(SEED), detokenizer.dit.config.mel_bins
    generator = torch.Generator().manual_seed(SEED)
    codes = torch.randint(detokenizer.dit.config.codes, (count,), generator=generator)
    return codes, lambda chunk, frames: randomness.noise(chunk, frames, mel_bins)


def compare_speech(detokenizer: Detokenizer, runs: int) -> Table:
    """Codes to waveform, and the vocoder alone, beside the plain implementation; interleaved."""
    use_onednn(detokenizer.dit)  # as KimiAudio does; the plain one reads parameters only
    device = detokenizer.dit.device
    codes, noise = utterance(detokenizer)
    mel = noise(0, VOCODER_FRAMES).to(device, detokenizer.vocoder.dtype)
    plain = PlainDetokenizer(detokenizer)
    pairs = {
        "detokenizer + vocoder": (
            SPEECH_CODES / CODES_PER_SECOND,
            lambda: plain.synthesize(codes, noise),
            lambda: detokenizer.synthesize(codes, noise),
        ),
        "vocoder alone": (
            VOCODER_FRAMES / FRAMES_PER_SECOND,
            lambda: plain.vocoder(mel),
            lambda: detokenizer.vocoder(mel),
        ),
    }
    rows = []
    for name, (audio_seconds, baseline, ours) in pairs.items():
        with torch.inference_mode():
            expected, found = baseline().float().cpu(), ours().float().cpu()
        plain_seconds, seconds = medians([baseline, ours], runs, device)
        rows.append(
            {
                "what": name,
                "audio s": audio_seconds,
                "plain s": plain_seconds,
                "s": seconds,
                "ratio": plain_seconds / seconds,
                "real-time factor": seconds / audio_seconds,
                "difference": float((found - expected).norm() / expected.norm()),
            }
        )
    note = "Difference: relative, of the waveforms."
    return Table("Speech synthesis against the plain implementation", rows, [note])


def chunk_times(detokenizer: Detokenizer, runs: int) -> Table:
    """Seconds of the first chunks of an utterance in both presets."""
    device, rows = detokenizer.dit.device, []
    for preset, first in FIRST_CHUNKS.items():
        sizes = [*first, *[detokenizer.config.chunk_codes] * (CHUNKS - len(first))]
        codes, noise = utterance(detokenizer, sum(sizes))
        taken: list[list[float]] = [[] for _ in sizes]
        samples = [0] * CHUNKS
        for run in range(runs + 1):
            stream = detokenizer.start(noise)
            for index, chunk in enumerate(codes.split(sizes)):
                synchronize(device)
                start = time.perf_counter()
                with torch.inference_mode(), detokenizer.graphs.stream():
                    wave = stream.push(chunk, final=index == CHUNKS - 1).cpu()
                if run > 0:
                    taken[index].append(time.perf_counter() - start)
                samples[index] = len(wave)
        for index, size in enumerate(sizes):
            seconds = samples[index] / detokenizer.sample_rate
            row = {"preset": preset, "chunk": index + 1, "codes": size}
            rows.append(
                row | {"ms": 1e3 * statistics.median(taken[index]), "audio released, s": seconds}
            )
    return Table("Chunks of speech, median", rows)


def chunks_together(detokenizer: Detokenizer, runs: int) -> Table:
    """Chunks of several streams in one batch beside one after another; interleaved."""
    device, rows = detokenizer.dit.device, []
    codes, noise = utterance(detokenizer)
    first, usual = FIRST_CHUNKS["low_latency"][0], detokenizer.config.chunk_codes

    def jobs(streams: Sequence[SpeechStream], size: int) -> list[ChunkJob]:
        return [ChunkJob(stream, codes[:size], final=False) for stream in streams]

    def starting(count: int) -> tuple[Callable[[], object], Callable[[], object]]:
        def streams() -> list[SpeechStream]:
            return [detokenizer.start(noise) for _ in range(count)]

        return (
            lambda: [stream.push(codes[:first], False) for stream in streams()],
            lambda: detokenizer.push_together(jobs(streams(), first)),
        )

    def going_on(count: int) -> tuple[Callable[[], object], Callable[[], object]]:
        ours, others = ([detokenizer.start(noise) for _ in range(count)] for _ in range(2))
        return (
            lambda: [stream.push(codes[:usual], False) for stream in others],
            lambda: detokenizer.push_together(jobs(ours, usual)),
        )

    for count in range(2, detokenizer.batch_limit + 1, 2):
        for size, pair in ((first, starting(count)), (usual, going_on(count))):
            with torch.inference_mode(), detokenizer.graphs.stream():
                alone, together = medians(list(pair), runs, device)
            row = {"chunks": count, "codes": size, "one by one, ms": 1e3 * alone}
            rows.append(row | {"together, ms": 1e3 * together, "ratio": alone / together})
    return Table("Chunks of several streams", rows)


def measure_encoders(model: KimiAudio, wave: np.ndarray, runs: int) -> Table:
    """Both encoders alone and as a request runs them, on a wave [samples] at 16 kHz."""
    chat = Chat([Message("user", "audio", audio=b"")], {0: wave}, [[]], "text")
    actions = {
        "speech codes": lambda: model.speech_codes.encode(wave),
        "Whisper": lambda: model.whisper_features.encode(wave),
        "both, as in a request": lambda: model.encoder.encode([chat]),
    }
    length = len(wave) / SAMPLE_RATE
    seconds = medians(list(actions.values()), runs, model.device)
    rows = [
        {"encoder": n, "audio s": length, "ms": 1e3 * taken, "real-time factor": taken / length}
        for n, taken in zip(actions, seconds, strict=True)
    ]
    return Table("Audio encoders", rows)


def decode_while_speaking(
    model: LanguageModel, detokenizer: Detokenizer, steps: int, runs: int
) -> Table:
    """Both tracks with cut heads, alone and while a thread synthesizes speech without a pause.

    In an answer speech takes only part of the time, so this is the worst case.
    """
    model = with_cut_heads(model)
    decoder = library_decoder(model, steps)

    alone, beside = (
        Contender(name, BOTH, "track", model, lambda: library_loop(decoder, BOTH, steps))
        for name in ("alone", "while speaking")
    )
    factors = []
    for _ in range(runs):
        race([alone], 1)
        with speaking(detokenizer) as real_time_factor:
            race([beside], 1)
        factors.append(real_time_factor())
    rows = [
        {"decode steps": c.name, "steps/s": 1 / c.median, "ms/step": 1e3 * c.median}
        for c in (alone, beside)
    ]
    note = f"Real-time factor of the speech: {statistics.median(factors):.3f}"
    return Table("Decode steps while speech is synthesized", rows, [note])


@contextmanager
def speaking(detokenizer: Detokenizer) -> Iterator[Callable[[], float]]:
    """Synthesize speech in a thread within; gives a function for its real-time factor."""
    codes, noise = utterance(detokenizer)

    @torch.inference_mode()
    def repeat() -> float:
        start, times = time.perf_counter(), 0
        while times == 0 or not stop.is_set():
            detokenizer.synthesize(codes, noise)
            times += 1
        return (time.perf_counter() - start) / (times * SPEECH_CODES / CODES_PER_SECOND)

    with torch.inference_mode():
        detokenizer.synthesize(codes, noise)  # records graphs
    stop = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(repeat)
        try:
            yield future.result
        finally:
            stop.set()
