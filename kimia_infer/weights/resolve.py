"""Find the directory that holds the weights; download it only where a hub id asks for that."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from kimia_infer.weights.published import DETOKENIZER_FOLDERS, MODEL, SPEECH_TOKENIZER_FOLDER

WEIGHTS_ROOT = Path(__file__).resolve().parents[2] / "weights"
RECORD_NAME = "download.json"
INDEX_NAME = "model.safetensors.index.json"

_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w[\w.-]*))?")
_REQUIRED = (
    "config.json",
    "tiktoken.model",
    "whisper-large-v3/config.json",
    "whisper-large-v3/model.safetensors",
    f"{SPEECH_TOKENIZER_FOLDER}/config.json",
    f"{SPEECH_TOKENIZER_FOLDER}/model.safetensors",
)
_REQUIRED_FOR_SPEECH = ("audio_detokenizer/config.yaml", "vocoder/config.json")


class WeightsError(RuntimeError):
    """The weights cannot be found or fetched; the message says what is wrong and what to do."""


def weights_from_environment(cog_weights: str | os.PathLike[str] | None = None) -> str:
    """What the environment names as weights: ``KIMI_AUDIO_WEIGHTS``, else Cog's.

    ``cog_weights`` is what Cog gave to ``setup``; without it ``COG_WEIGHTS`` is read. The
    value is a directory or a hub id for :func:`resolve_weights`.

    Raises:
        WeightsError: neither is set, or the first that is set is empty.
    """
    named = {
        "KIMI_AUDIO_WEIGHTS": os.environ.get("KIMI_AUDIO_WEIGHTS"),
        "the weights that Cog passed": None if cog_weights is None else os.fspath(cog_weights),
        "COG_WEIGHTS": os.environ.get("COG_WEIGHTS"),
    }
    for source, value in named.items():
        if value is None:
            continue
        if not value.strip():
            raise WeightsError(f"{source}: empty; name a directory or owner/name[@revision]")
        return value
    raise WeightsError(
        "no weights named: set KIMI_AUDIO_WEIGHTS (or COG_WEIGHTS) to a checkpoint directory, "
        f"such as weights/mini, or to a hub repository, such as {MODEL.name}"
    )


def resolve_weights(
    value: str | os.PathLike[str],
    download: bool = True,
    detokenizer: bool = True,
    root: Path = WEIGHTS_ROOT,
) -> Path:
    """The complete checkpoint directory that ``value`` stands for.

    ``value`` is a directory, or ``owner/name[@revision]`` on the hub. A hub repository is
    looked for in ``root`` first (see :func:`local_copy`); a complete copy there is used
    without asking the hub, otherwise it is downloaded to there, unless ``download`` is false.
    The default revision is the pinned one for the published model and ``main`` for any other.
    Without ``detokenizer`` the files that only speech output needs are not required.

    Raises:
        WeightsError: the value is neither, a file is missing, or the download failed.
    """
    text = os.fspath(value).strip()
    directory = Path(text).expanduser()
    if text and directory.is_dir():
        _require_complete(directory, detokenizer)
        return directory
    name, revision = parse_hub_id(text)
    local = local_copy(name, revision, root)
    try:
        require_source(local, name, revision)
        if not local.is_dir() or missing_files(local, detokenizer):
            if not download:
                raise WeightsError(f"no complete copy in {local}; run {_command(local, value)}")
            from kimia_infer.weights.download import download_weights

            download_weights(local, name, revision, detokenizer)
    except WeightsError as error:
        raise WeightsError(f"{text}: no such directory; as a hub repository: {error}") from error
    return local


def parse_hub_id(text: str) -> tuple[str, str]:
    """Repository name and revision of ``owner/name[@revision]``, with the default revision.

    Raises:
        WeightsError: the text is something else.
    """
    match = _HUB_ID.fullmatch(text)
    problem = None
    if not text:
        problem = "empty"
    elif "://" in text:
        problem = "a URL"
    elif Path(text).expanduser().is_file():
        problem = "a file"
    elif match is None or ".." in text or "--" in match["name"]:
        problem = "no such directory"
    if problem or match is None:
        raise WeightsError(
            f"weights {text!r}: {problem}; name a checkpoint directory, or a hub repository as "
            "owner/name or owner/name@revision"
        )
    return match["name"], match["revision"] or default_revision(match["name"])


def local_copy(name: str, revision: str, root: Path = WEIGHTS_ROOT) -> Path:
    """Where a copy of a hub repository is looked for and downloaded to.

    ``Kimi-Audio-7B-Instruct`` for the published model, ``owner--name`` for others, followed by
    ``@revision`` where it is not the default one.
    """
    folder = name.partition("/")[2] if name == MODEL.name else name.replace("/", "--")
    return root / (folder if revision == default_revision(name) else f"{folder}@{revision}")


def default_revision(name: str) -> str:
    """The commit that the published model is pinned to; ``main`` for other repositories."""
    return MODEL.revision if name == MODEL.name else "main"


def missing_files(directory: Path, detokenizer: bool = True) -> list[str]:
    """Files of the checkpoint layout that ``directory`` lacks or that are cut short.

    Each entry is a path relative to ``directory``, with a remark where the file exists but
    is not whole. Weights are judged by the sizes that a download noted, else by their own
    headers. Without ``detokenizer`` its two folders are not looked at.
    """
    missing = layout_gaps(lambda name: (directory / name).is_file(), detokenizer)
    recorded = read_record(directory).get("files", {})
    try:
        shards = _shards(directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{INDEX_NAME} (not a safetensors index: {error})", *missing]
    for name in shards + _other_weights(directory, detokenizer):
        path = directory / name
        if not path.is_file():
            missing.append(name)
        elif fault := _cut_short(path, recorded.get(name)):
            missing.append(f"{name} ({fault})")
    return missing


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
    """Refuse a directory whose record says that it was downloaded from somewhere else."""
    sources = read_record(directory).get("sources")
    if sources is None:
        return
    source = sources.get(name)
    if source is None or revision not in (source.get("asked"), source.get("commit")):
        held = ", ".join(f"{n}@{s.get('asked')}" for n, s in sources.items())
        raise WeightsError(
            f"{directory} holds {held}, not {name}@{revision}; name another directory or move it"
        )


def _require_complete(directory: Path, detokenizer: bool) -> None:
    missing = missing_files(directory, detokenizer)
    if not missing:
        return
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise WeightsError(
        f"{directory} is incomplete: {missing[0]}{more} missing or cut short; if this is a copy of "
        f"the published model, complete it with {_command(directory)}"
    )


def _command(directory: Path, value: str | os.PathLike[str] | None = None) -> str:
    source = f" {value}" if value is not None and os.fspath(value) != MODEL.name else ""
    return f"scripts/download_weights{source} --to {directory}"


def _shards(directory: Path) -> list[str]:
    """Files of the language model: all that the index names, whatever their names are."""
    index = directory / INDEX_NAME
    if index.is_file():
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [name for name in ("model.safetensors",) if (directory / name).is_file()]


def _other_weights(directory: Path, detokenizer: bool) -> list[str]:
    """The weight files that are there for the other parts."""
    folders = ["whisper-large-v3", SPEECH_TOKENIZER_FOLDER]
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
