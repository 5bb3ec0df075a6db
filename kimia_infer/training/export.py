"""The result of a run as a directory to serve from: a whole model, or an adapter for one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from kimia_infer.models.kimi_audio.checkpoint import (
    DETOKENIZER_FOLDER,
    SPEECH_TOKENIZER_FOLDER,
    TUNED_WHISPER,
    VOCODER_FOLDER,
    WHISPER_FOLDER,
    resolve_weights,
)
from kimia_infer.models.kimi_audio.components import checkpoint_components, understanding_components
from kimia_infer.models.kokoro.adapters.merge import merge as merge_into
from kimia_infer.models.kokoro.adapters.store import StoredAdapter, is_prosody_adapter
from kimia_infer.training.checkpoints import take_over
from kimia_infer.training.model_files import Components
from kimia_infer.training.run_directory import CARD, FINAL, MODEL, USE, all_checkpoints, copy_file
from kimia_infer.utils.files import replacing_directory
from kimia_infer.utils.progress import progress
from kimia_infer.weights.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter
from kimia_infer.weights.manifest import MANIFEST_NAME, read_checkpoint_manifest
from kimia_infer.weights.tensors import Reader, TensorStore
from kimia_infer.weights.writing import NewTensor, TensorFile

_CODEC = {
    SPEECH_TOKENIZER_FOLDER: "config.json",
    VOCODER_FOLDER: "config.json",
    DETOKENIZER_FOLDER: "config.yaml",
}
"""Folders of the components of the codec, and what is in each."""


class ExportError(ValueError):
    """An export cannot begin; the message says why and what to do."""


def export(
    source: Path, output: Path, merge: bool = False, base: str | None = None, force: bool = False
) -> list[str]:
    """Write ``output``, whole or not at all, with progress.

    Returns the arguments of scripts/serve that serve it; none for an adapter of Kokoro, which is
    put beside its model or merged.

    Args:
        source: a finished run, a checkpoint of one, or the directory of a model or adapter.
        output: a directory that does not exist; with ``force`` a model or adapter there is
            replaced.
        merge: add an adapter to its model, which gives a whole model; else it is copied.
        base: the model of an adapter, by default the one that it was trained on; or the model
            whose components of the codec are replaced.

    Raises:
        ExportError: the arguments do not go together.
        CheckpointError, WeightsError: what is wrong with the model or the adapter.
    """
    found = find_result(source)
    is_adapter, is_model = (found / CONFIG_NAME).is_file(), (found / "config.json").is_file()
    if is_model and (merge or base is not None):
        raise ExportError(f"{found}: a whole model, not an adapter; leave out --merge and --base")
    if not is_model and not is_adapter and base is None:
        raise ExportError(f"{found}: a component of a model; name the whole one with --base")
    _require_usable(output, found, force)
    prosody = is_prosody_adapter(found)
    with replacing_directory(output.absolute()) as folder:
        served = ["--weights", str(output)]
        if prosody:
            served = []
            _export_prosody(found, folder, output, merge, base)
        elif is_adapter:
            served = _export_adapter(Adapter.read(found), folder, output, merge, base)
        elif is_model:
            take_over(found, folder, rewritten=())
        else:
            assert base is not None, "checked"
            _replace_components(found, folder, output, base)
        if (merge and not prosody) or not (is_adapter or is_model):
            _write_card(folder, found, output, base)
        elif (found / CARD).is_file() and not merge:
            copy_file(found / CARD, folder / CARD)
    return served


def find_result(source: Path) -> Path:
    """The directory of the model or adapter that ``source`` stands for. Raises ExportError."""
    names = (CONFIG_NAME, "config.json", *(f"{name}/{file}" for name, file in _CODEC.items()))
    for path in (source, source / FINAL, source / MODEL):
        if any((path / name).is_file() for name in names):
            return path
    if checkpoints := all_checkpoints(source):
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
    adapter: Adapter, folder: Path, output: Path, merge: bool, base: str | None
) -> list[str]:
    named = base or adapter.base
    if named is None:
        raise ExportError(f"{adapter.directory}: does not say what it was trained on; give --base")
    directory = resolve_weights(named, detokenizer=False)
    components = understanding_components(directory)
    adapted = adapter.adapted(components)
    _require_apart(output, directory)
    if merge:
        _merge(directory, components, adapted, folder)
        return ["--weights", str(output)]
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        copy_file(adapter.directory / name, folder / name)
    return ["--weights", named, "--adapter", str(output)]


def _export_prosody(found: Path, folder: Path, output: Path, merge: bool, base: str | None) -> None:
    """Write an adapter of Kokoro, or its model with the adapter in it, into ``folder``."""
    directory = Path(base or StoredAdapter.read(found).model)
    if merge:
        _require_apart(output, directory)
        merge_into(directory, found, folder)
        return
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        copy_file(found / name, folder / name)


def _replace_components(found: Path, folder: Path, output: Path, base: str) -> None:
    """Write the model ``base`` with the components in ``found`` instead of its own."""
    directory = resolve_weights(base)
    _require_apart(output, directory)
    take_over(directory, folder, rewritten=())
    for name in _CODEC:
        if (found / name).is_dir():
            shutil.rmtree(folder / name)
            shutil.copytree(found / name, folder / name, copy_function=copy_file)
    checkpoint_components(folder)


def _write_card(folder: Path, found: Path, output: Path, base: str | None) -> None:
    """The card of the run, for a whole model with its result in it."""
    path = found / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# {output.name}\n"
    made, _, _ = text.partition(USE)
    whole = f"A whole model: {base or 'the base model'} with what was trained.\n"
    command = "    scripts/serve --weights THIS_DIRECTORY\n"
    (folder / CARD).write_text(f"{made}\n{whole}{USE}\n{command}", encoding="utf-8")


def _require_apart(output: Path, base: Path) -> None:
    if base.resolve() in (output.resolve(), *output.resolve().parents):
        raise ExportError(f"{output}: lies in the model {base}; name a directory elsewhere")


def _merge(base: Path, components: Components, adapted: Components, target: Path) -> None:
    """Write the checkpoint ``base``, in which ``components`` are replaced by the ``adapted`` ones.

    Names and dtypes stay; what no change touches is linked where the file system allows. An
    adapted Whisper encoder is stored in its folder, and with the language model if it was there.
    """
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
    size = sum(file.size for file in files.values())
    with progress("Merging", size, "B", unit_scale=True) as bar:
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
            NewTensor(prefix + name, t.shape, t.readable_dtype, store, (name,), change(name))
            for name, t in store.tensors.items()
        ]
    )
