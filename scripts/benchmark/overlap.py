"""Decode steps while speech is synthesized beside them, as in a streamed answer."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from kimia_infer.api.parameters import CODES_PER_SECOND
from kimia_infer.models.kimi_audio.detokenizer import Detokenizer
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from scripts.benchmark.bandwidth import BOTH
from scripts.benchmark.decoding import Contender, library_decoder, library_loop, library_models
from scripts.benchmark.speech import SPEECH_CODES, utterance


def decode_while_speaking(
    model: LanguageModel, detokenizer: Detokenizer, steps: int, runs: int
) -> dict:
    """Both tracks with cut heads, undisturbed and while a thread speaks without a pause.

    In an answer it speaks a part of the time only, so that this is the slowest it gets.
    """
    model = library_models(model)["track"]
    decoder = library_decoder(model, steps)

    def contender(name: str) -> Contender:
        return Contender(name, BOTH, "track", model, lambda: library_loop(decoder, BOTH, steps))

    quiet, disturbed = contender("alone"), contender("while speaking")
    spoken = []
    for _ in range(runs):
        quiet.begin()
        quiet.take_turn(None)
        with speaking(detokenizer) as real_time_factor:
            disturbed.begin()
            disturbed.take_turn(None)
        spoken.append(real_time_factor())
    seconds = {c.name: statistics.median(c.seconds) for c in (quiet, disturbed)}
    return {
        "modes": [
            {"name": name, "step_seconds": value, "steps_per_second": 1 / value}
            for name, value in seconds.items()
        ],
        "real_time_factor": statistics.median(spoken),
    }


@contextmanager
def speaking(detokenizer: Detokenizer) -> Iterator[Callable[[], float]]:
    """A thread speaks within; afterwards, seconds that it took for a second of sound."""
    codes, noise = utterance(detokenizer)

    def speak() -> None:
        with torch.inference_mode():
            detokenizer.synthesize(codes, noise)

    def speak_on() -> float:
        start, times = time.perf_counter(), 0
        while times == 0 or not stop.is_set():
            speak()
            times += 1
        return (time.perf_counter() - start) / (times * SPEECH_CODES / CODES_PER_SECOND)

    speak()  # records what is not yet recorded
    stop = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(speak_on)
        try:
            yield future.result
        finally:
            stop.set()
