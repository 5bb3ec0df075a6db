"""The process of one variant: loads it, then answers, decodes and compares as it is asked.

Asked with a JSON object a line on stdin, it answers with one a line on stdout.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.loading import load_components
from kimia_infer.models.kimi_audio.detokenizer import WaveOverlap
from kimia_infer.models.kimi_audio.flow import MelStream
from kimia_infer.models.kimi_audio.speech_tokenizer import SpeechCodes
from kimia_infer.models.kimi_audio.whisper import WhisperFeatures
from kimia_infer.utils.errors import CheckpointError, RequestError
from scripts.benchmark.bandwidth import BOTH, memory
from scripts.benchmark.decoding import Contender, library_decoder, library_loop
from scripts.benchmark.quality import Reference, compare, refer
from scripts.benchmark.random_models import random_components
from scripts.benchmark.requests import REQUESTS, answer, usual_question
from scripts.benchmark.sizes import SIZES

PARTS = {
    "speech_codes": (SpeechCodes, "encode"),
    "whisper": (WhisperFeatures, "encode"),
    "detokenizer": (MelStream, "push"),
    "vocoder": (WaveOverlap, "push"),
}
"""Components within those that a request times itself, and the methods in which they happen."""

CLEAR_REFS = Path("/proc/self/clear_refs")
"""Where Linux forgets the peak of resident memory, written "5"."""


class Parts:
    """Seconds of each of PARTS, until the device has done what its stream was given."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, Counter()
        for stage, (owner, name) in PARTS.items():
            setattr(owner, name, self._timed(stage, getattr(owner, name)))

    def _timed(self, stage: str, method: Callable) -> Callable:
        def timed(*arguments, **options):
            self._wait()
            start = time.perf_counter()
            result = method(*arguments, **options)
            self._wait()
            self.seconds[stage] += time.perf_counter() - start
            return result

        return timed

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.current_stream(self.device).synchronize()


class Variant:
    """A loaded model and what can be asked of it."""

    def __init__(self, given: dict):
        self.given, device = given, torch.device(given["device"])
        torch.set_num_threads(given["threads"])
        dtype, scheme, kv_cache = getattr(torch, given["dtype"]), given["scheme"], given["kv_cache"]
        start = time.perf_counter()
        if given["directory"] is None:
            components = random_components(SIZES[given["size"]], device, dtype, scheme)
        else:
            directory = Path(given["directory"])
            components = load_components(directory, True, device, dtype, kv_cache=kv_cache)
        self.model = KimiAudio.from_components(components, head_rows="track", kv_cache=kv_cache)
        seconds = time.perf_counter() - start
        modules = (
            self.model.language_model,
            components.speech_tokenizer.module,
            components.whisper.encoder,
            components.detokenizer.dit,
            components.detokenizer.vocoder,
        )
        self.loaded = {
            # Random weights are made, which takes another time.
            "load_seconds": None if given["directory"] is None else seconds,
            "weights_bytes": sum(p.nbytes for module in modules for p in module.parameters()),
        }
        self.audio = usual_question() if given["audio"] is None else Path(given["audio"])
        self.parts = Parts(device)
        del components, modules  # what the model does not use, as the uncut head, is freed
        forget_peak(device)

    def warm_up(self) -> dict:
        """One of every request; ``peak_memory`` is theirs, None where it cannot be known."""
        for options in REQUESTS.values():
            answer(self.model, self.audio, options)
        return {"peak_memory": peak_memory(self.model.device)}

    def answer(self, request: str) -> dict:
        self.parts.seconds.clear()
        metrics = answer(self.model, self.audio, REQUESTS[request]).metrics
        spent = {f"{stage}_seconds": seconds for stage, seconds in self.parts.seconds.items()}
        kept = {k: v for k, v in metrics.items() if k not in ("encoders_seconds", "seed")}
        return kept | spent

    def decode(self) -> dict:
        """Both tracks, without anything else, in a decoder of its own."""
        steps, model = self.given["steps"], self.model.language_model
        decoder = library_decoder(model, steps, self.given["kv_cache"])
        contender = Contender("", BOTH, "track", model, lambda: library_loop(decoder, BOTH, steps))
        contender.begin()
        contender.take_turn(None)
        return {"step_seconds": statistics.median(contender.seconds)}

    def refer(self, path: str) -> dict:
        torch.save(vars(refer(self.model, self.audio)), path)
        return {}

    def compare(self, path: str) -> dict:
        return compare(self.model, self.audio, Reference(**torch.load(path)))


def forget_peak(device: torch.device) -> None:
    """What loading took is not counted."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Bytes since :func:`forget_peak`; None on a CPU where only loading could be seen."""
    if device.type != "cpu":
        return memory(device)["peak_reserved"]
    return memory(device)["peak_resident"] if CLEAR_REFS.exists() else None


def main() -> None:
    # Whatever else is printed goes to stderr.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def reply(value: dict) -> None:
        print(json.dumps(value), file=replies, flush=True)

    try:
        variant = Variant(json.loads(sys.argv[1]))
        reply(variant.loaded)
        for line in sys.stdin:
            asked = json.loads(line)
            reply(getattr(variant, asked.pop("what"))(**asked))
    except (RequestError, CheckpointError, torch.OutOfMemoryError) as error:
        reply({"error": str(error).splitlines()[0]})


if __name__ == "__main__":
    main()
