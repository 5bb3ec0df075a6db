"""What a run reports: a line per step, TensorBoard, and a plot of the losses."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

METRICS, PLOT, BOARD = "metrics.jsonl", "loss.png", "tensorboard"


class RunLog:
    """Writes the metrics of a run to ``output``; what came after step ``first`` is dropped.

    ``metrics.jsonl`` has one object per step (and one per evaluation) with its ``step``.
    """

    def __init__(self, output: Path, first: int):
        self.output = output
        self.history = [line for line in read_metrics(output) if line["step"] <= first]
        path = output / METRICS
        part = path.with_name(path.name + ".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in self.history))
        part.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(output / BOARD), purge_step=first + 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        line = {"step": step, **values}
        self.history.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def plot(self) -> None:
        """Write ``loss.png``."""
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        for name, style in (("loss", "-"), ("eval_loss", "o-")):
            points = [(line["step"], line[name]) for line in self.history if name in line]
            points = [point for point in points if math.isfinite(point[1])]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
        axes.set(xlabel="step", ylabel="loss")
        axes.legend()
        axes.grid(alpha=0.3)
        part = self.output / f"{PLOT}.part"
        figure.savefig(part, dpi=120, format="png")
        pyplot.close(figure)
        part.replace(self.output / PLOT)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(output: Path) -> list[dict]:
    """The metrics of a run so far; a line that an interruption cut short is left out."""
    path = output / METRICS
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split(os.linesep)
    return [json.loads(line) for line in lines[:-1]]  # after the last newline nothing is whole
