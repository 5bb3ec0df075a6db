"""A batch on workers of Ray Data, of which one is killed, and before that the whole batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.paths import GOLDEN, ROOT
from tests.ray_environment import RAY
from tests.serving.helpers import PATIENCE, Server, running, silence

FILES, BAD = 500, 10


def wait_for(process: subprocess.Popen, log: Path, what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers(driver: Server) -> list[int]:
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in driver.processes()}
    return [pid for pid, title in titles.items() if b"BlockWorker" in title]


def test_every_file_has_one_row_whoever_dies(long: bool, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    if not long:
        pytest.skip("takes minutes: scripts/test --long")
    recordings, output, log = tmp_path / "recordings", tmp_path / "codes", tmp_path / "log"
    recordings.mkdir()
    for number in range(FILES):
        content = b"no sound" if number % (FILES // BAD) == 7 else silence(0.4)
        (recordings / f"{number}.wav").write_bytes(content)
    weights = GOLDEN / "e2e" / "checkpoint"
    command = [sys.executable, str(ROOT / "scripts" / "batch"), "codes", str(recordings)]
    command += [str(output), "--ray", "--workers", "2", "--weights", str(weights)]
    command += ["--device", "cpu"]
    environment = os.environ | RAY
    with running(command, log, env=environment) as process:
        driver = Server("", tmp_path, process.pid)
        wait_for(process, log, (output / "part-000000.jsonl").exists)
        driver.kill()
    with running(command, log, env=environment) as process:
        driver = Server("", tmp_path, process.pid)
        wait_for(process, log, lambda: bool(workers(driver)))
        os.kill(workers(driver)[0], signal.SIGKILL)
        assert process.wait(PATIENCE) == 1, log.read_text()[-4000:]
        driver.kill()
    assert f"{FILES} rows, {BAD} with errors" in log.read_text()
    parts = sorted(output.glob("part-*"))
    rows = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    assert Counter(row["id"] for row in rows) == Counter(f"{n}.wav" for n in range(FILES))
    bad = [row for row in rows if row["error"] is not None]
    assert len(bad) == BAD and all("not readable as sound" in row["error"] for row in bad)
    assert all(len(row["result"]["codes"]) == 5 for row in rows if row["error"] is None)
