"""What a run gave, as a directory to serve from: a whole model, or a small adapter for one."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from kimia_infer.models.kimi_audio.components import checkpoint_components, understanding_components
from kimia_infer.models.kimi_audio.layout import TUNED_WHISPER, WHISPER_FOLDER
from kimia_infer.models.kimi_audio.published import (
    DETOKENIZER_FOLDER,
    SPEECH_TOKENIZER_FOLDER,
    VOCODER_FOLDER,
)
from kimia_infer.models.kimi_audio.writing import NewTensor, TensorFile
from kimia_infer.training.checkpoints import (
    MODEL,
    all_checkpoints,
    link_or_copy,
    publish,
    take_over,
)
from kimia_infer.training.run_directory import FINAL
from kimia_infer.weights.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter
from kimia_infer.weights.component import Component
from kimia_infer.weights.manifest import MANIFEST_NAME, read_checkpoint_manifest
from kimia_infer.weights.resolve import resolve_weights
from kimia_infer.weights.tensors import Reader, TensorStore

_FOLDERS = (SPEECH_TOKENIZER_FOLDER, VOCODER_FOLDER)


class ExportError(ValueError):
    """An export cannot begin; the message says why and what to do."""


@dataclass(frozen=True)
class Exported:
    """What was written: the arguments of scripts/serve that serve it."""

    weights: str
    adapter: str | None


def export(
    source: Path, output: Path, merge: bool = False, base: str | None = None, force: bool = False
) -> Exported:
    """Write ``output``, whole or not at all, with progress.

    Args:
        source: a finished run, a checkpoint of one, or the directory of a model or adapter.
        output: a directory that does not exist; with ``force`` a model or adapter there is
            replaced.
        merge: add an adapter to its model, which gives a whole model; else it is copied.
        base: the model of an adapter, without the one that it was trained on; or the model in
            which trained parts of the codec replace its own.

    Raises:
        ExportError: the arguments do not go together.
        CheckpointError, WeightsError: what is wrong with the model or the adapter.
    """
    found = find_result(source)
    is_adapter, is_model = (found / CONFIG_NAME).is_file(), (found / "config.json").is_file()
    if is_model and (merge or base is not None):
        raise ExportError(f"{found}: a whole model, not an adapter; leave out --merge and --base")
    if not is_model and not is_adapter and base is None:
        raise ExportError(f"{found}: a part of a model; name the whole one with --base")
    _require_usable(output, found, force)
    part = output.absolute().with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        exported = Exported(str(output), None)
        if is_adapter:
            exported = _export_adapter(Adapter.read(found), part, output, merge, base)
        elif is_model:
            take_over(found, part, rewritten=())
        else:
            _replace_parts(found, part, output, base)
        publish(part, output.absolute())
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return exported


def find_result(source: Path) -> Path:
    """The directory of the model or adapter that ``source`` stands for. Raises ExportError."""
    for path in (source, source / FINAL, source / MODEL):
        files = (
            CONFIG_NAME, "config.json", *(f"{name}/config.json" for name in _FOLDERS),
            f"{DETOKENIZER_FOLDER}/config.yaml",
        )  # fmt: skip
        if any((path / name).is_file() for name in files):
            return path
    checkpoints = all_checkpoints(source)
    if checkpoints:
        raise ExportError(
            f"{source}: the run is not complete; name a checkpoint: {checkpoints[-1]}"
        )
    raise ExportError(f"{source}: not a run, a checkpoint of one, a model or an adapter")


def _require_usable(output: Path, source: Path, force: bool) -> None:
    new, old = output.resolve(), source.resolve()
    if new == old or new in old.parents or old in new.parents:
        raise ExportError(f"{output}: lies in {source} or around it; name a directory elsewhere")
    if not output.exists():
        return
    if not force:
        raise ExportError(f"{output}: exists; name another directory or replace it with --force")
    if not any((output / name).is_file() for name in (CONFIG_NAME, "config.json")):
        raise ExportError(f"{output}: holds neither a model nor an adapter, and is not replaced")


def _export_adapter(
    adapter: Adapter, part: Path, output: Path, merge: bool, base: str | None
) -> Exported:
    named = base or adapter.base
    if named is None:
        raise ExportError(f"{adapter.directory}: does not say what it was trained on; give --base")
    directory = resolve_weights(named, detokenizer=False)
    components = understanding_components(directory)
    adapter.adapted(components)  # refuses one that does not fit
    _require_apart(output, directory)
    if merge:
        _merge(adapter, directory, components, part)
        return Exported(str(output), None)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        link_or_copy(adapter.directory / name, part / name)
    return Exported(named, str(output))


def _replace_parts(found: Path, part: Path, output: Path, base: str) -> None:
    """The model ``base`` with the folders of ``found`` in the places of its own."""
    directory = resolve_weights(base)
    _require_apart(output, directory)
    take_over(directory, part, rewritten=())
    for name in (*_FOLDERS, DETOKENIZER_FOLDER):
        if (found / name).is_dir():
            shutil.rmtree(part / name)
            (part / name).mkdir()
            for path in sorted((found / name).iterdir()):
                link_or_copy(path, part / name / path.name)
    checkpoint_components(part)


def _require_apart(output: Path, base: Path) -> None:
    if base.resolve() in (output.resolve(), *output.resolve().parents):
        raise ExportError(f"{output}: lies in the model {base}; name a directory elsewhere")


def _merge(adapter: Adapter, base: Path, components: dict[str, Component], target: Path) -> None:
    """Write the checkpoint ``base``, whose components are ``components``, with the adapter added.

    Names and dtypes stay; what no change touches is linked where the file system allows. An
    adapted Whisper encoder is stored in its folder, and with the language model if it was there.
    """
    adapted = adapter.adapted(components)
    values = {
        prefix + name: slot.combine
        for component, prefix in (("language_model", ""), ("whisper", TUNED_WHISPER))
        for slot in adapted[component].slots
        for name in slot.sources
        if slot.combine is not None
    }
    model, whisper = (components[name].store for name in ("language_model", "whisper"))
    files = {".": _tensor_file(model, values.get)}
    if any(name.startswith(TUNED_WHISPER) for name in values):
        files[WHISPER_FOLDER] = _tensor_file(
            whisper, lambda name: values.get(TUNED_WHISPER + name), "model.encoder."
        )
    slim = read_checkpoint_manifest(base / MANIFEST_NAME)
    reader = Reader(partial(slim.checksum, base) if slim is not None else None)
    with _progress(sum(file.size for file in files.values())) as bar:
        for folder, file in files.items():
            (target / folder).mkdir(exist_ok=True)
            file.write(target / folder / "model.safetensors", reader, bar.update)
    take_over(base, target, tuple(files))


def _tensor_file(
    store: TensorStore, change: Callable[[str], Callable[[Tensor], Tensor] | None], prefix: str = ""
) -> TensorFile:
    """All tensors of a store, their names after ``prefix``, with what ``change`` makes of them."""
    return TensorFile(
        [
            NewTensor(prefix + name, stored.shape, stored.dtype, store, (name,), change(name))
            for name, stored in store.tensors.items()
        ]
    )


def _progress(total: int) -> tqdm:
    interval = 0.5 if sys.stderr.isatty() else 30.0  # a log gets few lines
    return tqdm(
        desc="Merging",
        total=total,
        unit="B",
        unit_scale=True,
        mininterval=interval,
        maxinterval=max(interval, 10.0),
    )
