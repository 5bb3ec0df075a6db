"""Speech codes of training data, computed once and stored with it.

Results are kept in a journal next to the output as they come, so that an interrupted
extraction continues; the output itself appears whole, in the order of the input.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kimia_infer.audio.decode import AudioError, load_audio
from kimia_infer.data.conversations import (
    ConversationFile,
    DataError,
    audio_field,
    parse_conversation,
    write_lines,
)
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.published import SPEECH_TOKENIZER_FOLDER
from kimia_infer.models.kimi_audio.speech_tokenizer import SpeechCodes, speech_tokenizer_component

JOBS_PER_WORKER = 4
"""Lines handed out ahead, so that no worker waits."""


@dataclass(frozen=True)
class Extraction:
    """What was done: lines written, and what is wrong with those left out."""

    written: int
    faults: list[dict]


@dataclass(frozen=True)
class Encoder:
    """Everything a worker needs to compute codes."""

    directory: Path
    token_offset: int
    device: str

    @property
    def folder(self) -> Path:
        return self.directory / SPEECH_TOKENIZER_FOLDER

    def load(self) -> SpeechCodes:
        module = speech_tokenizer_component(self.folder).load(
            torch.device(self.device), torch.float32
        )
        return SpeechCodes(module, self.folder)


def extract_codes(
    source: Path, target: Path, directory: Path, audio_root: Path, device: str, workers: int
) -> Extraction:
    """Write the lines of ``source`` to ``target`` with the codes of all their sounds.

    Codes that a line has already are kept. A line that cannot be used is left out, and listed in
    ``target`` + ``.bad.jsonl`` with the reason. With several ``workers`` each is a process with a
    tokenizer of its own on ``device``.

    Raises:
        DataError: ``target`` exists, or was begun from other data, or a worker died.
        CheckpointError: the speech tokenizer of ``directory`` cannot be used.
    """
    if target.exists():
        raise DataError(f"{target}: exists; delete it or name another file")
    file = ConversationFile(source)
    offset = LanguageModelConfig.from_directory(directory).token_offset
    encoder = Encoder(directory, offset, device)
    speech_tokenizer_component(encoder.folder)  # checked here, so that workers need not report
    target.parent.mkdir(parents=True, exist_ok=True)
    journal = _Journal(target, {"sha256": _sha256(source), "model": str(directory.resolve())})
    faults = {}
    with journal, tqdm(total=len(file), desc="Extracting", unit=" lines") as progress:
        progress.update(len(journal.done))
        jobs = []
        for index in range(len(file)):
            if index in journal.done:
                continue
            try:
                jobs.append((index, _missing_codes(file, index, audio_root)))
            except DataError as error:
                faults[index] = str(error)
                progress.update()
        for index, codes in _computed(jobs, encoder, workers):
            if isinstance(codes, DataError):
                faults[index] = f"{file.where(index)}: {codes}"
            else:
                journal.add(index, codes)
            progress.update()
        count = write_lines(target, _complete(file, journal))
    report = target.with_name(target.name + ".bad.jsonl")
    report.unlink(missing_ok=True)
    listed = [{"line": file.line_number(i), "error": faults[i]} for i in sorted(faults)]
    if listed:
        write_lines(report, listed)
    journal.path.unlink()
    return Extraction(count, listed)


Sound = tuple[int, str, str]  # index of its message, field for errors, path
Codes = dict[int, list[int]]  # ids by index of the message


def _missing_codes(file: ConversationFile, index: int, audio_root: Path) -> list[Sound]:
    """The sounds of a line whose codes are to be computed."""
    values = file.raw(index)
    _drop_failed(values)
    try:
        conversation = parse_conversation(values)
    except DataError as error:
        raise DataError(f"{file.where(index)}: {error}") from error
    return [
        (
            position,
            audio_field(position, message.message_type),
            str(audio_root / str(message.audio)),
        )
        for position, message in enumerate(conversation.messages)
        if message.audio is not None and position not in conversation.audio_ids
    ]


def _drop_failed(values: Any) -> None:
    """Empty codes are how the published extraction marks a failure."""
    if isinstance(values, dict) and isinstance(values.get("conversation"), list):
        for message in values["conversation"]:
            if isinstance(message, dict) and message.get("audio_tokens") == []:
                del message["audio_tokens"]


def _complete(file: ConversationFile, journal: _Journal) -> Iterator[dict]:
    for index in sorted(journal.done):
        values = file.raw(index)
        _drop_failed(values)
        for position, ids in journal.codes(index).items():
            values["conversation"][position]["audio_tokens"] = ids
        yield values


def _computed(
    jobs: list[tuple[int, list[Sound]]], encoder: Encoder, workers: int
) -> Iterator[tuple[int, Codes | DataError]]:
    """The codes of each job as they become known."""
    if workers == 1:
        codes = encoder.load()
        for index, sounds in jobs:
            yield index, _encode(codes, encoder.token_offset, sounds)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (encoder,))
    waiting: deque[tuple[int, Future]] = deque()
    try:
        for index, sounds in jobs:
            waiting.append((index, pool.submit(_work, sounds)))
            if len(waiting) >= JOBS_PER_WORKER * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for index, future in waiting:
            yield index, future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker died, perhaps for lack of memory; the same command with fewer --workers "
            "continues"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(encoder: Encoder) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    torch.set_num_threads(1)
    _worker.update(codes=encoder.load(), offset=encoder.token_offset)


def _work(sounds: list[Sound]) -> Codes | DataError:
    return _encode(_worker["codes"], _worker["offset"], sounds)


def _encode(codes: SpeechCodes, offset: int, sounds: list[Sound]) -> Codes | DataError:
    """Ids of the codes by message; an error is a result, so that other lines go on."""
    found = {}
    for position, where, path in sounds:
        try:
            found[position] = (codes.encode(load_audio(path)) + offset).tolist()
        except AudioError as error:
            return DataError(f"{where}: {error}")
    return found


class _Journal:
    """What is done: the place in the journal of each line's codes, by the line's index.

    A line of the journal that an interruption cut short is dropped.
    """

    def __init__(self, target: Path, header: dict[str, str]):
        self.path = target.with_name(target.name + ".journal")
        self.done: dict[int, int] = {}
        self._header = json.dumps(header).encode() + b"\n"

    def __enter__(self) -> _Journal:
        self._file = self.path.open("a+b")
        self._file.seek(0)
        first = self._file.readline()
        if first.endswith(b"\n") and first != self._header:
            self._file.close()
            raise DataError(
                f"{self.path}: was begun from other data or with another model; delete it or name "
                "another output"
            )
        if first != self._header:
            self._file.truncate(0)
            self._file.write(self._header)
        self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, index: int, codes: Codes) -> None:
        self.done[index] = self._file.seek(0, os.SEEK_END)
        line = {"index": index, "codes": list(codes.items())}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def codes(self, index: int) -> Codes:
        self._file.seek(self.done[index])
        return dict(json.loads(self._file.readline())["codes"])

    def _read(self) -> None:
        place = self._file.seek(len(self._header))
        for line in self._file:
            if not line.endswith(b"\n"):
                self._file.truncate(place)
                break
            self.done[json.loads(line)["index"]] = place
            place += len(line)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
