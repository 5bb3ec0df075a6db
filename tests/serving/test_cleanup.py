"""What is removed of the files and the memory of earlier requests."""

from __future__ import annotations

import gc
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from kimia_infer.serving.cog.cleanup import (
    DIRECTORY_SECONDS,
    FILE_SECONDS,
    is_only_server,
    require_server_directory,
    sweep_predictions,
)
from kimia_infer.serving.process import Uploads, run_periodically, trim_heap
from kimia_infer.utils.errors import ConfigurationError, RequestCancelled
from kimia_infer.utils.files import OWNER
from tests.paths import ROOT
from tests.serving.helpers import PATIENCE


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


def test_files_of_predictions_go_when_they_are_old(tmp_path: Path) -> None:
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
    sweep_predictions(tmp_path)
    assert (fresh / "outputs").is_dir() and (fresh / "inputs").is_dir()
    assert (read / "outputs").is_dir() and not any((read / "outputs").iterdir())
    assert (unread / "outputs" / "spill_1.json").exists()
    assert not ended.exists()
    assert (foreign / "outputs" / "mine.txt").exists()
    assert (outside / "outputs" / "spill_1.json").exists()
    sweep_predictions(tmp_path / "missing")
    sweep_predictions(tmp_path, 0.0, 0.0)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"foreign", "link", "file"}


def test_other_servers_of_the_machine_are_seen(tmp_path: Path) -> None:
    """A worker is a child of its server, and other servers have its name."""
    program = tmp_path / "cog.server.http"
    program.write_text(
        "import sys, subprocess; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    )
    code = "from kimia_infer.serving.cog.cleanup import is_only_server; print(is_only_server())"
    start = [sys.executable, str(program)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def worker() -> str:
        done = subprocess.run([*start, code], env=environment, capture_output=True, text=True)
        return done.stdout.strip()

    sleeping = [*start, "import time; time.sleep(60)"]
    with subprocess.Popen(sleeping, start_new_session=True) as other:
        assert worker() == "False" and not is_only_server()
        os.killpg(other.pid, signal.SIGKILL)
    assert worker() in ("True", "False")  # other tests run servers, too


def test_files_of_a_request_go_with_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    uploads = Uploads()
    assert uploads.directory.parent == tmp_path
    with uploads.folder() as other:
        (other / "audio").touch()
        with pytest.raises(RequestCancelled), uploads.folder() as request:
            assert not any(request.iterdir())
            (request / "audio").touch()
            raise RequestCancelled("by its caller")
        assert not request.exists() and (other / "audio").exists()
    assert {path.name for path in uploads.directory.iterdir()} == {OWNER}
    shutil.rmtree(uploads.directory)
    uploads.keep()
    assert tempfile.mkstemp()[1].startswith(str(uploads.directory))
    del uploads
    assert tempfile.tempdir == str(tmp_path) and not any(tmp_path.iterdir())


def test_directories_that_cannot_be_written_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "file" / "below"
    missing.parent.touch()
    with pytest.raises(ConfigurationError, match=rf"{missing}: cannot be written \(Not a dir"):
        require_server_directory(missing)
    monkeypatch.setattr(tempfile, "tempdir", str(missing))
    with pytest.raises(ConfigurationError, match=rf"{missing}: uploads cannot be stored"):
        Uploads()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # as Python does for a wrong TMPDIR
    monkeypatch.setenv("TMPDIR", str(missing))
    with pytest.raises(ConfigurationError, match=rf"{missing}: uploads cannot be stored"):
        Uploads()
    require_server_directory(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_tasks_are_repeated_even_after_errors() -> None:
    done, calls = threading.Event(), []

    def failing() -> None:
        calls.append("failing")
        raise PermissionError("not yours")

    def working() -> None:
        calls.append("working")
        if len(calls) > 6:
            done.set()
            threading.Event().wait()  # the thread is a daemon, and ends with the process

    run_periodically([failing, working], 0.01)
    assert done.wait(PATIENCE)
    assert calls == ["failing", "working"] * 4


GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap is trimmed")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@GLIBC
def test_free_pages_leave_the_heap() -> None:
    # Of a size that comes from the heap; every 16th block stays, so that nothing is at its end.
    blocks = [b"\1" * 65_536 for _ in range(1600)]
    kept = blocks[15::16]
    del blocks
    gc.collect()
    before = resident()
    trim_heap()
    assert before - resident() > 50 << 20
    assert len(kept) == 100


@GLIBC
def test_little_stays_at_the_end_of_what_a_thread_uses() -> None:
    trim_heap()
    before, freed, ended = resident(), threading.Event(), threading.Event()

    def use() -> None:
        bytearray(30 << 20)  # glibc would now keep up to 60 MiB
        blocks = [b"\1" * (1 << 20) for _ in range(50)]
        blocks.clear()
        freed.set()
        ended.wait()

    thread = threading.Thread(target=use)
    thread.start()
    assert freed.wait(PATIENCE)
    trim_heap()
    left = resident() - before
    ended.set()
    thread.join()
    assert left < 24 << 20
