"""Rows of a batch on a cluster: Ray Data gives them to workers, each of which has a model."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset

from kimia_infer.api.parameters import MAX_SLOTS
from kimia_infer.api.request import Deadline
from kimia_infer.cluster.batch import Numbered
from kimia_infer.cluster.work import Work, Worker

log = logging.getLogger(__name__)

BLOCK_ROWS = 8
"""Rows that a worker gets together, and that are done again if it dies."""

DIED = "the worker that had this row died or failed {} times; its log says why"

PASSES = ((BLOCK_ROWS, MAX_SLOTS), (1, 1))
"""Rows of a block, and blocks that a worker has at a time: at first, and for the rows of blocks
that have failed, of which one may be the cause."""


class BlockWorker:
    """What a worker of Ray Data runs, in as many threads as the model has slots."""

    def __init__(self, work: Work):
        self._worker = Worker(work)

    def __call__(self, block: dict[str, Any]) -> dict[str, list[Any]]:
        items = [pickle.loads(content) for content in block["item"]]
        try:
            rows = [self._worker.finish(number, row, Deadline(None)) for number, row in items]
        except Exception:
            if self._worker.broken:
                log.exception("This worker ends, and another one begins")
                os._exit(1)
            raise
        return {
            "number": [number for number, _ in items],
            "row": [pickle.dumps(row) for row in rows],
        }


@dataclass(frozen=True)
class RayRunner:
    """Finishes rows with up to ``workers`` models, each on ``cpus`` cores and ``gpus`` GPUs.

    Ray must have been started. A row of which no worker comes back is finished with an error.
    """

    workers: int
    cpus: float
    gpus: float

    def __call__(self, work: Work, rows: Sequence[Numbered]) -> Iterator[dict[str, Any]]:
        context = DataContext.get_current()
        context.max_errored_blocks = -1  # their rows are tried again here
        context.enable_progress_bars = False
        left = dict(rows)
        for size, at_once in PASSES:
            dataset = self._dataset(work, left, size, 1 if work.task == "codes" else at_once)
            for batch in dataset.iter_batches(batch_size=None):
                for number, content in zip(batch["number"], batch["row"], strict=True):
                    if left.pop(int(number), None) is not None:
                        yield pickle.loads(content)
            if not left:
                return
        for row in left.values():
            yield row.finished(None, DIED.format(len(PASSES)))

    def _dataset(self, work: Work, rows: dict[int, Any], size: int, at_once: int) -> Dataset:
        items = [{"item": pickle.dumps(item)} for item in rows.items()]
        return ray.data.from_items(items, override_num_blocks=-(-len(items) // size)).map_batches(
            BlockWorker,
            fn_constructor_args=(work,),
            batch_size=None,
            compute=ActorPoolStrategy(
                min_size=1,
                max_size=self.workers,
                # Those that wait at a worker are lost with it, too.
                max_tasks_in_flight_per_actor=at_once if size == 1 else None,
                max_concurrent_calls_per_actor=at_once,
                enable_true_multi_threading=True,
            ),
            max_task_retries=0,  # Ray would try a row that ends its worker for ever
            num_cpus=self.cpus,
            num_gpus=self.gpus,
        )
