"""Items through the serving path: what ``KimiAudio.generate`` does, with sounds loaded ahead."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch

from kimia_infer.api.events import Completion, Stopwatch
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.limits import Deadline, surviving_out_of_memory
from kimia_infer.api.messages import parse_messages
from kimia_infer.api.request import Options
from kimia_infer.api.response import Request
from kimia_infer.errors import RequestError
from kimia_infer.evaluation.items import Item
from kimia_infer.evaluation.journal import Result
from kimia_infer.evaluation.sounds import Loaded, load_ahead
from kimia_infer.language_model.repetition import RepetitionGuard
from kimia_infer.randomness import SeededRandomness


def answer_items(items: Sequence[Item], model: KimiAudio, options: Options) -> Iterator[Result]:
    """The results of items, in order. One item is answered at a time.

    An item that is refused has an error as its result; other failures are raised. Closing the
    iterator stops the loading of sounds.
    """
    last = time.perf_counter()
    with contextlib.closing(load_ahead(items, options.max_audio_seconds)) as loaded_items:
        for item, loaded in loaded_items:
            started = time.perf_counter()
            outcome = _answer(model, item, loaded, options)
            now = time.perf_counter()
            wall, last = now - last, now
            if isinstance(outcome, RequestError):
                yield Result(item.key, wall, error=str(outcome))
                continue
            yield Result(
                item.key,
                wall,
                outcome.text,
                seconds=loaded.seconds + now - started,
                audio_seconds=outcome.metrics["input_audio_seconds"],
                stop_reason=outcome.metrics["stop_reason"],
                notes=tuple(outcome.notes),
            )


@torch.inference_mode()
def _answer(
    model: KimiAudio, item: Item, loaded: Loaded, options: Options
) -> Completion | RequestError:
    if loaded.error is not None:
        return loaded.error
    try:
        request = Request(
            parse_messages(item.messages),
            loaded.waves,
            options,
            SeededRandomness(options.seed),
            Deadline(options.timeout_seconds),
            Stopwatch(),
            RepetitionGuard() if options.stop_repetition else None,
        )
        *_, completion = surviving_out_of_memory(model.answer(request))
    except RequestError as error:
        return error
    return completion
