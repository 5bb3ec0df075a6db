"""The training loop: steps, validation, checkpoints; the same for every network.

A network takes a batch and gives its :data:`Losses`. Everything that a step depends on follows
from the settings and its number, so that a run that was interrupted continues as if it had not
been.
"""

from __future__ import annotations

import math
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from kimia_infer.training.checkpoints import restore, save
from kimia_infer.training.config import TrainingConfig
from kimia_infer.training.dataset import TrainingData, batches
from kimia_infer.training.model_files import trained_parameters
from kimia_infer.training.network import Losses
from kimia_infer.training.parallel import whole
from kimia_infer.training.plan import StepPlan, learning_rate_factor
from kimia_infer.training.report import Metrics, RunLog, card
from kimia_infer.training.run_directory import (
    CARD,
    TrainingError,
    finish,
    read_record,
    write_settings,
)
from kimia_infer.utils.progress import progress


@dataclass(frozen=True)
class TrainingResult:
    """Where a run ended: the number of steps done, whether that is all, its last checkpoint.

    ``metrics`` has an object for every step and validation; only the main process has them.
    """

    step: int
    complete: bool
    checkpoint: Path | None
    metrics: Metrics


class Trainer:
    """Trains ``network`` on ``samples``.

    Args:
        config: settings of the run.
        state: the processes.
        network: on the device of this process; parameters that require gradients are trained.
        write_model: writes what is served to a directory, for checkpoints.
        lengths: of ``samples``, if those of similar length are to share a step.
    """

    def __init__(
        self,
        config: TrainingConfig,
        state: PartialState,
        network: nn.Module,
        samples: TrainingData,
        validation: TrainingData | None,
        write_model: Callable[[Path], None],
        lengths: Sequence[int] | None = None,
    ):
        self.config, self.state, self.network = config, state, network
        self.samples, self.validation, self.write_model = samples, validation, write_model
        self.device = state.device or torch.device("cpu")
        self.output = Path(config.output)
        self.parameters = trained_parameters(network)
        self.optimizer = make_optimizer(self.parameters, config)
        self.plan = StepPlan(
            len(samples),
            config.batch_size,
            config.accumulation,
            state.num_processes,
            config.seed,
            lengths=lengths,
        )
        self.steps = config.max_steps or config.epochs * self.plan.steps_per_epoch
        self.step = 0
        self._log: RunLog | None = None
        self._saved: Path | None = None
        self._stop_requested = False  # of this process, by a signal
        self._stop = False  # of all processes, which exchange it with the losses of a step

    def resume(self, checkpoint: Path) -> None:
        """Continue from ``checkpoint``. Raises TrainingError if it belongs to another run."""
        before = read_record(checkpoint)
        for name, value in self._record().items():
            if name != "settings" and before.get(name) != value:
                raise TrainingError(
                    f"{checkpoint}: {before.get(name)} {name.replace('_', ' ')}, here {value}; use "
                    "the same data, and as many samples per step (batch_size * accumulation * "
                    "processes)"
                )
        self.step = restore(checkpoint, self.parameters, self.optimizer)
        self._saved = checkpoint

    def run(self) -> TrainingResult:
        """Train to the end, or until SIGINT or SIGTERM, which end it after the current step.

        The model of the last step is ``output/final``.

        Raises:
            TrainingError: a loss or gradient is not finite; the step is not taken.
            DataError: a sample that was usable before training no longer is.
        """
        main = self.state.is_main_process
        if main:
            write_settings(self.config)
        with (
            RunLog(self.output, self.step) if main else nullcontext() as self._log,
            self._stopping_on_signals(),
            progress("Training", self.steps, "steps", initial=self.step, disable=not main) as bar,
        ):
            self._train(bar)
        complete = self.step == self.steps
        if complete and main and self._saved is not None:
            finish(self._saved, self.output)
        self.state.wait_for_everyone()
        return TrainingResult(self.step, complete, self._saved, self._metrics)

    def _train(self, bar: tqdm) -> None:
        self.network.train()
        stream = self._batches(self.samples, self.plan, self.step, self.steps)
        while self.step < self.steps and not self._stop:
            begun = time.monotonic()
            values = self._one_step(stream)
            values["seconds"] = time.monotonic() - begun
            self.step += 1
            self._report(values)
            bar.update()
            bar.set_postfix(loss=f"{values['loss']:.3g}", refresh=False)
            last = self.step == self.steps or self._stop
            if self.validation is not None and self._is_due(self.config.eval_every, last):
                losses = self.validate(self.validation)
                self._require_finite(losses["loss"], "validation loss", [])
                self._report({f"eval_{name}": value for name, value in losses.items()})
            if self._is_due(self.config.save_every, last):
                self._save()

    def _one_step(self, stream: Iterator[Any]) -> dict[str, float]:
        """Forward and backward passes of one step, and the optimizer's; its metrics."""
        config, rank = self.config, self.state.process_index
        factor = learning_rate_factor(self.step, self.steps, config.warmup_ratio)
        rate = config.learning_rate * factor
        names: list[str] = []
        sums: Any = 0.0
        losses: Any = None
        for number in range(len(self.plan.micro_batches(self.step, rank))):
            batch = next(stream)
            names += batch.names
            place = f"{config.seed} {self.step} {number} {rank}"
            torch.manual_seed(zlib.crc32(place.encode()))
            losses = self.network(batch.to(self.device))
            weights = batch.weights.to(self.device)
            (sum(losses.values()) * weights).sum().backward()
            sums = sums + _weighted(losses, weights) / self.state.num_processes
        stop = sums.new_tensor([float(self._stop_requested)])
        sums: Any = reduce(torch.cat([sums, stop]), "sum")
        self._stop = bool(sums[-1] > 0)
        values = dict(zip(_names(losses), sums[:-1].tolist(), strict=True))
        self._require_finite(values["loss"], "loss", names)
        limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
        norm = whole(nn.utils.clip_grad_norm_(self.parameters.values(), limit)).item()
        self._require_finite(norm, "norm of the gradients", names)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**values, "learning_rate": rate, "grad_norm": norm}

    @torch.no_grad()
    def validate(self, samples: TrainingData) -> dict[str, float]:
        """Mean losses over ``samples``."""
        config, processes = self.config, self.state.num_processes
        plan = StepPlan(len(samples), config.batch_size, 1, processes, config.seed, shuffle=False)
        self.network.eval()
        sums: Any = 0.0
        losses: Any = None
        for step, batch in enumerate(self._batches(samples, plan, 0, plan.steps_per_epoch)):
            count = min(plan.step_size, len(samples) - step * plan.step_size)
            losses = self.network(batch.to(self.device))
            weights = batch.weights.to(self.device) * count / processes
            sums = sums + _weighted(losses, weights)
        if isinstance(self.network, FSDPModule):
            self.network.reshard()  # which otherwise the backward pass does
        self.network.train()
        means: Any = reduce(sums, "sum") / len(samples)
        return dict(zip(_names(losses), means.tolist(), strict=True))

    def _batches(
        self, samples: TrainingData, plan: StepPlan, first: int, end: int
    ) -> Iterator[Any]:
        pin = self.device.type != "cpu" and self.network.training
        rank, workers = self.state.process_index, self.config.workers
        return batches(samples, plan, first, end, rank, workers, pin)

    def _is_due(self, every: int | None, last: bool) -> bool:
        return last or self.step % (every or self.plan.steps_per_epoch) == 0

    def _save(self) -> None:
        self._saved = save(
            self.output,
            self.step,
            self.parameters,
            self.optimizer,
            self._record(),
            self._write_model,
            self.state,
            self.config.keep_checkpoints,
        )

    def _write_model(self, folder: Path) -> None:
        self.write_model(folder)
        if self.state.is_main_process:
            size = self.plan.step_size
            text = card(self.config, self.step, len(self.samples), size, self._metrics)
            (folder / CARD).write_text(text, encoding="utf-8")

    def _record(self) -> dict[str, Any]:
        """What is written down with a checkpoint; to continue, it has to be the same."""
        return {
            "settings": self.config.model_dump(mode="json"),
            "samples": len(self.samples),
            "samples_per_step": self.plan.step_size,
        }

    @property
    def _metrics(self) -> Metrics:
        return self._log.history if self._log is not None else []

    def _report(self, values: dict[str, float]) -> None:
        if self._log is not None:
            self._log.add(self.step, values)

    def _require_finite(self, value: float, what: str, names: list[str]) -> None:
        if math.isfinite(value):
            return
        kept = f"the last checkpoint is {self._saved}" if self._saved else "nothing was saved yet"
        shown = f" with the samples {', '.join(names)}" if names else ""
        raise TrainingError(
            f"step {self.step + 1}: the {what} is {value}{shown}; {kept}. Lower learning_rate or "
            "max_grad_norm, or leave out these samples"
        )

    @contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        """The first signal ends the run after a checkpoint, a second one at once."""

        def request_stop(number: int, frame: object) -> None:
            self._stop_requested = True
            restore_handlers()

        def restore_handlers() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        before = {n: signal.signal(n, request_stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            restore_handlers()


def make_optimizer(
    parameters: dict[str, nn.Parameter], config: TrainingConfig
) -> torch.optim.AdamW:
    """AdamW that decays matrices and tables, as the published configuration does."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        weight_decay=config.weight_decay,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )


def _names(losses: Losses) -> list[str]:
    return ["loss", *(f"{name}_loss" for name in losses)]


def _weighted(losses: Losses, weights: Tensor) -> Tensor:
    """Weighted sums of the total and of every single loss."""
    total: Any = sum(losses.values())
    return (torch.stack([total, *losses.values()]).detach() * weights).sum(dim=1)
