"""The predictors with counted steps, and faults on demand.

A server runs in a directory of its own, in which the file ``state`` makes the health check fail,
the file ``slow`` makes steps slow, and the file ``steps`` holds the number of passes through the
language model's first layer. A seed below 10 makes an answer fail after so many events.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import predict

FAULTY_SEEDS = range(10)
STEP_SECONDS = 0.01


class Scripted:
    def setup(self, weights: Any = None) -> None:
        super().setup(weights)
        self.steps = 0
        self.model.language_model.layers[0].register_forward_hook(self.count)
        self.respond_well = self.model.respond
        self.model.respond = self.respond_badly

    def healthcheck(self) -> bool:
        if Path("state").exists():
            raise RuntimeError(Path("state").read_text())
        return super().healthcheck()

    def count(self, *arguments: Any) -> None:
        if Path("slow").exists():
            time.sleep(STEP_SECONDS)
        self.steps += 1
        Path("steps.part").write_text(str(self.steps))
        Path("steps.part").replace("steps")

    def respond_badly(self, chat: list[dict], parameters: Any, **rest: Any) -> Iterator[Any]:
        with contextlib.closing(self.respond_well(chat, parameters, **rest)) as events:
            for count, event in enumerate(events):
                if parameters.seed in FAULTY_SEEDS and count == parameters.seed:
                    raise RuntimeError("the device caught fire")
                yield event


class Plain(Scripted, predict.Predictor):
    pass


class Streaming(Scripted, predict.StreamingPredictor):
    pass
