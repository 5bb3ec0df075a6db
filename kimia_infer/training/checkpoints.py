"""Checkpoints of a run: what is trained and the optimizer's state, written whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kimia_infer.training.parallel import assign, whole
from kimia_infer.training.run_directory import (
    CARD,
    CHECKPOINTS,
    MODEL,
    RECORD_FILE,
    STATE,
    STATE_FILE,
    TrainingError,
    all_checkpoints,
    copy_file,
    read_record,
)
from kimia_infer.utils.files import PARTIAL, replacing_directory
from kimia_infer.weights.header import INDEX_NAME
from kimia_infer.weights.layout import RECORD_NAME
from kimia_infer.weights.manifest import MANIFEST_NAME
from kimia_infer.weights.writing import TensorFile

_MOMENTS = ("exp_avg", "exp_avg_sq")
_NOT_COPIED = (RECORD_NAME, MANIFEST_NAME, CARD)
"""Sizes, checksums and the description of the model that a new one was made from."""


@dataclass(frozen=True)
class LiveTensor:
    """A tensor to write that is gathered from the processes only then; see :class:`NewTensor`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    value: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self, reader: None) -> Iterator[memoryview]:
        value = self.value().to(self.dtype).contiguous()
        yield memoryview(value.reshape(-1).view(torch.uint8).numpy())


def live(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> LiveTensor:
    """``tensor``, which may be divided among processes, under ``name``."""
    return LiveTensor(name, tensor.shape, dtype or tensor.dtype, lambda: whole(tensor))


def write_tensors(path: Path, tensors: Iterable[LiveTensor], writes: bool) -> None:
    """Write a safetensors file, one whole tensor in memory at a time.

    All processes have to call this; the one that ``writes`` does.
    """
    file = TensorFile(list(tensors))
    if writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        file.write(path, None, lambda count: None)
        return
    for tensor in file.tensors:
        tensor.value()


def save(
    output: Path,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    record: dict[str, Any],
    write_model: Callable[[Path], None],
    state: PartialState,
    keep: int,
) -> Path:
    """Write the checkpoint of ``step``, with ``record``, and delete all but the last ``keep``.

    Those of later steps go, too: a run leaves them behind if they are damaged when it is resumed.
    ``write_model`` writes what is served into a directory. All processes have to call this.
    """
    final, writes = output / CHECKPOINTS / f"step-{step:08d}", state.is_main_process
    if writes:
        for rest in final.parent.glob(f".step-*{PARTIAL}"):  # of interrupted attempts
            shutil.rmtree(rest)
    with replacing_directory(final) if writes else nullcontext(final) as folder:
        write_model(folder / MODEL)
        tensors = _state(parameters, optimizer, step)
        write_tensors(folder / STATE / STATE_FILE, tensors, writes)
        if writes:
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
            text = json.dumps({"step": step, **record, "files": sizes}, indent=1)
            (folder / STATE / RECORD_FILE).write_text(text + "\n", encoding="utf-8")
    if writes:
        found = all_checkpoints(output)
        place = found.index(final) + 1
        for old in [*found[: max(0, place - keep)], *found[place:]]:
            # Renamed first, so that an interruption leaves no half of one under its name.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}{PARTIAL}")))
    state.wait_for_everyone()
    return final


def _state(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int
) -> Iterator[LiveTensor]:
    """Parameters and moments; of a parameter without a gradient in every step, its own count.

    One that never had a gradient has no moments.
    """
    for name, parameter in parameters.items():
        yield live(f"parameter.{name}", parameter)
        state = optimizer.state.get(parameter)
        if not state:
            continue
        for moment in _MOMENTS:
            yield live(f"{moment}.{name}", state[moment])
        if state["step"].item() != step:
            yield live(f"step.{name}", state["step"])


def restore(
    checkpoint: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> int:
    """Put parameters and optimizer back where ``checkpoint`` left them; its step.

    Raises:
        TrainingError: the checkpoint is damaged or belongs to other parameters.
    """
    step, path = read_record(checkpoint)["step"], checkpoint / STATE / STATE_FILE
    try:
        with safe_open(path, framework="pt") as stored:
            names = set(stored.keys())
            for name, parameter in parameters.items():
                assign(parameter, stored.get_tensor(f"parameter.{name}"))
                if names.isdisjoint(f"{moment}.{name}" for moment in _MOMENTS):
                    continue  # it never had a gradient
                moments = {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
                for moment, value in moments.items():
                    assign(value, stored.get_tensor(f"{moment}.{name}"))
                own = f"step.{name}"
                count = stored.get_tensor(own) if own in names else torch.tensor(float(step))
                optimizer.state[parameter] = {"step": count, **moments}
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path}: does not fit this run ({error})") from error
    return step


def take_over(source: Path, target: Path, rewritten: Sequence[str]) -> None:
    """Link or copy the files of the checkpoint ``source`` but the weights in ``rewritten``.

    Those are names of folders, "." for the directory itself.
    """
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        weights = path.suffix == ".safetensors" or path.name == INDEX_NAME
        replaced = weights and name.parent.as_posix() in rewritten
        if path.is_file() and not (hidden or replaced or name.as_posix() in _NOT_COPIED):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(path, target / name)
