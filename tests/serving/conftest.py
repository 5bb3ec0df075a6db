"""The real Cog server around predict.py, started once, and how to talk to it."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import io
import json
import os
import signal
import socket
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

from kimia_infer.serving.cog.interface import read_interface
from kimia_infer.serving.cog.schema import write_schema
from tests.paths import ROOT

PATIENCE = 120
"""Seconds to wait for anything; only a broken server ever takes them."""


@dataclasses.dataclass
class Server:
    """A running server; ``files`` is its temporary directory, ``pid`` the process started."""

    url: str
    files: Path
    pid: int

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

    def left_files(self) -> list[Path]:
        """Temporary files that exist at the moment."""
        return sorted(path for path in self.files.rglob("*") if path.is_file())

    def processes(self) -> list[int]:
        """The server and its worker: what is below the process that was started, in order."""
        parents = {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            # A process may end while the others are read.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = status.read_text().rpartition(")")[2].split()
                parents[int(status.parent.name)] = int(fields[1])
        found = [self.pid]
        for pid in found:
            found += sorted(child for child, parent in parents.items() if parent == pid)
        return found[1:]

    @contextlib.contextmanager
    def stream(self, **inputs: Any) -> Iterator[Iterator[tuple[str, dict[str, Any]]]]:
        """Server-sent events (name, data) of a prediction; leaving hangs up on the server."""
        self.wait_for("READY")
        connection = http.client.HTTPConnection(self.url.partition("//")[2], timeout=PATIENCE)
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        connection.request("POST", "/predictions", json.dumps({"input": inputs}), headers)
        response = connection.getresponse()
        try:
            assert response.status == 200, response.read()
            assert response.headers.get_content_type() == "text/event-stream"
            yield self._events(response)
        finally:
            response.close()
            connection.close()

    @staticmethod
    def _events(response: http.client.HTTPResponse) -> Iterator[tuple[str, dict[str, Any]]]:
        name = ""
        for line in response:
            if line.startswith(b"event: "):
                name = line[7:].decode().strip()
            elif line.startswith(b"data: "):
                yield name, json.loads(line[6:])


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
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Shells have what they run in the background ignore interrupts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **options,
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


@contextlib.contextmanager
def serve(golden: Path, directory: Path, *arguments: str, **variables: str) -> Iterator[Server]:
    """``scripts/serve`` with the recorded checkpoint."""
    log, files = directory / "log", directory / "files"
    command = [sys.executable, str(ROOT / "scripts" / "serve"), "--port", "0", *arguments]
    environment = model_environment(golden, files) | variables
    with running(command, log, env=environment) as process:
        yield Server(wait_for_line(process, log, "Ready:"), files, process.pid)


@contextlib.contextmanager
def serve_bare(
    golden: Path,
    directory: Path,
    reference: str = f"{ROOT / 'predict.py'}:Predictor",
    schema_of: str | None = None,
    until: str = "READY",
) -> Iterator[Server]:
    """The server itself, in a directory of its own, with any predictor.

    ``schema_of`` names the predictor of predict.py whose schema file it gets; None for none.
    """
    if schema_of is not None:
        write_schema(read_interface(ROOT / "predict.py", schema_of), directory)
    port = free_port()
    environment = model_environment(golden, directory / "files") | {
        "COG_PREDICT_TYPE_STUB": reference,
        "PORT": str(port),
        "PYTHONPATH": str(ROOT),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    command = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"]
    with running(command, directory / "log", env=environment, cwd=directory) as process:
        bare = Server(f"http://127.0.0.1:{port}", directory / "files", process.pid)
        while True:
            assert process.poll() is None, (directory / "log").read_text()
            try:
                bare.wait_for(until)
                break
            except OSError:
                continue
        yield bare


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def server(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(golden, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="session")
def streaming_server(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(golden, tmp_path_factory.mktemp("streaming"), "--stream") as server:
        yield server


@pytest.fixture(scope="session")
def long_inputs(server: Server) -> dict[str, Any]:
    """A request that is answered with at least 10 s of speech."""
    inputs = {"text": "Tell me a story.", "audio_temperature": 2.0, "audio_top_k": 0}
    inputs["max_new_tokens"] = 200
    for seed in range(100):
        answer = server.succeed(**inputs, seed=seed)
        if answer["metrics"]["speech_codes"] >= 125:
            return inputs | {"seed": seed}
    pytest.fail("the recorded checkpoint never speaks for 10 s")
