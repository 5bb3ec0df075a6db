"""Find the directory that holds the weights; download it only where a hub id asks for that."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kimia_infer.models.kimi_audio.layout import incomplete_files, missing_files, require_source
from kimia_infer.models.kimi_audio.published import MODEL, default_revision
from kimia_infer.utils.errors import WeightsError
from kimia_infer.weights.manifest import MANIFEST_NAME

WEIGHTS_ROOT = Path(__file__).resolve().parents[2] / "weights"

_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w[\w.-]*))?")


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
    detokenizer: bool = True,
    root: Path = WEIGHTS_ROOT,
) -> Path:
    """The complete checkpoint directory that ``value`` stands for.

    ``value`` is a directory, or ``owner/name[@revision]`` on the hub. A hub repository is
    looked for in ``root`` first (see :func:`local_copy`); a complete copy there is used
    without asking the hub, otherwise it is downloaded to there.
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
        if not local.is_dir() or incomplete_files(local, detokenizer):
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


def _require_complete(directory: Path, detokenizer: bool) -> None:
    missing = missing_files(directory, detokenizer)
    if not missing:
        return
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    remedy = (
        "copy or prepare this slim checkpoint again"
        if (directory / MANIFEST_NAME).is_file()
        else "if this is a copy of the published model, complete it with "
        f"scripts/download_weights --to {directory}"
    )
    raise WeightsError(f"{directory}: {missing[0]} is missing{more}; {remedy}")
