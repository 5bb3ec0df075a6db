"""The real Cog server around predict.py, started once, and how to talk to it."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE = 120
"""Seconds to wait for anything; only a broken server ever takes them."""


@dataclasses.dataclass
class Server:
    """A running server; ``files`` is its temporary directory."""

    url: str
    files: Path

    def request(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, Any]]:
        """Status and decoded JSON of one request."""
        data = None if body is None else json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json", **headers}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")

    def predict(self, **inputs: Any) -> dict[str, Any]:
        """The answer to a prediction that the server accepts."""
        self.wait_for("READY")
        status, answer = self.request("POST", "/predictions", {"input": inputs})
        assert status == 200, answer
        return answer

    def succeed(self, **inputs: Any) -> dict[str, Any]:
        answer = self.predict(**inputs)
        assert answer["status"] == "succeeded", answer.get("error")
        return answer

    def fail(self, **inputs: Any) -> str:
        """The error of a prediction that fails; the server must be ready again after it."""
        answer = self.predict(**inputs)
        assert answer["status"] == "failed", answer
        assert answer.get("output") is None
        self.wait_for("READY")
        return answer["error"]

    def status(self) -> str:
        return self.request("GET", "/health-check")[1]["status"]

    def wait_for(self, *statuses: str) -> None:
        """Poll the health check: the one slot is free only a moment after an answer."""
        deadline = time.monotonic() + PATIENCE
        while self.status() not in statuses:
            assert time.monotonic() < deadline, f"{self.status()}, expected {statuses}"
            time.sleep(0.01)

    def outputs(self) -> list[Path]:
        """Directories of output files that exist at the moment."""
        return sorted(self.files.glob("kimi-audio-*"))


def data_uri(content: bytes, kind: str = "audio/wav") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def silence(seconds: float, rate: int = 16_000) -> bytes:
    """A wav file of zeros."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(bytes(2 * int(seconds * rate)))
    return buffer.getvalue()


def model_environment(golden: Path, files: Path) -> dict[str, str]:
    """The environment in which the recorded answers were made, with its own temp directory."""
    files.mkdir(exist_ok=True)
    return {
        **os.environ,
        "KIMI_AUDIO_WEIGHTS": str((golden / "e2e" / "checkpoint").resolve()),
        "KIMI_AUDIO_DEVICE": "cpu",
        "KIMI_AUDIO_DTYPE": "float32",
        "KIMI_AUDIO_HEAD_ROWS": "full",
        "TMPDIR": str(files),
    }


@contextlib.contextmanager
def running(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen]:
    """A process in a session of its own, all of which is killed at the end."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for_line(process: subprocess.Popen, log: Path, start: str) -> str:
    """The rest of the first line of ``log`` that begins with ``start``."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            if line.startswith(start):
                return line.removeprefix(start).strip()
        time.sleep(0.05)
    pytest.fail(f"no line {start!r}:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def server(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``scripts/serve`` with the recorded checkpoint."""
    directory = tmp_path_factory.mktemp("server")
    log, files = directory / "log", directory / "files"
    command = [sys.executable, str(ROOT / "scripts" / "serve"), "--port", "0"]
    with running(command, log, env=model_environment(golden, files)) as process:
        yield Server(wait_for_line(process, log, "Ready:"), files)
