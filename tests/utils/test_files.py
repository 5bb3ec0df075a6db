"""Files that are complete or absent, locks and journals."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kimia_infer.utils.files import Journal, locked, replacing, replacing_directory, write_text
from tests.paths import ROOT


def test_a_file_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyError), replacing(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    with replacing(path, tmp_path) as partial:
        assert partial.parent == tmp_path
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert sorted(tmp_path.rglob("*")) == [path.parent, path]


def test_errors_name_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for number, named in ((errno.ENOSPC, None), (errno.EROFS, "partial"), (errno.EPIPE, None)):
        with pytest.raises(OSError) as caught, replacing(path) as partial:
            raise OSError(number, "why", str(partial) if named else None)
        assert caught.value.filename == (None if number == errno.EPIPE else str(path))


def test_a_directory_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "run"
    (tmp_path / ".run.part").mkdir()
    (tmp_path / ".run.part" / "left behind").touch()
    with replacing_directory(path) as partial:
        (partial / "a").touch()
    with pytest.raises(KeyError), replacing_directory(path) as partial:
        (partial / "b").touch()
        raise KeyError
    assert [file.name for file in path.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_is_refused_or_waited_for(tmp_path: Path) -> None:
    entered = threading.Event()

    def wait() -> None:
        with locked(tmp_path / "lock", wait=True):
            entered.set()

    with locked(tmp_path / "lock"):
        with pytest.raises(BlockingIOError), locked(tmp_path / "lock"):
            pass
        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.1)
    thread.join(10)
    assert entered.is_set()


def test_a_journal_drops_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        place = journal.add({"text": "ä"})
        with pytest.raises(BlockingIOError), Journal(path):
            pass
    with path.open("ab") as file:
        file.write(b'{"text": "cu')
    with Journal(path) as journal:
        second = journal.add({"text": "b"})
        assert [start for start, _ in journal.lines()] == [place, second]
        assert (journal.read(place), journal.read(second)) == ({"text": "ä"}, {"text": "b"})


OWNER_PROGRAM = """
import os, signal, sys
from kimia_infer.utils.files import OwnedDirectory
owned = OwnedDirectory("[kimi]-")
(owned.path / "upload").touch()
print(owned.path, flush=True)
if sys.stdin.read() == "die":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_directory_of_a_killed_process_goes_when_the_next_is_made(tmp_path: Path) -> None:
    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", OWNER_PROGRAM],
            env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def directory(process: subprocess.Popen[str]) -> Path:
        assert process.stdout is not None
        return Path(process.stdout.readline().strip())

    with start() as living, start() as killed:
        kept, left = directory(living), directory(killed)
        killed.communicate("die")
        assert set(tmp_path.iterdir()) == {kept, left}
        with start() as last:
            assert {kept, directory(last)} == set(tmp_path.iterdir())
            assert (kept / "upload").exists()
            last.communicate("")
        living.communicate("")
    assert list(tmp_path.iterdir()) == []
