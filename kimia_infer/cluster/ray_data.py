"""Rows of a batch on a cluster: Ray Data gives them to workers, each of which has a model."""

from __future__ import annotations

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

BLOCK_ROWS = 8
"""Rows that a worker gets together, and that are done again if it dies."""

DIED = "the worker that had this row died or failed {} times; its log says why"

PASSES = (BLOCK_ROWS, 1)
"""Rows of a block at first, and of those whose block has failed: one row may be the cause."""


class BlockWorker:
    """What a worker of Ray Data runs, in as many threads as the model has slots."""

    def __init__(self, work: Work):
        self._worker = Worker(work)

    def __call__(self, block: dict[str, Any]) -> dict[str, list[Any]]:
        items = [pickle.loads(content) for content in block["item"]]
        rows = [self._worker.finish(number, row, Deadline(None)) for number, row in items]
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
        for size in PASSES:
            for batch in self._dataset(work, left, size).iter_batches(batch_size=None):
                for number, content in zip(batch["number"], batch["row"], strict=True):
                    if left.pop(int(number), None) is not None:
                        yield pickle.loads(content)
            if not left:
                return
        for row in left.values():
            yield row.finished(None, DIED.format(len(PASSES)))

    def _dataset(self, work: Work, rows: dict[int, Any], size: int) -> Dataset:
        items = [{"item": pickle.dumps(item)} for item in rows.items()]
        threads = 1 if work.task == "codes" else MAX_SLOTS
        return ray.data.from_items(items, override_num_blocks=-(-len(items) // size)).map_batches(
            BlockWorker,
            fn_constructor_args=(work,),
            batch_size=None,
            compute=ActorPoolStrategy(
                min_size=1,
                max_size=self.workers,
                max_concurrent_calls_per_actor=threads,
                enable_true_multi_threading=True,
            ),
            num_cpus=self.cpus,
            num_gpus=self.gpus,
        )
