"""What a run reports: metrics of every step, TensorBoard, a plot of the losses, and a card."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from kimia_infer.training.run_directory import BOARD, METRICS, PLOT, USE, read_metrics
from kimia_infer.utils.files import Journal, replacing, write_json_lines

Metrics = list[dict[str, float]]


class RunLog:
    """Writes the metrics of a run to ``output``; use it as a context manager.

    ``metrics.jsonl`` has one object per step, and one per validation, with its ``step``. Lines
    after step ``first``, of a run that was interrupted, are dropped.
    """

    def __init__(self, output: Path, first: int):
        self.output, self.first = output, first
        self.history = [line for line in read_metrics(output) if line["step"] <= first]
        self._stack = ExitStack()

    def __enter__(self) -> RunLog:
        write_json_lines(self.output / METRICS, self.history)
        self._journal = self._stack.enter_context(Journal(self.output / METRICS))
        board = SummaryWriter(str(self.output / BOARD), purge_step=self.first + 1)
        self._board = self._stack.enter_context(board)
        self._stack.callback(self._plot)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, step: int, values: dict[str, float]) -> None:
        line = {"step": step, **values}
        self.history.append(line)
        self._journal.add(line)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def _plot(self) -> None:
        if not self.history:
            return
        from matplotlib.figure import Figure  # without pyplot, which needs a display

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, style in (("loss", "-"), ("eval_loss", "o-")):
            lines = [line for line in self.history if math.isfinite(line.get(name, math.nan))]
            points = [(line["step"], line[name]) for line in lines]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
        axes.set(xlabel="step", ylabel="loss")
        axes.legend()
        axes.grid(alpha=0.3)
        with replacing(self.output / PLOT) as partial:
            figure.savefig(partial, dpi=120, format="png")


def last_losses(metrics: Metrics) -> str:
    """The last loss and validation loss, such as ``loss 0.0123, eval_loss 5e-06``."""
    last = {name: value for line in metrics for name, value in line.items()}
    names = [name for name in ("loss", "eval_loss") if name in last]
    return ", ".join(f"{name} {last[name]:.3g}" for name in names)


def card(config: Any, step: int, samples: int, per_step: int, metrics: Metrics) -> str:
    """Markdown that says what a model was made from and how, and how to serve it."""
    rows = config.summary() | {
        "training data": f"{config.data or 'made up'}, {samples} samples",
        "steps": f"{step}, of {per_step} samples each",
        "learning rate": f"{config.learning_rate:g}, largest of a cosine schedule",
        "last losses": last_losses(metrics) or "-",
        "run": config.output,
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    title = f"# {Path(config.output).name}: {config.title}\n\n"
    return f"{title}| | |\n|---|---|\n{table}{USE}\n{config.usage()}\n"
