"""Batches: a task for every row of an input, here or on Ray, and one row of output for each.

The output is a folder of parts, files that are whole or not there. A row counts as done once it is
in a part, so the same call continues what was interrupted.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from kimia_infer.api.request import Deadline
from kimia_infer.cluster.rows import ERROR, Row, Source
from kimia_infer.cluster.store import Store, is_url, open_store
from kimia_infer.cluster.work import Work, Worker
from kimia_infer.utils.files import locked
from kimia_infer.utils.progress import progress

Form = Literal["jsonl", "parquet"]
Numbered = tuple[int, Row]
"""A row and its number in the input, from 0."""

Runner = Callable[[Work, Sequence[Numbered]], Iterator[dict[str, Any]]]
"""Finishes rows, in any order: yields what the output has of each."""

JOB = "job.json"
PART = "part-{:06d}.{}"
PART_ROWS, PART_SECONDS = 200, 10.0
"""A part is written once it has so many rows, or its first row is so old."""


class BatchError(ValueError):
    """A batch cannot be run; the message names the file or the option and the fix."""


@dataclass(frozen=True)
class Summary:
    """Rows of the output, and those of them that have an error."""

    rows: int
    errors: int


def run_batch(work: Work, source: Source, form: Form, retry: bool, run: Runner) -> Summary:
    """Do ``work`` for all rows of ``source`` that ``work.output`` does not have yet.

    With ``retry`` also for those that it has with an error. ``run`` is :func:`run_here` or one
    that does the same elsewhere.

    Raises:
        BatchError: the output belongs to another batch, another process writes it, or a column
            of Parquet would have values of several types.
    """
    store = open_store(work.output)
    with exclusive(work.output):
        parts = Parts(store, form, source)
        parts.check_job(
            {
                "task": work.task,
                "weights": work.weights,
                "adapter": work.variables.get("KIMI_AUDIO_ADAPTER"),
                "inputs": dict(work.inputs),
                "speech": work.speech,
                "form": form,
                "rows_sha256": source.digest,
            }
        )
        done = parts.read(without_errors=retry)
        left = [item for item in enumerate(source.rows) if item[1].id not in done]
        errors = sum(done.values())
        with (
            progress(work.task.capitalize(), len(source.rows), "rows", initial=len(done)) as bar,
            contextlib.closing(parts.writing()) as writer,
        ):
            next(writer)
            for row in run(work, left) if left else ():
                writer.send(row)
                errors += row[ERROR] is not None
                bar.set_postfix(errors=errors, refresh=False)
                bar.update()
        return Summary(len(source.rows), errors)


@contextlib.contextmanager
def exclusive(output: str) -> Iterator[None]:
    """Hold a local output against other processes of this machine; stores have no locks."""
    if is_url(output):
        yield
        return
    try:
        with locked(Path(output) / ".lock"):
            yield
    except BlockingIOError as error:
        raise BatchError(f"{output}: another process is writing it") from error


class Parts:
    """The rows of an output."""

    def __init__(self, store: Store, form: Form, source: Source):
        self._store, self._form = store, form
        self._schema = None if form == "jsonl" else parquet_schema(source)
        self._number = 0

    def check_job(self, job: dict[str, Any]) -> None:
        """Write down what the output is of. Raises BatchError if it is of something else."""
        content = json.dumps(job, indent=1, ensure_ascii=False).encode()
        names = self._store.files()
        if JOB not in names:
            if any(name.startswith("part-") for name in names):
                raise BatchError(f"{self._store.name}: has parts of something else; name another")
            self._store.write(JOB, content)
            return
        found = json.loads(self._store.read(JOB))
        for name, value in json.loads(content).items():
            if found.get(name) != value:
                other = "another input" if name == "rows_sha256" else f"{name} {found.get(name)!r}"
                raise BatchError(
                    f"{self._store.name}: was begun with {other}; name another output, or delete it"
                )

    def read(self, without_errors: bool) -> dict[str, bool]:
        """Ids of the rows that are there, and whether each has an error.

        Rows ``without_errors`` alone stay there, if that is asked for.
        """
        done: dict[str, bool] = {}
        for name in self._store.files():
            if not name.startswith("part-"):
                continue
            self._number = max(self._number, int(name[5:11]) + 1)
            rows = self._parse(self._store.read(name))
            kept = [row for row in rows if row[ERROR] is None] if without_errors else rows
            if len(kept) < len(rows):
                if kept:
                    self._store.write(name, self._content(kept))
                else:
                    self._store.remove(name)
            done |= {row["id"]: row[ERROR] is not None for row in kept}
        return done

    def writing(self) -> Generator[None, dict[str, Any]]:
        """Takes rows and writes them as parts; the last one when it is closed."""
        rows: list[dict[str, Any]] = []
        since = 0.0
        try:
            while True:
                rows.append((yield))
                since = since or time.monotonic()
                if len(rows) >= PART_ROWS or time.monotonic() - since > PART_SECONDS:
                    self._write(rows)
                    rows, since = [], 0.0
        finally:
            if rows:
                self._write(rows)

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        self._store.write(PART.format(self._number, self._form), self._content(rows))
        self._number += 1

    def _content(self, rows: Sequence[dict[str, Any]]) -> bytes:
        if self._form == "jsonl":
            return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        return parquet_content(rows, self._schema)

    def _parse(self, content: bytes) -> list[dict[str, Any]]:
        if self._form == "jsonl":
            return [json.loads(line) for line in content.splitlines()]
        from pyarrow import parquet

        return parquet.read_table(io.BytesIO(content)).to_pylist()


def parquet_schema(source: Source) -> Any:
    """The columns of every part, whatever its rows have. Raises BatchError if there are none."""
    import pyarrow

    names = dict.fromkeys(name for row in source.rows for name in row.fields)
    fields = []
    for name in names:
        try:
            values = pyarrow.array([row.fields.get(name) for row in source.rows])
        except pyarrow.ArrowException as error:
            raise BatchError(f"{name}: no column of Parquet ({error}); use jsonl") from error
        fields.append((name, values.type))
    text, number = pyarrow.string(), pyarrow.float64()
    segment = pyarrow.struct({"start": number, "end": number, "text": text})
    result = pyarrow.struct(
        {
            "text": text,
            "duration": number,
            "segments": pyarrow.list_(segment),
            "speech": text,
            "codes": pyarrow.list_(pyarrow.int64()),
            "notes": pyarrow.list_(text),
        }
    )
    return pyarrow.schema([("id", text), *fields, ("result", result), (ERROR, text)])


def parquet_content(rows: Sequence[dict[str, Any]], schema: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file)
    return file.getvalue()


def run_here(work: Work, rows: Iterable[Numbered]) -> Iterator[dict[str, Any]]:
    """Finish rows with a model that is loaded in this process, as many at a time as it takes."""
    worker, deadline = Worker(work), Deadline(None)
    rest = iter(rows)
    under_way: set[Future[dict[str, Any]]] = set()
    pool = ThreadPoolExecutor(worker.threads, "rows")
    try:
        while True:
            for number, row in islice(rest, 2 * worker.threads - len(under_way)):
                under_way.add(pool.submit(worker.finish, number, row, deadline))
            if not under_way:
                return
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    finally:
        deadline.cancel()
        pool.shutdown(cancel_futures=True)
