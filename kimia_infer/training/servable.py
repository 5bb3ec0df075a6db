"""What a checkpoint of a run gives to serving: a whole model directory, or an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import PartialState
from torch import Tensor, nn

from kimia_infer.models.kimi_audio.layout import TUNED_WHISPER, WHISPER_FOLDER
from kimia_infer.training.adapters import stored_name
from kimia_infer.training.building import Source, base_parameters
from kimia_infer.training.checkpoints import LiveTensor, live, take_over, write_tensors
from kimia_infer.training.network import TrainingNetwork
from kimia_infer.training.parallel import whole
from kimia_infer.weights.adapter import WEIGHTS_NAME

if TYPE_CHECKING:
    from peft import LoraConfig

WHISPER_PREFIX = "model.encoder."


def write_adapter(
    folder: Path, network: TrainingNetwork, config: LoraConfig, state: PartialState
) -> None:
    """Write the adapters of ``network`` as peft does. All processes have to call this."""
    tensors = [
        live(stored_name(name), parameter)
        for name, parameter in network.named_parameters()
        if ".lora_" in name
    ]
    write_tensors(folder / WEIGHTS_NAME, tensors, state.is_main_process)
    if state.is_main_process:
        config.save_pretrained(folder)


def write_model(
    folder: Path, network: TrainingNetwork, source: Source, with_whisper: bool, state: PartialState
) -> None:
    """Write a checkpoint that can be served, in the published names and the stored dtypes.

    What was not trained is taken over from ``source``, weights as hard links where the file
    system allows. A Whisper encoder that is trained, or was before, is stored with the language
    model, as in published fine-tuned checkpoints, and in its folder too. All processes have to
    call this.
    """
    with_whisper = with_whisper or source.tuned_whisper
    tensors = list(_published(network, source))
    if with_whisper:
        tensors += _whisper(network, source, TUNED_WHISPER)
        path = folder / WHISPER_FOLDER / "model.safetensors"
        write_tensors(path, _whisper(network, source, WHISPER_PREFIX), state.is_main_process)
    write_tensors(folder / "model.safetensors", tensors, state.is_main_process)
    if state.is_main_process:
        take_over(source.directory, folder, [".", *([WHISPER_FOLDER] if with_whisper else [])])


def _published(network: TrainingNetwork, source: Source) -> Iterator[LiveTensor]:
    """The language model by published names; joined matrices are cut into their rows."""
    parameters = base_parameters(network, "language_model")
    gathered = _LastGathered()
    stored = source.language_model.store.tensors
    for slot in sorted(source.language_model.slots, key=lambda slot: slot.parameter):
        ((name, shape),) = slot.sources.items()
        rows = slice(None) if slot.rows is None else slice(*slot.rows)

        def value(parameter: nn.Parameter = parameters[slot.parameter], rows: slice = rows):
            return gathered(parameter)[rows]

        yield LiveTensor(name, shape, stored[name].dtype, value)


def _whisper(network: TrainingNetwork, source: Source, prefix: str) -> Iterator[LiveTensor]:
    stored = source.whisper.store.tensors
    for name, parameter in base_parameters(network, "whisper").items():
        yield live(prefix + name, parameter, stored[name].dtype)


class _LastGathered:
    """Gathers a divided parameter once for all tensors that are cut from it."""

    def __init__(self) -> None:
        self._parameter: nn.Parameter | None = None
        self._value: Tensor | None = None

    def __call__(self, parameter: nn.Parameter) -> Tensor:
        if parameter is not self._parameter:
            self._parameter, self._value = parameter, whole(parameter)
        return self._value
