"""A training run of one component of the codec: settings to a finished folder."""

from __future__ import annotations

import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Generic, cast

import torch
import yaml
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kimia_infer.training.network import Losses, recompute_activations
from kimia_infer.training.run_directory import (
    MODEL,
    STATE,
    TrainingError,
    checkpoint_to_resume,
)
from kimia_infer.training.tasks.config import CodecTrainingConfig
from kimia_infer.training.tasks.recordings import (
    Example,
    Examples,
    Recording,
    Recordings,
    read_samples,
)
from kimia_infer.training.trainer import Trainer, TrainingResult
from kimia_infer.weights.component import Component, Module

Data = tuple[Recordings, Recordings | None]
"""For training and for validation."""

KEPT = "kept.safetensors"
"""In a checkpoint's state: tensors that training changes but the optimizer does not."""


class CodecNetwork(nn.Module, ABC):
    """A component of the codec with its losses.

    ``progress`` is the share of the steps done. Random numbers come from :meth:`generator` alone.
    """

    progress = 0.0

    @abstractmethod
    def forward(self, batch: Examples) -> Losses:
        """The weighted losses; zeros where a weight is 0."""

    @abstractmethod
    def blocks(self) -> Iterator[nn.Module]:
        """The layers whose activations can be computed again."""

    def kept(self) -> dict[str, Tensor]:
        """What :meth:`after_step` changes, for checkpoints; filled in place to continue."""
        return {}

    def same_run(self) -> dict[str, Tensor]:
        """What has to be the same to continue from a checkpoint."""
        return {}

    def after_step(self) -> None:
        """Called after every step of the optimizer."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write what is served below ``folder``, in the published layout."""

    def generator(self, batch: Examples) -> torch.Generator | None:
        """Generator of random numbers on the CPU; every validation gets the same ones."""
        if self.training:
            return None  # the default generator, which the trainer seeds for every pass
        return torch.Generator().manual_seed(zlib.crc32(batch.names[0].encode()))


class AveragedNetwork(CodecNetwork, Generic[Module]):
    """Trains ``module``; the running mean of its parameters is validated and written.

    The mean, which is less noisy, moves faster at first, so that first values are forgotten.
    """

    def __init__(self, module: Module, decay: float):
        super().__init__()

        def move(means: Any, values: Any, count: Tensor | int) -> None:
            faster = (1 + int(count)) / (10 + int(count))
            get_ema_multi_avg_fn(min(decay, faster))(means, values, count)

        self.trained = module
        self.average = AveragedModel(module, multi_avg_fn=move).requires_grad_(False)
        self.average.n_averaged.fill_(1)  # 0 would replace the first values by the second ones

    @property
    def module(self) -> Module:
        """What is trained; outside training, its mean."""
        return self.trained if self.training else cast(Module, self.average.module)

    def means(self) -> dict[str, Tensor]:
        return dict(self.average.module.named_parameters())

    def kept(self) -> dict[str, Tensor]:
        means = {f"average.{name}": mean for name, mean in self.means().items()}
        return {"updates": self.average.n_averaged, **means}

    def after_step(self) -> None:
        self.average.update_parameters(self.trained)


def train_component(
    settings: CodecTrainingConfig,
    resume: bool,
    name: str,
    read: Callable[[Recording], Example],
    build: Callable[[Data, Path | None, torch.device], CodecNetwork],
    needs_text: bool = False,
) -> TrainingResult:
    """Run or, with ``resume``, continue a training; the result is in ``output/final/NAME``.

    Args:
        name: folder of the component in a checkpoint directory.
        read: makes the example of a recording.
        build: makes the network from the data, the folder of a trained component or None for new
            weights, and a device.

    Raises:
        ConfigurationError, DataError, CheckpointError, TrainingError: what is wrong with the
            settings, the data, the model or the run.
    """
    checkpoint = checkpoint_to_resume(settings, resume)
    state = PartialState(cpu=settings.device == "cpu")
    if state.num_processes > 1:
        raise TrainingError("the codec is trained by one process; start it without a launcher")
    folder = Path(settings.initial) if settings.initial is not None else None
    if checkpoint is not None:
        folder = checkpoint / MODEL / name
    samples, validation = data = read_samples(settings, read, needs_text)
    torch.manual_seed(settings.seed)
    assert state.device is not None
    network = build(data, folder, state.device).to(state.device)
    if settings.gradient_checkpointing:
        recompute_activations(network)
    trainer = Trainer(settings, state, network, samples, validation, partial(_write, network))
    if checkpoint is not None:
        _restore(network, checkpoint)
        trainer.resume(checkpoint)

    def stepped(*_: object) -> None:
        network.progress = (trainer.step + 1) / trainer.steps
        network.after_step()

    network.progress = trainer.step / trainer.steps
    trainer.optimizer.register_step_post_hook(stepped)
    return trainer.run()


def _write(network: CodecNetwork, folder: Path) -> None:
    network.write(folder)
    (folder.parent / STATE).mkdir()
    save_file(network.kept() | network.same_run(), folder.parent / STATE / KEPT)


def _restore(network: CodecNetwork, checkpoint: Path) -> None:
    path = checkpoint / STATE / KEPT
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path}: damaged ({error})") from error
    for name, tensor in network.same_run().items():
        if name not in stored or not torch.equal(stored[name], tensor):
            raise TrainingError(f"{checkpoint}: trained with other {name}; use the same data")
    for name, tensor in network.kept().items():
        if name not in stored or stored[name].shape != tensor.shape:
            raise TrainingError(f"{path}: does not fit this run ({name}); use the same data")
        tensor.copy_(stored[name])


def mixed_precision(settings: CodecTrainingConfig, device: torch.device) -> AbstractContextManager:
    """Autocast of forward passes, where the settings or an accelerator ask for bfloat16."""
    precision = settings.precision or ("fp32" if device.type == "cpu" else "bf16")
    return torch.autocast(device.type, torch.bfloat16, precision == "bf16")


def load_trainable(part: Component[Module], device: torch.device) -> Module:
    """The module of ``part`` in float32, to be trained further."""
    module = part.load(device, torch.float32)
    return module.requires_grad_(True).train()


def write_component(
    folder: Path, config_name: str, config: dict, tensors: dict[str, Tensor]
) -> None:
    """Write the configuration, YAML or JSON by its name, and ``model.safetensors``, float32."""
    folder.mkdir(parents=True)
    if config_name.endswith(".yaml"):
        text = yaml.safe_dump(config, sort_keys=False)
    else:
        text = json.dumps(config, indent=1) + "\n"
    (folder / config_name).write_text(text, encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
