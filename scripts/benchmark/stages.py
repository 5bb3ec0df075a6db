"""Speech synthesis, whole requests by stage, and a start from nothing.

Run as a module, it is that start: a process that loads the model, answers once and prints
its timings as JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kimia_infer.api.events import Completion
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.detokenizer.stream import Detokenizer
from kimia_infer.randomness import SeededRandomness
from scripts.benchmark.bandwidth import memory, synchronize
from scripts.benchmark.plain_detokenizer import PlainVocoder, synthesize

ROOT = Path(__file__).resolve().parents[2]
SEED = 0
SPEECH_CODES = 60  # two published chunks
CODES_PER_SECOND = 12.5
VOCODER_FRAMES = 120  # about what a chunk brings
FRAMES_PER_SECOND = 50

REQUESTS = {
    "text": {"output_type": "text"},
    "speech": {"output_type": "both"},
    "speech, low latency": {"output_type": "both", "preset": "low_latency"},
}
# As the published example asks.
SAMPLING = {"audio_temperature": 0.8, "audio_top_k": 10, "seed": SEED}


class ColdStartError(RuntimeError):
    """The process that was to start from nothing failed; the message is its own."""


def compare_speech(detokenizer: Detokenizer, runs: int) -> list[dict]:
    """Codes to wave, and the vocoder alone, beside the plain implementation; interleaved."""
    device, mel_bins = detokenizer.dit.device, detokenizer.dit.config.mel_bins
    randomness = SeededRandomness(SEED)

    def noise(chunk: int, frames: int) -> Tensor:
        return randomness.noise(chunk, frames, mel_bins)

    generator = torch.Generator().manual_seed(SEED)
    codes = torch.randint(detokenizer.dit.config.codes, (SPEECH_CODES,), generator=generator)
    mel = noise(0, VOCODER_FRAMES).to(device, detokenizer.vocoder.dtype)
    plain_vocoder = PlainVocoder(detokenizer.vocoder)
    pairs = {
        "detokenizer + vocoder": (
            SPEECH_CODES / CODES_PER_SECOND,
            lambda: synthesize(detokenizer, codes, noise),
            lambda: detokenizer.synthesize(codes.to(device), noise),
        ),
        "vocoder alone": (
            VOCODER_FRAMES / FRAMES_PER_SECOND,
            lambda: plain_vocoder(mel),
            lambda: detokenizer.vocoder(mel),
        ),
    }
    rows = []
    for name, (audio_seconds, plain, ours) in tqdm(pairs.items(), desc="Speech", disable=None):
        plain_seconds, seconds = _medians([plain, ours], runs, device)
        rows.append(
            {
                "name": name,
                "audio_seconds": audio_seconds,
                "plain_seconds": plain_seconds,
                "seconds": seconds,
                "ratio_to_plain": plain_seconds / seconds,
                "real_time_factor": seconds / audio_seconds,
            }
        )
    return rows


@torch.inference_mode()
def _medians(actions: list[Callable[[], object]], runs: int, device: torch.device) -> list[float]:
    """Median seconds of each action over interleaved runs, after one that does not count."""
    seconds: list[list[float]] = [[] for _ in actions]
    for run in range(runs + 1):
        for action, values in zip(actions, seconds, strict=True):
            synchronize(device)
            start = time.perf_counter()
            action()
            synchronize(device)
            if run > 0:
                values.append(time.perf_counter() - start)
    return [statistics.median(values) for values in seconds]


def measure_requests(model: KimiAudio, audio: Path, runs: int) -> list[dict]:
    """Every kind of request, warm: medians of the seconds per stage."""
    rows = []
    for name, options in tqdm(REQUESTS.items(), desc="Requests", disable=None):
        answers = [answer(model, audio, options).metrics for _ in range(runs + 1)][1:]
        timed = [key for key in answers[0] if key.endswith("_seconds")]
        metrics = answers[0] | {key: statistics.median(a[key] for a in answers) for key in timed}
        rows.append({"name": name, "metrics": metrics, **_speeds(metrics)})
    return rows


def _speeds(metrics: dict) -> dict:
    speeds = {}
    if metrics["decode_steps"] > 1:
        # The first step belongs to the prefill.
        speeds["steps_per_second"] = (metrics["decode_steps"] - 1) / metrics["decode_seconds"]
    if "output_audio_seconds" in metrics:
        speeds["real_time_factor"] = metrics["total_seconds"] / metrics["output_audio_seconds"]
    return speeds


def answer(model: KimiAudio, audio: Path, options: dict) -> Completion:
    """The completion of one spoken question."""
    chat = [{"role": "user", "message_type": "audio", "content": str(audio)}]
    *_, completion = model.stream(chat, **options, **SAMPLING)
    return completion


def cold_start(
    directory: Path, audio: Path, device: torch.device, dtype: torch.dtype, threads: int
) -> dict:
    """Seconds from the start of a fresh process to its first answer, by stage.

    The files may still be in the operating system's cache.
    """
    arguments = {
        "directory": str(directory.resolve()),
        "audio": str(audio.resolve()),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "started": time.monotonic(),
    }
    command = [sys.executable, "-m", "scripts.benchmark.stages", json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise ColdStartError(f"cold start failed: {(done.stderr.splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _first_answer(arguments: dict) -> dict:
    """What :func:`cold_start` measures, seen from the inside; all modules are imported by now."""
    imported = time.monotonic()
    torch.set_num_threads(arguments["threads"])
    model = KimiAudio(
        arguments["directory"],
        device=arguments["device"],
        dtype=arguments["dtype"],
        head_rows="track",
    )
    synchronize(model.device)
    loaded = time.monotonic()
    metrics = answer(model, Path(arguments["audio"]), REQUESTS["speech"]).metrics
    answered = time.monotonic()
    started = arguments["started"]
    return {
        "import_seconds": imported - started,
        "load_seconds": loaded - imported,
        "first_request_seconds": answered - loaded,
        "total_seconds": answered - started,
        "first_request_metrics": metrics,
        "memory": memory(model.device),
    }


if __name__ == "__main__":
    print(json.dumps(_first_answer(json.loads(sys.argv[1]))))
