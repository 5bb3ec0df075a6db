"""Files and memory that requests leave behind."""

from __future__ import annotations

import gc
import os
import platform
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest

from kimia_infer.serving.cog import leftovers
from kimia_infer.serving.cog.leftovers import (
    DIRECTORY_SECONDS,
    FILE_SECONDS,
    Uploads,
    keep_clean,
    sweep,
    trim_heap,
)
from tests.serving.conftest import PATIENCE, Server


def prediction(directory: Path, name: str, age: float, spill: float | None) -> Path:
    """What the server leaves of a prediction that began ``age`` seconds ago."""
    for folder in ("inputs", "outputs"):
        (directory / name / folder).mkdir(parents=True)
    now = time.time()
    if spill is not None:
        file = directory / name / "outputs" / "spill_1.json"
        file.write_text("{}")
        os.utime(file, (now - spill, now - spill))
    os.utime(directory / name, (now - age, now - age))
    return directory / name


def test_leftovers_go_when_they_are_old(tmp_path: Path) -> None:
    old, file_age = DIRECTORY_SECONDS + 9, FILE_SECONDS + 9
    fresh = prediction(tmp_path, "fresh", 1, None)
    read = prediction(tmp_path, "read", file_age, file_age)
    unread = prediction(tmp_path, "unread", old, 1)
    ended = prediction(tmp_path, "ended", old, old)
    foreign = prediction(tmp_path, "foreign", old, None)
    (foreign / "outputs" / "mine.txt").touch()
    outside = prediction(tmp_path.parent / f"{tmp_path.name}-outside", "other", old, old)
    (tmp_path / "link").symlink_to(outside)
    (tmp_path / "file").touch()
    sweep(tmp_path)
    assert (fresh / "outputs").is_dir() and (fresh / "inputs").is_dir()
    assert (read / "outputs").is_dir() and not any((read / "outputs").iterdir())
    assert (unread / "outputs" / "spill_1.json").exists()
    assert not ended.exists()
    assert (foreign / "outputs" / "mine.txt").exists()
    assert (outside / "outputs" / "spill_1.json").exists()
    sweep(tmp_path / "missing")


def test_upload_of_a_canceled_prediction_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    uploads = Uploads()
    assert uploads.directory.parent == tmp_path
    left, used, listed = (Path(tempfile.mkstemp()[1]) for _ in range(3))
    folder = Path(tempfile.mkdtemp())
    beside = tmp_path / "tmp-of-others"
    beside.touch()
    uploads.sweep([None, "text", 1.5, used, [listed]])
    assert set(uploads.directory.iterdir()) == {used, listed, folder}
    assert left.parent == uploads.directory and beside.exists()
    shutil.rmtree(uploads.directory)
    uploads.keep()
    assert tempfile.mkstemp()[1].startswith(str(uploads.directory))


def test_server_removes_what_a_canceled_prediction_left(server: Server) -> None:
    server.wait_for("READY")
    (directory,) = server.files.glob("kimi-audio-*")
    left = directory / "upload"
    left.touch()
    assert server.succeed(text="a", output_type="text", max_new_tokens=2)
    assert not left.exists()


def test_thread_looks_after_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again, also after a directory that cannot be read."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done, trimmed = threading.Event(), threading.Event()
    calls: list[Path] = []

    def swept(directory: Path) -> None:
        calls.append(directory)
        if len(calls) == 1:
            raise PermissionError("not yours")
        if len(calls) > 3:
            done.set()
            threading.Event().wait()  # the thread is a daemon, and ends with the process

    monkeypatch.setattr(leftovers, "sweep", swept)
    monkeypatch.setattr(leftovers, "trim_heap", trimmed.set)
    uploads = Uploads()
    shutil.rmtree(uploads.directory)
    keep_clean(uploads, tmp_path / "server", every=0.01)
    assert done.wait(PATIENCE) and trimmed.is_set()
    assert calls == [tmp_path / "server"] * 4
    assert uploads.directory.is_dir()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is trimmed")
def test_free_pages_leave_the_heap() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    # Of a size that comes from the heap; every 16th block stays, so that nothing is at its end.
    blocks = [b"\1" * 65_536 for _ in range(1600)]
    kept = blocks[15::16]
    del blocks
    gc.collect()
    before = resident()
    trim_heap()
    assert before - resident() > 50 << 20
    assert len(kept) == 100
