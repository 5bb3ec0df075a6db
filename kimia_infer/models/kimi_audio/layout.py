"""Which files a checkpoint directory consists of, and whether all of them are there, whole."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from kimia_infer.models.kimi_audio.published import (
    DETOKENIZER_FOLDER,
    DETOKENIZER_FOLDERS,
    SPEECH_TOKENIZER_FOLDER,
    VOCODER_FOLDER,
)
from kimia_infer.utils.errors import WeightsError
from kimia_infer.weights.manifest import MANIFEST_NAME, read_checkpoint_manifest

RECORD_NAME = "download.json"
INDEX_NAME = "model.safetensors.index.json"
WHISPER_FOLDER = "whisper-large-v3"
TUNED_WHISPER = "whisper_model.speech_encoder."
"""Names of an encoder that was fine-tuned with the language model begin so (published code)."""

UNFINISHED_NAME = ".preparing/manifest.json"  # while the slim checkpoint is being written

_REQUIRED = (
    "config.json",
    "tiktoken.model",
    f"{WHISPER_FOLDER}/config.json",
    f"{WHISPER_FOLDER}/model.safetensors",
    f"{SPEECH_TOKENIZER_FOLDER}/config.json",
    f"{SPEECH_TOKENIZER_FOLDER}/model.safetensors",
)
_REQUIRED_FOR_SPEECH = (f"{DETOKENIZER_FOLDER}/config.yaml", f"{VOCODER_FOLDER}/config.json")


def missing_files(directory: Path, detokenizer: bool = True) -> list[str]:
    """Files of the checkpoint layout that ``directory`` lacks, as paths relative to it.

    Without ``detokenizer`` its two folders are not looked at. Content is not judged: the
    loader does that and names the tensor.

    Raises:
        WeightsError: a slim checkpoint that is not finished.
    """
    if (directory / UNFINISHED_NAME).is_file():
        raise WeightsError(f"{directory}: unfinished; run scripts/prepare_weights again")
    slim = read_checkpoint_manifest(directory / MANIFEST_NAME)
    if slim is not None:
        return [name for name in slim.needed(detokenizer) if not (directory / name).is_file()]
    missing = layout_gaps(lambda name: (directory / name).is_file(), detokenizer)
    try:
        shards = _shards(directory)
        if any(name.startswith(TUNED_WHISPER) for name in _tensor_names(directory)):
            missing = [name for name in missing if not name.startswith(WHISPER_FOLDER)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{INDEX_NAME} (not a safetensors index: {error})", *missing]
    return missing + [name for name in shards if not (directory / name).is_file()]


def incomplete_files(directory: Path, detokenizer: bool = True) -> list[str]:
    """:func:`missing_files`, and the weight files that a broken copy has cut short.

    Those are judged by the sizes in the manifest of a slim checkpoint or that a download
    noted, else by their own headers.
    """
    missing = missing_files(directory, detokenizer)
    if missing:
        return missing
    slim = read_checkpoint_manifest(directory / MANIFEST_NAME)
    if slim is not None:
        recorded = {name: entry.size for name, entry in slim.needed(detokenizer).items()}
        names = list(recorded)
    else:
        recorded = read_record(directory).get("files", {})
        names = _shards(directory) + _other_weights(directory, detokenizer)
    faults = {name: _cut_short(directory / name, recorded.get(name)) for name in names}
    return [f"{name} ({fault})" for name, fault in faults.items() if fault]


def layout_gaps(has: Callable[[str], bool], detokenizer: bool = True) -> list[str]:
    """Names of the layout for which ``has`` is false; of alternatives, the published one."""
    gaps = [name for name in _REQUIRED if not has(name)]
    if not has(INDEX_NAME) and not has("model.safetensors"):
        gaps.append(INDEX_NAME)
    if detokenizer:
        gaps += [name for name in _REQUIRED_FOR_SPEECH if not has(name)]
        for folder in DETOKENIZER_FOLDERS:
            if not has(f"{folder}/model.safetensors") and not has(f"{folder}/model.pt"):
                gaps.append(f"{folder}/model.pt")
    return gaps


def read_record(directory: Path) -> dict:
    """What a download noted about ``directory``: its sources and the size of every file.

    Empty where there is no record.

    Raises:
        WeightsError: there is one and it cannot be read.
    """
    path = directory / RECORD_NAME
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text())
        if not isinstance(record["files"], dict) or not isinstance(record["sources"], dict):
            raise TypeError("files and sources must be objects")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path}: not a download record ({error}); delete it") from error
    return record


def require_source(directory: Path, name: str, revision: str) -> None:
    """Refuse a directory that was downloaded from somewhere else, or prepared from such a one."""
    sources = read_record(directory).get("sources")
    if sources is None:
        slim = read_checkpoint_manifest(directory / MANIFEST_NAME)
        sources = slim.sources if slim is not None else None
    if not sources:
        return
    source = sources.get(name)
    if source is None or revision not in (source.get("asked"), source.get("commit")):
        held = ", ".join(f"{n}@{s.get('asked')}" for n, s in sources.items())
        raise WeightsError(
            f"{directory} holds {held}, not {name}@{revision}; name another directory or move it"
        )


def _shards(directory: Path) -> list[str]:
    """Files of the language model: all that the index names, whatever their names are."""
    index = directory / INDEX_NAME
    if index.is_file():
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [name for name in ("model.safetensors",) if (directory / name).is_file()]


def _tensor_names(directory: Path) -> Iterable[str]:
    """Of the language model; none where its file is missing or cut short inside its header."""
    index, path = directory / INDEX_NAME, directory / "model.safetensors"
    if index.is_file():
        return json.loads(index.read_text())["weight_map"]
    if not path.is_file():
        return ()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if path.stat().st_size < 8 + length:
            return ()
        return json.loads(file.read(length))


def _other_weights(directory: Path, detokenizer: bool) -> list[str]:
    """The weight files that are there for the other parts."""
    folders = [WHISPER_FOLDER, SPEECH_TOKENIZER_FOLDER]
    folders += DETOKENIZER_FOLDERS if detokenizer else ()
    names = []
    for folder in folders:
        choices = [f"{folder}/model.safetensors", f"{folder}/model.pt"]
        names += [name for name in choices if (directory / name).is_file()][:1]
    return names


def _cut_short(path: Path, recorded: int | None) -> str | None:
    """Why the file at ``path`` is not whole, or None."""
    size = path.stat().st_size
    if recorded is not None:
        return None if size == recorded else f"{size} bytes instead of {recorded}"
    if path.suffix == ".pt":
        return None if zipfile.is_zipfile(path) else f"cut short at {size} bytes"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            return f"cut short at {size} bytes, inside its header"
        try:
            entries = json.loads(file.read(length)).items()
            ends = [entry["data_offsets"][1] for name, entry in entries if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            return f"not a safetensors file: {error}"
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"{size} bytes instead of {expected}"
