"""Find the directory that holds the weights; download it only where a hub id asks for that."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kimia_infer.utils.errors import WeightsError
from kimia_infer.weights.layout import CheckpointLayout, require_source
from kimia_infer.weights.manifest import MANIFEST_NAME

_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w[\w.-]*))?")


def cache_directory() -> Path:
    """Where downloaded weights are kept, outside the package.

    ``KIMI_AUDIO_CACHE``, else ``kimi-audio`` in ``XDG_CACHE_HOME``, else ``~/.cache/kimi-audio``.

    Raises:
        WeightsError: none of them is known.
    """
    named = os.environ.get("KIMI_AUDIO_CACHE")
    if named:
        return Path(named).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kimi-audio"
    except RuntimeError as error:
        raise WeightsError(
            "this user has no home directory for downloads; name one in KIMI_AUDIO_CACHE"
        ) from error


def resolve(
    value: str | os.PathLike[str], layout: CheckpointLayout, root: Path | None = None
) -> Path:
    """The complete checkpoint directory that ``value`` stands for.

    Args:
        value: a directory, or ``owner/name[@revision]`` on the hub. The default revision is the
            pinned one for the published repository and ``main`` for any other.
        layout: the files that have to be there.
        root: where copies of hub repositories are looked for and downloaded to; by default
            :func:`cache_directory`. A complete copy, there or in the hub's own cache, is used
            without asking the hub.

    Raises:
        WeightsError: the value is neither, a file is missing, or the download failed.
    """
    text = os.fspath(value).strip()
    directory = Path(text).expanduser()
    if text and directory.is_dir():
        _require_complete(directory, layout)
        return directory
    name, revision = parse_hub_id(text, layout)
    local = local_copy(name, revision, layout, root)
    try:
        require_source(local, name, revision)
        if not local.is_dir() or layout.incomplete_files(local):
            from kimia_infer.weights.download import download  # imports the hub client: 0.3 s

            download(local, layout, name, revision)
    except WeightsError as error:
        raise WeightsError(f"{text}: no such directory; as a hub repository: {error}") from error
    return local


def parse_hub_id(text: str, layout: CheckpointLayout) -> tuple[str, str]:
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
    return match["name"], match["revision"] or layout.default_revision(match["name"])


def local_copy(
    name: str, revision: str, layout: CheckpointLayout, root: Path | None = None
) -> Path:
    """The directory of a copy of a hub repository.

    Such as ``Kimi-Audio-7B-Instruct`` for the published repository, ``owner--name`` for others,
    followed by ``@revision`` where it is not the default one.
    """
    published = name == layout.repository.name
    folder = name.partition("/")[2] if published else name.replace("/", "--")
    if revision != layout.default_revision(name):
        folder = f"{folder}@{revision}"
    return (root or cache_directory()) / folder


def _require_complete(directory: Path, layout: CheckpointLayout) -> None:
    missing = layout.missing_files(directory)
    if not missing:
        return
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    remedy = (
        "copy or prepare this slim checkpoint again"
        if (directory / MANIFEST_NAME).is_file()
        else "if this is a copy of the published model, complete it with "
        f"{layout.command} --to {directory}"
    )
    raise WeightsError(f"{directory}: {missing[0]} is missing{more}; {remedy}")
