"""Speech codes of training data, computed once and stored with it.

Codes are written to a journal next to the output as they are computed, so that an interrupted
extraction continues. The output itself appears complete, in the order of the input.
"""

from __future__ import annotations

import hashlib
import json
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from kimia_infer.audio.files import AudioError, load_audio
from kimia_infer.data.conversations import ConversationFile, DataError, audio_field
from kimia_infer.models.kimi_audio.checkpoint import SPEECH_TOKENIZER_FOLDER
from kimia_infer.models.kimi_audio.components import speech_tokenizer_component
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.encoders import SpeechCodes
from kimia_infer.utils.files import Journal, write_json_lines
from kimia_infer.utils.progress import progress

JOBS_PER_WORKER = 4
"""Lines that are submitted ahead, so that no worker waits."""


@dataclass(frozen=True)
class Encoder:
    """What a process needs to compute codes; ``folder`` is that of the speech tokenizer."""

    folder: Path
    token_offset: int
    device: str


Recording = tuple[int, str, str]
"""Audio of a line: the index of its message, its field in error messages, its path."""

AudioIds = dict[int, list[int]]
"""Speech codes as ids of the language model, by index of the message."""


def extract_codes(
    source: Path, target: Path, directory: Path, audio_root: Path, device: str, workers: int
) -> tuple[int, list[dict[str, Any]]]:
    """Write the lines of ``source`` to ``target`` with the speech codes of all their audio.

    Returns the number of lines written, and line number and error of each one left out.

    Codes that a line already has are kept. Lines that cannot be used are left out and listed with
    the reason in ``target`` + ``.bad.jsonl``. Each of several ``workers`` is a process with its own
    tokenizer on ``device``.

    Raises:
        DataError: ``target`` exists, was begun from other data, or is being written by another
            process; or a worker died.
        CheckpointError: the speech tokenizer of ``directory`` cannot be used.
    """
    if target.exists():
        raise DataError(f"{target}: exists; delete it or name another file")
    file = ConversationFile(source)
    offset = LanguageModelConfig.from_directory(directory).token_offset
    encoder = Encoder(directory / SPEECH_TOKENIZER_FOLDER, offset, device)
    speech_tokenizer_component(encoder.folder)  # checked here, so that workers need not report
    header = {"sha256": _sha256(source), "model": str(directory.resolve())}
    journal = Journal(target.with_name(target.name + ".journal"))
    try:
        with journal:
            done, faults = _extract(file, journal, header, encoder, audio_root, workers)
            written = write_json_lines(target, _complete(file, journal, done))
    except BlockingIOError as error:
        raise DataError(f"{journal.path}: another process is writing it") from error
    report = target.with_name(target.name + ".bad.jsonl")
    report.unlink(missing_ok=True)
    listed = [{"line": file.line_number(i), "error": faults[i]} for i in sorted(faults)]
    if listed:
        write_json_lines(report, listed)
    journal.path.unlink()
    return written, listed


def _extract(
    file: ConversationFile,
    journal: Journal,
    header: dict[str, str],
    encoder: Encoder,
    audio_root: Path,
    workers: int,
) -> tuple[dict[int, int], dict[int, str]]:
    """Write all codes that are missing to the journal.

    Returns the places of finished lines in the journal, and the errors of the others, by index.
    """
    done = _finished(journal, header)
    faults: dict[int, str] = {}
    jobs = []
    with progress("Extracting", len(file), "lines", initial=len(done)) as bar:
        for index in range(len(file)):
            if index in done:
                continue
            try:
                jobs.append((index, _missing_codes(file, index, audio_root)))
            except DataError as error:
                faults[index] = str(error)
                bar.update()
        for index, ids in _encode_all(jobs, encoder, workers):
            if isinstance(ids, DataError):
                faults[index] = f"{file.where(index)}: {ids}"
            else:
                done[index] = journal.add({"index": index, "codes": list(ids.items())})
            bar.update()
    return done, faults


def _finished(journal: Journal, header: dict[str, str]) -> dict[int, int]:
    """The offset in the journal of each line that an earlier run finished, by its index."""
    found = [(offset, json.loads(line)) for offset, line in journal.lines()]
    if not found:
        journal.add(header)
    elif found[0][1] != header:
        raise DataError(
            f"{journal.path}: was begun from other data or with another model; delete it or name "
            "another output"
        )
    return {values["index"]: offset for offset, values in found[1:]}


def _complete(
    file: ConversationFile, journal: Journal, done: dict[int, int]
) -> Iterator[dict[str, Any]]:
    for index in sorted(done):
        values = file.raw(index)
        _drop_failed(values)
        for message, ids in journal.read(done[index])["codes"]:
            values["conversation"][message]["audio_tokens"] = ids
        yield values


def _missing_codes(file: ConversationFile, index: int, audio_root: Path) -> list[Recording]:
    """The recordings of a line whose codes have to be computed."""
    values = file.raw(index)
    _drop_failed(values)
    conversation = file.parse(index, values)
    return [
        (place, audio_field(place, message.message_type), str(audio_root / str(message.audio)))
        for place, message in enumerate(conversation.messages)
        if message.audio is not None and place not in conversation.audio_ids
    ]


def _drop_failed(values: Any) -> None:
    """Remove empty codes, with which the published extraction marks a failure."""
    if isinstance(values, dict) and isinstance(values.get("conversation"), list):
        for message in values["conversation"]:
            if isinstance(message, dict) and message.get("audio_tokens") == []:
                del message["audio_tokens"]


def _encode_all(
    jobs: list[tuple[int, list[Recording]]], encoder: Encoder, workers: int
) -> Iterator[tuple[int, AudioIds | DataError]]:
    """The ids of each job as they are computed."""
    if workers == 1:
        yield from ((index, _encode(encoder, recordings)) for index, recordings in jobs)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
    waiting: deque[tuple[int, Future[AudioIds | DataError]]] = deque()
    try:
        for index, recordings in jobs:
            waiting.append((index, pool.submit(_encode, encoder, recordings)))
            if len(waiting) >= JOBS_PER_WORKER * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        yield from ((index, future.result()) for index, future in waiting)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker died, perhaps for lack of memory; the same command with fewer --workers "
            "continues"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    torch.set_num_threads(1)


@lru_cache(maxsize=1)
def _speech_codes(encoder: Encoder) -> SpeechCodes:
    component = speech_tokenizer_component(encoder.folder)
    module = component.load(torch.device(encoder.device), torch.float32)
    codes = SpeechCodes(module, encoder.folder)
    codes.warm_up()
    return codes


def _encode(encoder: Encoder, recordings: list[Recording]) -> AudioIds | DataError:
    """The ids of recordings; an error is returned, so that other lines continue."""
    ids = {}
    for message, field, path in recordings:
        try:
            wave = load_audio(path)
        except AudioError as error:
            return DataError(f"{field}: {error}")
        codes = _speech_codes(encoder).encode(wave)
        ids[message] = (codes + encoder.token_offset).tolist()
    return ids


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
