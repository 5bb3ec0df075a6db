"""What a checkpoint of a run gives to serving: a whole model directory, or an adapter."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate import PartialState
from peft import LoraConfig
from torch import Tensor, nn

from kimia_infer.training.adapters import WEIGHTS_NAME, stored_name
from kimia_infer.training.building import WHISPER_FOLDER, Source, base_parameters
from kimia_infer.training.checkpoints import LiveTensor, live, write_tensors
from kimia_infer.training.network import TrainingNetwork
from kimia_infer.training.parallel import whole
from kimia_infer.weights.layout import INDEX_NAME, RECORD_NAME
from kimia_infer.weights.manifest import MANIFEST_NAME

SFT_WHISPER_PREFIX = "whisper_model.speech_encoder."
"""Of the Whisper encoder inside published fine-tuned checkpoints."""

WHISPER_PREFIX = "model.encoder."
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)
_NOT_COPIED = (RECORD_NAME, MANIFEST_NAME)  # they state sizes and checksums


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
    system allows. A trained Whisper encoder is stored where serving reads it, and with the language
    model too, as in published fine-tuned checkpoints. All processes have to call this.
    """
    tensors = list(_published(network, source))
    if with_whisper:
        tensors += _whisper(network, source, SFT_WHISPER_PREFIX)
        path = folder / WHISPER_FOLDER / "model.safetensors"
        write_tensors(path, _whisper(network, source, WHISPER_PREFIX), state.is_main_process)
    write_tensors(folder / "model.safetensors", tensors, state.is_main_process)
    if state.is_main_process:
        _take_over(source.directory, folder, [".", *([WHISPER_FOLDER] if with_whisper else [])])


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


def _take_over(source: Path, target: Path, rewritten: Sequence[str]) -> None:
    """Link or copy the files of the checkpoint ``source`` but the weights in ``rewritten``."""
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
