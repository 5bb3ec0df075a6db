"""Items through the serving path: what ``KimiAudio.generate`` does, with sounds loaded ahead."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch

from kimia_infer.api.events import Completion
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.limits import surviving_out_of_memory
from kimia_infer.api.parameters import Parameters
from kimia_infer.evaluation.batching import Answer, Together, request_of
from kimia_infer.evaluation.items import Item
from kimia_infer.evaluation.journal import Result
from kimia_infer.evaluation.sounds import Loaded, load_ahead
from kimia_infer.utils.errors import RequestError


def answer_items(
    items: Sequence[Item], model: KimiAudio, options: Parameters, batch_size: int
) -> Iterator[Result]:
    """The results of items as they come: in order where ``batch_size`` is 1.

    An item that is refused has an error as its result; other failures are raised. Closing the
    iterator stops the loading of sounds.
    """
    last = time.perf_counter()
    with contextlib.closing(load_ahead(items, options.max_audio_seconds)) as loaded:
        if batch_size == 1:
            answers = _one_by_one(loaded, model, options)
        else:
            answers = Together(model, options, batch_size).answers(loaded)
        for answer in answers:
            now = time.perf_counter()
            wall, last = now - last, now
            yield _result(answer, wall, batch_size)


def _one_by_one(
    loaded_items: Iterator[tuple[Item, Loaded]], model: KimiAudio, options: Parameters
) -> Iterator[Answer]:
    for item, loaded in loaded_items:
        started = time.perf_counter()
        outcome = _answer(model, item, loaded, options)
        yield Answer(item, loaded.seconds + time.perf_counter() - started, outcome)


@torch.inference_mode()
def _answer(
    model: KimiAudio, item: Item, loaded: Loaded, options: Parameters
) -> Completion | RequestError:
    try:
        request = request_of(item, loaded, options)
        *_, completion = surviving_out_of_memory(model.answer(request))
    except RequestError as error:
        return error
    return completion


def _result(answer: Answer, wall_seconds: float, batch_size: int) -> Result:
    key, outcome = answer.item.key, answer.outcome
    if isinstance(outcome, RequestError):
        return Result(key, wall_seconds, error=str(outcome), batch_size=batch_size)
    return Result(
        key,
        wall_seconds,
        outcome.text,
        seconds=answer.seconds,
        audio_seconds=outcome.metrics["input_audio_seconds"],
        stop_reason=outcome.metrics["stop_reason"],
        notes=tuple(outcome.notes),
        batch_size=batch_size,
    )
