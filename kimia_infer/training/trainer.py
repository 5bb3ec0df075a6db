"""The training loop: steps, evaluation, checkpoints; the same for every network.

A network takes a batch and gives a NamedTuple of losses [batch] with a property ``total``,
which is trained. Everything that a step depends on follows from the settings and its number, so
that a run that was interrupted continues as if it had not been.
"""

from __future__ import annotations

import math
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm

from kimia_infer.training.checkpoints import TrainingError, read_facts, restore, save
from kimia_infer.training.config import TrainingSettings, to_dict
from kimia_infer.training.dataset import Batch, Samples, batches
from kimia_infer.training.model_files import trained_parameters
from kimia_infer.training.parallel import clip_gradients, release, total
from kimia_infer.training.plan import StepPlan, learning_rate_factor
from kimia_infer.training.report import RunLog


@dataclass(frozen=True)
class Outcome:
    """Where a run ended: the number of steps done, whether that is all, its last checkpoint."""

    step: int
    complete: bool
    checkpoint: Path | None
    metrics: list[dict]


class Trainer:
    """Trains ``network`` on ``samples``.

    Args:
        settings: of the run.
        state: the processes.
        network: on the device of this process; parameters that require gradients are trained.
        samples: training data; has a length, and gives for a :class:`MicroBatch` a batch that
            has ``weights`` and ``names`` and can be moved.
        held_out: evaluation data of the same kind, or None.
        write_model: writes what is served to a directory, for checkpoints.
        lengths: of ``samples``, if those of similar length are to share a step.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        state: PartialState,
        network: nn.Module,
        samples: Samples,
        held_out: Samples | None,
        write_model: Callable[[Path], None],
        lengths: Sequence[int] | None = None,
    ):
        self.settings, self.state, self.network = settings, state, network
        self.samples, self.held_out, self.write_model = samples, held_out, write_model
        self.output = Path(settings.output)
        self.parameters = trained_parameters(network)
        self.optimizer = make_optimizer(self.parameters, settings)
        self.plan = StepPlan(
            len(samples),
            settings.batch_size,
            settings.accumulation,
            state.num_processes,
            settings.seed,
            lengths=lengths,
        )
        self.steps = settings.max_steps or settings.epochs * self.plan.steps_per_epoch
        self.step = 0
        self._saved: Path | None = None
        self._asked_to_stop = False  # this process, by a signal
        self._stop = False  # all processes, agreed on with the losses of a step

    def resume(self, checkpoint: Path) -> None:
        """Continue from ``checkpoint``. Raises TrainingError if it belongs to another run."""
        before = read_facts(checkpoint)
        for name, value in self._facts().items():
            if name != "settings" and before.get(name) != value:
                raise TrainingError(
                    f"{checkpoint}: {before.get(name)} {name.replace('_', ' ')}, here {value}; use "
                    "the same data, and as many samples per step (batch_size * accumulation * "
                    "processes)"
                )
        self.step = restore(checkpoint, self.parameters, self.optimizer)
        self._saved = checkpoint

    def run(self) -> Outcome:
        """Train to the end, or until SIGINT or SIGTERM asks to stop after the present step.

        Raises:
            TrainingError: a loss or gradient is not finite; the step is not taken.
            DataError: a sample that was usable before training no longer is.
        """
        log = RunLog(self.output, self.step) if self.state.is_main_process else None
        try:
            with self._stopping_on_signals(), self._progress() as progress:
                self._train(log, progress)
        finally:
            if log is not None:
                if log.history:
                    log.plot()
                log.close()
        history = log.history if log is not None else []
        return Outcome(self.step, self.step == self.steps, self._saved, history)

    def _train(self, log: RunLog | None, progress: tqdm) -> None:
        pin = self.state.device.type != "cpu"
        stream = self._batches(self.samples, self.plan, self.step, self.steps, pin)
        self.network.train()
        while self.step < self.steps and not self._stop:
            begun = time.monotonic()
            values = self._one_step(stream)
            values["seconds"] = time.monotonic() - begun
            self.step += 1
            self._report(log, values)
            progress.update()
            progress.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
            last = self.step == self.steps or self._stop
            if self.held_out is not None and self._is_due(self.settings.eval_every, last):
                values = {f"eval_{name}": value for name, value in self.evaluate().items()}
                self._require_finite(values["eval_loss"], "evaluation loss", [])
                self._report(log, values)
            if self._is_due(self.settings.save_every, last):
                self._save()

    def _one_step(self, stream: Iterator[Batch]) -> dict[str, float]:
        """Forward and backward passes of one step and the optimizer's; what is reported of it."""
        settings = self.settings
        rate = settings.learning_rate * learning_rate_factor(
            self.step, self.steps, settings.warmup_ratio
        )
        passes = self.plan.micro_batches(self.step, self.state.process_index)
        names: list[str] = []
        sums = None
        for number in range(len(passes)):
            batch = next(stream)
            names += batch.names
            place = f"{settings.seed} {self.step} {number} {self.state.process_index}"
            torch.manual_seed(zlib.crc32(place.encode()))  # dropout is the only chance
            losses = self.network(batch.to(self.state.device))
            weights = batch.weights.to(self.state.device)
            (losses.total * weights).sum().backward()
            shares = _weighted(losses, weights) / self.state.num_processes
            sums = shares if sums is None else sums + shares
        sums = total(torch.cat([sums, sums.new_tensor([float(self._asked_to_stop)])]), self.state)
        self._stop = bool(sums[-1] > 0)
        values = dict(zip(_names(losses), sums[:-1].tolist(), strict=True))
        self._require_finite(values["loss"], "loss", names)
        norm = clip_gradients(list(self.parameters.values()), settings.max_grad_norm)
        self._require_finite(norm, "norm of the gradients", names)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**values, "learning_rate": rate, "grad_norm": norm}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean losses over the evaluation data."""
        plan = StepPlan(
            len(self.held_out),
            self.settings.batch_size,
            1,
            self.state.num_processes,
            self.settings.seed,
            shuffle=False,
        )
        self.network.eval()
        sums: Tensor | float = 0.0
        stream = self._batches(self.held_out, plan, 0, plan.steps_per_epoch, False)
        for step, batch in enumerate(stream):
            first = step * plan.step_size
            count = min(plan.step_size, len(self.held_out) - first)
            losses = self.network(batch.to(self.state.device))
            weights = batch.weights.to(self.state.device) * count / self.state.num_processes
            sums = sums + _weighted(losses, weights)
        release(self.network)
        self.network.train()
        means = total(sums, self.state) / len(self.held_out)
        return dict(zip(_names(losses), means.tolist(), strict=True))

    def _batches(
        self, samples: Samples, plan: StepPlan, first: int, end: int, pin: bool
    ) -> Iterator[Batch]:
        rank, workers = self.state.process_index, self.settings.workers
        return batches(samples, plan, first, end, rank, workers, pin)

    def _is_due(self, every: int | None, last: bool) -> bool:
        return last or self.step % (every or self.plan.steps_per_epoch) == 0

    def _save(self) -> None:
        self._saved = save(
            self.output,
            self.step,
            self.parameters,
            self.optimizer,
            self._facts(),
            self.write_model,
            self.state,
            self.settings.keep_checkpoints,
        )

    def _facts(self) -> dict:
        """What a checkpoint is noted with; to continue, the numbers have to be the same."""
        return {
            "settings": to_dict(self.settings),
            "samples": len(self.samples),
            "samples_per_step": self.plan.step_size,
        }

    def _report(self, log: RunLog | None, values: dict[str, float]) -> None:
        if log is not None:
            log.add(self.step, values)

    def _require_finite(self, value: float, what: str, names: list[str]) -> None:
        if math.isfinite(value):
            return
        kept = f"the last checkpoint is {self._saved}" if self._saved else "nothing was saved yet"
        shown = f" with the samples {', '.join(names)}" if names else ""
        raise TrainingError(
            f"step {self.step + 1}: the {what} is {value}{shown}; {kept}. Lower learning_rate or "
            "max_grad_norm, or leave out what is at fault"
        )

    def _progress(self) -> tqdm:
        return tqdm(
            desc="Training",
            total=self.steps,
            initial=self.step,
            unit=" steps",
            disable=not self.state.is_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        )

    @contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        """The first signal ends the run after a checkpoint, a second one at once."""

        def ask(number: int, frame: object) -> None:
            self._asked_to_stop = True
            restore_handlers()

        def restore_handlers() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            restore_handlers()


def make_optimizer(
    parameters: dict[str, nn.Parameter], settings: TrainingSettings
) -> torch.optim.AdamW:
    """AdamW that decays matrices and tables, as the published configuration does."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )


def _names(losses: tuple) -> list[str]:
    return ["loss", *(f"{name}_loss" for name in losses._fields)]


def _weighted(losses: tuple, weights: Tensor) -> Tensor:
    """Weighted sums of the total and of every single loss."""
    columns = torch.stack([losses.total, *losses]).detach()
    return (columns * weights).sum(dim=1)
