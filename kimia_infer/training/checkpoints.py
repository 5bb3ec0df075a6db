"""Checkpoints of a run: what is trained and the optimizer's state, written whole.

``checkpoints/step-00000010/`` holds ``model/``, which can be served or applied, and ``state/``,
from which the run continues. It is written under another name, flushed to the disk and then
renamed, so that a directory with the final name is complete.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kimia_infer.models.kimi_audio.layout import INDEX_NAME, RECORD_NAME
from kimia_infer.models.kimi_audio.writing import TensorFile
from kimia_infer.training.parallel import assign, whole
from kimia_infer.weights.manifest import MANIFEST_NAME

FOLDER, MODEL, STATE = "checkpoints", "model", "state"
_NAME = re.compile(r"step-(\d{8})")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_NOT_COPIED = (RECORD_NAME, MANIFEST_NAME)  # they state sizes and checksums
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)


class TrainingError(RuntimeError):
    """A run cannot begin or go on; the message says why and what to do."""


@dataclass(frozen=True)
class LiveTensor:
    """A tensor to be written that is yet to be gathered; as :class:`NewTensor` is written."""

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
    facts: dict,
    write_model: Callable[[Path], None],
    state: PartialState,
    keep: int,
) -> Path:
    """Write the checkpoint of ``step`` and delete all but the last ``keep``.

    ``facts`` are noted with it. ``write_model`` writes what is served into the directory it is
    given.
    """
    final = output / FOLDER / f"step-{step:08d}"
    part = final.with_name(f".{final.name}.part")
    if state.is_main_process:
        for rest in final.parent.glob(".step-*.part"):  # of interrupted attempts
            shutil.rmtree(rest)
        (part / STATE).mkdir(parents=True)
    state.wait_for_everyone()
    write_model(part / MODEL)
    tensors = _state(parameters, optimizer, step)
    write_tensors(part / STATE / "state.safetensors", tensors, state.is_main_process)
    if state.is_main_process:
        text = json.dumps({"step": step, **facts}, indent=1)
        (part / STATE / "state.json").write_text(text + "\n", encoding="utf-8")
        publish(part, final)
        for old in all_checkpoints(output)[:-keep]:
            old.rename(old.with_name(f".{old.name}.part"))  # never half of one by its name
            shutil.rmtree(old.with_name(f".{old.name}.part"))
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


def link_or_copy(path: Path, new: Path) -> None:
    """A copy; of weights a hard link, where the file system allows."""
    if path.suffix in (".safetensors", ".pt"):
        try:
            os.link(path.resolve(), new)
            return
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
    shutil.copyfile(path, new)


def take_over(source: Path, target: Path, rewritten: Sequence[str]) -> None:
    """Link or copy the files of the checkpoint ``source`` but the weights in ``rewritten``.

    Those are names of folders, "." for the directory itself.
    """
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        weights = path.suffix == ".safetensors" or path.name == INDEX_NAME
        replaced = weights and name.parent.as_posix() in rewritten
        if not path.is_file() or hidden or replaced or name.as_posix() in _NOT_COPIED:
            continue
        new = target / name
        new.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(path, new)


def publish(part: Path, final: Path) -> None:
    """Flush what was written as ``part`` to the disk and give it its final name."""
    for path in part.rglob("*"):
        if path.is_file():
            _flush(path)
    if final.exists():  # of an earlier attempt that ended after this step
        shutil.rmtree(final)
    part.rename(final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def all_checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = output / FOLDER
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _NAME.fullmatch(path.name))


def read_facts(checkpoint: Path) -> dict:
    """What was noted with a checkpoint. Raises TrainingError."""
    path = checkpoint / STATE / "state.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: damaged ({error}); delete {checkpoint}") from error


def restore(
    checkpoint: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> int:
    """Put parameters and optimizer back where ``checkpoint`` left them; its step.

    Raises:
        TrainingError: the checkpoint is damaged or belongs to other parameters.
    """
    step = int(_NAME.fullmatch(checkpoint.name)[1])
    path = checkpoint / STATE / "state.safetensors"
    try:
        with safe_open(path, framework="pt") as stored:
            known = set(stored.keys())
            for name, parameter in parameters.items():
                assign(parameter, stored.get_tensor(f"parameter.{name}"))
                if known.isdisjoint(f"{moment}.{name}" for moment in _MOMENTS):
                    continue  # it never had a gradient
                moments = {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
                for moment, value in moments.items():
                    assign(value, stored.get_tensor(f"{moment}.{name}"))
                own = f"step.{name}"
                count = stored.get_tensor(own) if own in known else torch.tensor(float(step))
                optimizer.state[parameter] = {"step": count, **moments}
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path}: does not fit this run ({error})") from error
    return step
