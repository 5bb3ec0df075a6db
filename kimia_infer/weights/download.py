"""Fetch a checkpoint directory from the hub: only what is needed, resumable, verified.

Names, sizes and checksums come from the hub's metadata. Every file is received under
``.incomplete/<checksum>``, which a later call continues where it stopped, and gets its own
name once its content is verified, so that what stands in the directory is whole.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import logging
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # base class of the HTTP client's errors
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from kimia_infer.models.kimi_audio.layout import (
    RECORD_NAME,
    incomplete_files,
    layout_gaps,
    read_record,
    require_source,
)
from kimia_infer.models.kimi_audio.published import (
    DETOKENIZER_FOLDERS,
    MODEL,
    SPEECH_TOKENIZER,
    SPEECH_TOKENIZER_FOLDER,
    default_revision,
)
from kimia_infer.utils.errors import WeightsError

PARTS_FOLDER = ".incomplete"
CONNECTIONS = 8
ATTEMPTS = 5  # without a single new byte
PAUSE = 0.5  # seconds, doubled with every attempt in vain
TIMEOUT = 30.0  # seconds without an answer or a byte

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub: where it goes (relative), where it is, and what it must contain.

    ``checksum`` is the SHA-256 of a large file; of a small one, which is kept in git itself,
    it is the git blob id.
    """

    name: str
    url: str
    size: int
    checksum: str


def download_weights(
    directory: Path,
    name: str = MODEL.name,
    revision: str | None = None,
    detokenizer: bool = True,
) -> None:
    """Make ``directory`` a complete checkpoint from the hub repository ``name``.

    The speech tokenizer comes from its own repository unless ``name`` carries it. A complete
    directory is left alone, without a look at the network. Without ``detokenizer`` the files
    that only speech output needs stay away. A call that was interrupted is continued by the
    next one.

    Raises:
        WeightsError: no network, unknown or closed repository, too little disk space, damaged
            content, or a directory that holds another checkpoint.
    """
    revision = revision or default_revision(name)
    require_source(directory, name, revision)
    if not incomplete_files(directory, detokenizer):
        return
    with _explained(name, revision):
        files, sources = _needed(name, revision, detokenizer)
        with _locked(directory):
            if incomplete_files(directory, detokenizer):  # another process may have been here
                _Fetch(directory, sources).run(files)
    missing = incomplete_files(directory, detokenizer)
    if missing:
        raise WeightsError(f"{directory}: {missing[0]} is missing or cut short in {name}, too")


def _needed(name: str, revision: str, detokenizer: bool) -> tuple[list[RemoteFile], dict]:
    """The files to fetch, speech tokenizer included, and what to note about their sources."""
    commit, files = list_repository(name, revision)
    files = _select(files, detokenizer)
    sources = {name: {"asked": revision, "commit": commit}}
    if not any(file.name == f"{SPEECH_TOKENIZER_FOLDER}/model.safetensors" for file in files):
        tokenizer = SPEECH_TOKENIZER
        with _explained(tokenizer.name, tokenizer.revision):
            commit, more = list_repository(tokenizer.name, tokenizer.revision)
        sources[tokenizer.name] = {"asked": tokenizer.revision, "commit": commit}
        files += [
            replace(file, name=f"{SPEECH_TOKENIZER_FOLDER}/{file.name}")
            for file in more
            if file.name in tokenizer.files
        ]
    gaps = layout_gaps({file.name for file in files}.__contains__, detokenizer)
    if gaps:
        raise WeightsError(f"{name}@{revision} has no {gaps[0]}, so it is no Kimi-Audio checkpoint")
    return files, sources


def list_repository(name: str, revision: str) -> tuple[str, list[RemoteFile]]:
    """Commit behind ``revision`` and every file in it, from the hub's metadata."""
    api = HfApi()
    info = api.model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT)
    files = []
    for entry in info.siblings or ():
        url = hf_hub_url(name, entry.rfilename, revision=info.sha, endpoint=api.endpoint)
        size = entry.size if entry.lfs is None else entry.lfs.size
        checksum = entry.blob_id if entry.lfs is None else entry.lfs.sha256
        if size is None or checksum is None:
            raise WeightsError(f"the hub gives no size or checksum for {entry.rfilename} of {name}")
        files.append(RemoteFile(entry.rfilename, url, size, checksum))
    if info.sha is None:
        raise WeightsError(f"the hub names no commit for {name}@{revision}")
    return info.sha, files


def _select(files: list[RemoteFile], detokenizer: bool) -> list[RemoteFile]:
    """Those of ``files`` that the model needs; a pickle only where it has no safetensors."""
    names = {file.name for file in files}
    folders = () if detokenizer else DETOKENIZER_FOLDERS

    def wanted(name: str) -> bool:
        folder, _, leaf = name.rpartition("/")
        replaced = leaf == "model.pt" and f"{folder}/model.safetensors" in names
        listed = any(
            fnmatch.fnmatchcase(name, pattern) and pattern.count("/") == name.count("/")
            for pattern in MODEL.files
        )
        return listed and not replaced and folder not in folders

    return [file for file in files if wanted(file.name)]


class _Fetch:
    """One download: brings files into ``directory`` and notes what is there."""

    def __init__(self, directory: Path, sources: dict):
        self.directory = directory
        self.parts = directory / PARTS_FOLDER
        self.noted = read_record(directory).get("files", {})
        self.record = {"sources": sources, "files": {}}
        self.headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        self.stopped = threading.Event()
        self.counting = threading.Lock()

    def run(self, files: list[RemoteFile]) -> None:
        todo = [file for file in files if not self._is_there(file)]
        self._require_space(todo)
        self.parts.mkdir(exist_ok=True)
        with (
            _progress(todo, sum(self._received(file) for file in todo)) as bar,
            ThreadPoolExecutor(CONNECTIONS) as pool,
        ):
            largest_first = sorted(todo, key=lambda file: -file.size)
            futures = {pool.submit(self._fetch, file, bar): file for file in largest_first}
            try:
                for future in as_completed(futures):
                    future.result()
                    self._note(futures[future])
            except BaseException:
                self.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self._write_record()
        shutil.rmtree(self.parts)

    def _is_there(self, file: RemoteFile) -> bool:
        path = self.directory / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        if self.noted.get(file.name) != file.size and _checksum(path, file) != file.checksum:
            return False
        self.record["files"][file.name] = file.size
        return True

    def _part(self, file: RemoteFile) -> Path:
        return self.parts / f"{file.name.replace('/', '--')}.{file.checksum}"

    def _received(self, file: RemoteFile) -> int:
        part = self._part(file)
        return part.stat().st_size if part.is_file() else 0

    def _require_space(self, todo: list[RemoteFile]) -> None:
        needed = sum(file.size - self._received(file) for file in todo)
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise WeightsError(
                f"{self.directory}: {needed:,} bytes are still to be downloaded and {free:,} are "
                f"free; free {needed - free:,} bytes or name a directory on a larger disk"
            )

    def _fetch(self, file: RemoteFile, bar: tqdm) -> None:
        part = self._part(file)
        part.touch()
        self._receive(file, part, bar)
        if _checksum(part, file) != file.checksum:
            part.unlink()
            raise WeightsError(f"{file.name}: damaged on the way; run the download again")
        target = self.directory / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)

    def _receive(self, file: RemoteFile, part: Path, bar: tqdm) -> None:
        """Append to ``part`` until it is whole, through lost connections."""
        attempts = ATTEMPTS
        while (have := part.stat().st_size) < file.size:
            try:
                reason = "the connection was closed early"
                self._append(file, part, have, bar)
            except HTTPError as error:
                if _is_final(error):
                    raise
                reason = str(error)
            received = part.stat().st_size
            attempts = ATTEMPTS if received > have else attempts - 1
            if attempts == 0:
                raise WeightsError(
                    f"{file.name}: {received:,} of {file.size:,} bytes received ({reason}); "
                    "run the download again to continue"
                )
            if received < file.size:
                self.stopped.wait(PAUSE * 2 ** (ATTEMPTS - attempts))

    def _append(self, file: RemoteFile, part: Path, have: int, bar: tqdm) -> None:
        headers = {**self.headers, "Range": f"bytes={have}-"} if have else self.headers
        with get_session().stream("GET", file.url, headers=headers, timeout=TIMEOUT) as response:
            hf_raise_for_status(response)
            resumed = response.status_code == 206
            self._count(bar, 0 if resumed else -have)
            with part.open("ab" if resumed else "wb") as target:
                for chunk in response.iter_bytes():
                    if self.stopped.is_set():
                        raise WeightsError("stopped because another file failed")
                    target.write(chunk)
                    self._count(bar, len(chunk))

    def _count(self, bar: tqdm, received: int) -> None:
        with self.counting:
            bar.update(received)

    def _note(self, file: RemoteFile) -> None:
        self.record["files"][file.name] = file.size
        self._write_record()

    def _write_record(self) -> None:
        new = self.parts / RECORD_NAME
        new.write_text(json.dumps(self.record, indent=1, sort_keys=True) + "\n")
        new.replace(self.directory / RECORD_NAME)


def _progress(todo: list[RemoteFile], received: int) -> tqdm:
    interval = 0.5 if sys.stderr.isatty() else 30.0  # a log gets few lines
    return tqdm(
        desc=f"{len(todo)} files",
        total=sum(file.size for file in todo),
        initial=received,
        unit="B",
        unit_scale=True,
        mininterval=interval,
        maxinterval=max(interval, 10.0),
    )


def _checksum(path: Path, file: RemoteFile) -> str:
    """Checksum of ``path`` in the kind that the hub gives for ``file``."""
    with path.open("rb") as content:
        if len(file.checksum) == 64:
            return hashlib.file_digest(content, "sha256").hexdigest()
        blob = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        return hashlib.file_digest(content, lambda: blob).hexdigest()


def _is_final(error: HTTPError) -> bool:
    """Whether asking again is pointless: the hub answered, and not that it is overloaded."""
    if not isinstance(error, HfHubHTTPError):
        return False
    return error.response.status_code < 500 and error.response.status_code not in (408, 429)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other processes from downloading to the same place at the same time."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".download.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("waiting for another download to %s", directory)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _explained(name: str, revision: str) -> Iterator[None]:
    """Turn what can go wrong with the hub and the disk into one :class:`WeightsError`."""
    try:
        yield
    except GatedRepoError as error:
        problem, cause = "is restricted: accept its terms on the hub and set HF_TOKEN", error
    except RepositoryNotFoundError as error:
        problem, cause = "is unknown to the hub, or private: check the name or set HF_TOKEN", error
    except RevisionNotFoundError as error:
        problem, cause = f"has no revision {revision}", error
    except OfflineModeIsEnabled as error:
        problem, cause = "cannot be read while HF_HUB_OFFLINE is set: unset it", error
    except HfHubHTTPError as error:
        problem, cause = f"cannot be read: {str(error).strip().splitlines()[0]}", error
    except HTTPError as error:
        problem, cause = f"cannot be reached ({error}): check the network and HF_ENDPOINT", error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; the disk is full: make room and run the download again to continue"
        problem, cause = f"cannot be stored: {error}{hint if full else ''}", error
    else:
        return
    raise WeightsError(f"{name} {problem}") from cause
