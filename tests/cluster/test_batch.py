"""Batches without a cluster: what is read, done and written, and what a second call does."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kimia_infer.api.parameters import CODES_PER_SECOND
from kimia_infer.cluster.batch import BatchError, Numbered, Summary, run_batch, run_here
from kimia_infer.cluster.rows import Source, read_source
from kimia_infer.cluster.work import Work
from kimia_infer.utils.errors import ConfigurationError
from tests.paths import GOLDEN

AUDIO = GOLDEN / "e2e" / "audio"
CHECKPOINT = GOLDEN / "e2e" / "checkpoint"


def work_for(output: Path, task: Any = "answer", folder: Path = AUDIO, **inputs: Any) -> Work:
    return Work(task, str(CHECKPOINT), inputs, {}, str(folder), str(output), False)


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def written(output: Path) -> list[dict[str, Any]]:
    parts = sorted(output.glob("part-*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Ten rows, of which those with an odd number have an odd text."""
    rows = [{"id": f"r{n}", "text": "odd" if n % 2 else "even"} for n in range(10)]
    return read_source(str(lines(tmp_path / "in.jsonl", *rows)), "audio", ())


def echo(work: Work, rows: Sequence[Numbered]) -> Iterator[dict[str, Any]]:
    """Finishes rows, the last first; an odd text is an error."""
    for _, row in reversed(rows):
        odd = row.fields["text"] == "odd"
        yield row.finished(None, "odd") if odd else row.finished({"text": row.id}, None)


def test_each_row_has_one_row_with_a_result_or_a_reason(source: Source, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run_batch(work_for(output), source, "jsonl", False, echo) == Summary(10, 5)
    rows = {row["id"]: row for row in written(output)}
    assert len(written(output)) == 10 == len(rows)
    assert rows["r4"] == {"id": "r4", "text": "even", "result": {"text": "r4"}, "error": None}
    assert rows["r5"] == {"id": "r5", "text": "odd", "result": None, "error": "odd"}


def test_an_interrupted_batch_goes_on_where_it_was(source: Source, tmp_path: Path) -> None:
    output = tmp_path / "out"
    asked: list[str] = []

    def cut_short(work: Work, rows: Sequence[Numbered]) -> Iterator[dict[str, Any]]:
        yield from itertools.islice(echo(work, rows), 4)
        raise KeyboardInterrupt

    def noting(work: Work, rows: Sequence[Numbered]) -> Iterator[dict[str, Any]]:
        asked.extend(row.id for _, row in rows)
        return echo(work, rows)

    with pytest.raises(KeyboardInterrupt):
        run_batch(work_for(output), source, "jsonl", False, cut_short)
    assert [row["id"] for row in written(output)] == ["r9", "r8", "r7", "r6"]
    assert run_batch(work_for(output), source, "jsonl", False, noting) == Summary(10, 5)
    assert asked == ["r0", "r1", "r2", "r3", "r4", "r5"]
    assert run_batch(work_for(output), source, "jsonl", False, noting) == Summary(10, 5)
    assert len(asked) == 6 and len(written(output)) == 10


def test_retry_does_the_rows_with_errors_again(source: Source, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_batch(work_for(output), source, "jsonl", False, echo)

    def good(work: Work, rows: Sequence[Numbered]) -> Iterator[dict[str, Any]]:
        return (row.finished({"text": "again"}, None) for _, row in rows)

    assert run_batch(work_for(output), source, "jsonl", True, good) == Summary(10, 0)
    again = [row["id"] for row in written(output) if row["result"]["text"] == "again"]
    assert sorted(again) == ["r1", "r3", "r5", "r7", "r9"] and len(written(output)) == 10


def test_an_output_belongs_to_one_batch(source: Source, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run_batch(work_for(output), source, "jsonl", False, echo)
    with pytest.raises(BatchError, match=r"begun with inputs \{\}; name another output"):
        run_batch(work_for(output, seed=1), source, "jsonl", False, echo)
    fewer = Source(source.folder, source.rows[1:])
    with pytest.raises(BatchError, match="begun with adapter None"):
        adapted = replace(work_for(output), variables={"KIMI_AUDIO_ADAPTER": "/a"})
        run_batch(adapted, source, "jsonl", False, echo)
    with pytest.raises(BatchError, match="begun with another input"):
        run_batch(work_for(output), fewer, "jsonl", False, echo)


def test_parquet_and_urls(source: Source, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    output = tmp_path / "out"
    work = Work("answer", "w", {}, {}, source.folder, f"file://{output}", False)
    assert run_batch(work, source, "parquet", False, echo) == Summary(10, 5)
    table = parquet.read_table(output / "part-000000.parquet")
    assert table.num_rows == 10 and table.schema.field("error").type == "string"
    plain = table.drop_columns(["result", "error"])
    parquet.write_table(plain, tmp_path / "in.parquet")
    again = read_source(f"file://{tmp_path}/in.parquet", "audio", ())
    assert {row.id: row.fields for row in again.rows} == {r.id: r.fields for r in source.rows}
    assert run_batch(work, source, "parquet", False, echo) == Summary(10, 5)


def test_a_part_of_parquet_has_the_fields_of_all_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "odd"}, {"text": "even", "speaker": "anna"}]
    found = read_source(str(lines(tmp_path / "in.jsonl", *rows)), "audio", ())
    run_batch(work_for(tmp_path / "out"), found, "parquet", False, echo)
    table = parquet.read_table(tmp_path / "out" / "part-000000.parquet")
    assert table["speaker"].to_pylist() == ["anna", None]
    mixed = read_source(str(lines(tmp_path / "in.jsonl", {"a": 1}, {"a": "b"})), "audio", ())
    with pytest.raises(BatchError, match="a: no column of Parquet"):
        run_batch(work_for(tmp_path / "other"), mixed, "parquet", False, echo)


def test_rows_are_called_by_id_or_number(tmp_path: Path) -> None:
    path = lines(tmp_path / "in.jsonl", {"text": "a"}, {"id": "b", "text": "b"})
    found = read_source(str(path), "audio", ())
    assert [row.id for row in found.rows] == ["1", "b"] and found.folder == str(tmp_path)


def test_a_directory_has_a_row_for_each_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.wav", "deep/a.WAV", "notes.txt"):
        (tmp_path / name).write_text("hello")
    found = read_source(str(tmp_path), "audio", [".wav"])
    assert [(row.id, row.fields) for row in found.rows] == [
        ("b.wav", {"audio": "b.wav"}),
        ("deep/a.WAV", {"audio": "deep/a.WAV"}),
    ]
    [text] = read_source(str(tmp_path), "text", [".txt"]).rows
    assert text.fields == {"text": "hello"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("{\n", "line 1: not valid JSON"),
        ("[1]\n", "row 1: expected an object"),
        ('{"result": 1}\n', "row 1: result: a batch adds this field; rename yours"),
        ('{"id": 1}\n{"id": "1"}\n', "id: '1' is that of several rows"),
        ('{"text": "\\ud800"}\n', "'1': not all of it is Unicode"),
    ],
)
def test_inputs_that_cannot_be_read_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=message) as error:
        read_source(str(path), "audio", ())
    assert str(error.value).startswith(str(path))


def test_codes_of_recordings_and_the_reason_for_bad_ones(tmp_path: Path) -> None:
    rows = [{"audio": "station.wav"}, {"audio": "missing.wav"}, {"text": "no audio"}]
    found = read_source(str(lines(tmp_path / "in.jsonl", *rows)), "audio", ())
    output = tmp_path / "out"
    assert run_batch(work_for(output, "codes"), found, "jsonl", False, run_here) == Summary(3, 2)
    by_id = {row["id"]: row for row in written(output)}
    result = by_id["1"]["result"]
    assert len(result["codes"]) == math.ceil(result["duration"] * CODES_PER_SECOND)
    assert "missing.wav" in by_id["2"]["error"]
    assert by_id["3"]["error"] == "audio: nothing to encode; give a recording"


def test_a_url_that_nothing_reads_is_an_error_of_its_row(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = [{"audio": "gopher://host/a.wav"}, {"audio": "station.wav"}]
    found = read_source(str(lines(tmp_path / "in.jsonl", *rows)), "audio", ())
    output = tmp_path / "out"
    assert run_batch(work_for(output, "codes"), found, "jsonl", False, run_here) == Summary(2, 1)
    [error] = [row["error"] for row in written(output) if row["id"] == "1"]
    assert error.startswith("audio: gopher://host: ")


def test_inputs_that_a_task_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="speeker: no input of speak; did you mean"):
        work_for(tmp_path, "speak", speeker="kokoro:af_heart")
