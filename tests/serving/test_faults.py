"""Faults around a running service: lost slots, killed processes, disks that are full or read-only.

Each needs a server of its own, so the tests run in full with ``--long`` alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from kimia_infer.serving.cog import probe
from tests.paths import ROOT
from tests.serving.helpers import (
    PATIENCE,
    Server,
    data_uri,
    model_environment,
    running,
    serve,
    silence,
    wait_for_line,
)
from tests.serving.web import BODY, drips, web

SHORT = {"output_type": "text", "max_new_tokens": 2}
MOUNTS = ["unshare", "--mount", "--map-root-user"]


@pytest.fixture(autouse=True)
def _only_in_full(long: bool) -> None:
    if not long:
        pytest.skip("each starts servers: --long")


def wait_for_end(pid: int) -> None:
    """Until the process has ended; it may be a child of ours that nobody has waited for."""
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{pid}/stat").exists():
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def log_of(server: Server) -> str:
    return (server.files.parent / "log").read_text()


def test_slot_that_is_lost_ends_the_service(golden: Path, tmp_path: Path) -> None:
    with serve(golden, tmp_path) as server:
        # Cog can make no directory of this name, and never gives the slot back.
        status, _ = server.request("PUT", f"/predictions/{'x' * 300}", {"input": SHORT})
        assert status == 200
        assert server.status() == "BUSY" and probe.main([server.url]) == 0
        wait_for_end(server.pid)
        assert "(UNHEALTHY); start the server again" in log_of(server)
        assert "serve: the server counts predictions" in log_of(server)


@pytest.mark.parametrize("place", ["/{}", "../../../{}"])
def test_ids_with_slashes_make_directories_elsewhere(
    golden: Path, tmp_path: Path, place: str
) -> None:
    """Cog's own, with the remedy in docs/deploy.md; if this fails, Cog has mended it."""
    target = tmp_path / uuid.uuid4().hex
    with serve(golden, tmp_path) as server:
        body = {"id": place.format(str(target)[1:]), "input": SHORT | {"text": "a"}}
        assert server.request("POST", "/predictions", body)[0] == 200
    assert {path.name for path in target.iterdir()} == {"inputs", "outputs"}


@pytest.mark.parametrize("who", ["worker", "everything"])
def test_nothing_of_a_killed_service_is_left_after_the_next_start(
    golden: Path, tmp_path: Path, who: str
) -> None:
    variables = {"KIMI_AUDIO_URLS": "any"}
    with web(drips(BODY + bytes(100_000))) as outer, serve(golden, tmp_path, **variables) as server:
        body = {"input": SHORT | {"audio": outer.url}}
        assert server.request("PUT", "/predictions/a", body, Prefer="respond-async")[0] == 202
        while not any(path.name == "audio" for path in server.left_files()):
            time.sleep(0.01)
        processes = server.processes()
        killed = processes[-1:] if who == "worker" else [server.pid, *processes]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        if who == "worker":
            wait_for_end(server.pid)
            assert "start the server again" in log_of(server)
        assert outer.left.wait(PATIENCE)
        assert any(path.name == "audio" for path in server.left_files())
    with serve(golden, tmp_path, **variables) as server:
        assert [path.name for path in server.left_files()] == [".owner"] * 2
        server.succeed(**SHORT, text="a")
    assert server.left_files() == []


@contextlib.contextmanager
def serve_mounted(golden: Path, directory: Path, mounts: str, **variables: str) -> Iterator[Server]:
    """``scripts/serve`` after ``mounts``, commands that only this server's file system sees."""
    log = directory / "log"
    environment = model_environment(golden, directory / "files") | variables
    command = f"{mounts} && exec {sys.executable} {ROOT}/scripts/serve --port 0"
    with running([*MOUNTS, "sh", "-ec", command], log, env=environment) as process:
        yield Server(wait_for_line(process, log, "Ready:"), directory / "files", process.pid)


needs_mounts = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*MOUNTS, "true"], capture_output=True).returncode != 0,
    reason="needs namespaces of mounts",
)


@needs_mounts
def test_checkout_may_be_read_only(golden: Path, tmp_path: Path) -> None:
    mounts = f"mount --bind {ROOT} {ROOT} && mount -o remount,ro,bind {ROOT}"
    with serve_mounted(golden, tmp_path, mounts) as server:
        server.succeed(**SHORT, text="a")


@needs_mounts
def test_disk_that_fills_fails_what_needs_it(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    mounts = f"mount -t tmpfs -o size=1m tmpfs {tmp_path / 'files'}"
    with serve_mounted(golden, tmp_path, mounts) as server:
        sound = data_uri(silence(60))  # 1.9 MB
        for name in ("audio", "voice"):
            inputs = {"text": "a", name: sound} | SHORT
            inputs["output_type"] = "both" if name == "voice" else "text"
            error = server.fail(**inputs)
            assert f" {name}: cannot be stored on the server (No space left on device)" in error
        server.succeed(**SHORT, audio=data_uri(silence(5)))
        server.succeed(**SHORT, text="a")


READ_ONLY = "mount -t tmpfs -o ro tmpfs"


def frozen(path: str) -> str:
    """Make a directory read-only with all that is in it, which may be this checkout."""
    return f"mount --bind {path} {path} && mount -o remount,ro,bind {path}"


@needs_mounts
@pytest.mark.parametrize(
    ("mounts", "message"),
    [
        (
            f"{frozen('/tmp')} && {frozen('/var/tmp')} && cd /proc",
            "No usable temporary directory found in ['/tmp'",
        ),
        (
            f"mkdir -p /tmp/coglet && {READ_ONLY} /tmp/coglet",
            "/tmp/coglet/predictions: cannot be written (Read-only file system); ",
        ),
    ],
    ids=["files", "server"],
)
def test_read_only_directories_fail_set_up(golden: Path, mounts: str, message: str) -> None:
    command = f"{mounts} && exec {sys.executable} {ROOT}/scripts/serve --port 0"
    done = subprocess.run(
        [*MOUNTS, "sh", "-ec", command],
        env=model_environment(golden, Path(tempfile.gettempdir())),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("serve: ") and message in last
