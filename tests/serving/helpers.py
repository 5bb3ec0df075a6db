"""The real Cog server around predict.py: how to start it, talk to it and read its answers."""

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

from kimia_infer.serving.client import parse_events
from kimia_infer.serving.cog.schema import install_schema
from tests.paths import GOLDEN, ROOT

PATIENCE = 120
"""Seconds to wait for anything; only a broken server ever takes them."""

AUDIO = GOLDEN / "e2e" / "audio"
ADMITTED = 24
"""Predictions that the servers of the tests with many clients take at a time."""

CASES = [
    case
    for case in json.loads((GOLDEN / "e2e" / "cases.json").read_text())["cases"]
    if not case.get("draws") and len(case["codes"]) <= 1
]
"""The recorded chats that a server can be asked for: greedy ones, with one speech code at most."""

REFUSAL = "At capacity - all prediction slots busy"
"""Cog's error where it takes no more predictions."""

COG_PREFIX = "Prediction failed: Async prediction failed: "
"""What Cog puts before every error of a predictor that does not stream."""

GREEDY = {"audio_temperature": 0.0, "audio_top_k": 5}


def data_uri(content: bytes, kind: str = "audio/wav") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


SOUNDS = [
    data_uri((AUDIO / name).read_bytes()) for name in ("station.wav", "train.wav", "stereo24k.wav")
]


LIMIT = 2.0
"""Seconds that a prediction of the limited server may take."""


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
        """Temporary files that exist at the moment, besides the schema."""
        found = (path for path in self.files.rglob("*") if ".cog" not in path.parts)
        return sorted(path for path in found if path.is_file())

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

    def kill(self) -> None:
        """End it at once, without the seconds in which it would free its model."""
        for pid in [self.pid, *self.processes()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

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
            yield parse_events(response)
        finally:
            response.close()
            connection.close()


def silence(seconds: float) -> bytes:
    """A wav file of zeros, at 16 kHz."""
    return wav(bytes(2 * int(seconds * 16_000)))


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
        # One at a time, so that READY says that a prediction and its files are gone.
        "COG_MAX_CONCURRENCY": "1",
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
    **variables: str,
) -> Iterator[Server]:
    """The server itself, in a directory of its own, with any predictor.

    ``schema_of`` names the predictor of predict.py whose schema file it gets; None for none.
    """
    if schema_of is not None:
        install_schema(schema_of, directory)
    port = free_port()
    environment = model_environment(golden, directory / "files") | {
        "COG_PREDICT_TYPE_STUB": reference,
        "PORT": str(port),
        "PYTHONPATH": str(ROOT),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        **variables,
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


def recorded(name: str) -> str:
    return data_uri((AUDIO / name).read_bytes())


def inputs_of(case: dict) -> dict:
    """A recorded chat as inputs: its last message as the turn, the others as history."""
    files: list[str] = []

    def numbered(name: str) -> int:
        files.append(recorded(name))
        return len(files) - 1

    history = []
    for message in case["messages"][:-1]:
        content = message["content"]
        if message["message_type"] == "audio":
            content = numbered(content)
        elif message["message_type"] == "audio-text":
            content = [numbered(content[0]), content[1]]
        history.append({**message, "content": content})
    last = case["messages"][-1]
    is_audio = last["message_type"] == "audio"
    turn = {"audio": recorded(last["content"])} if is_audio else {"text": last["content"]}
    chat = {"history": json.dumps(history), "history_audio": files} if history else {}
    return {**GREEDY, **case["arguments"], **turn, **chat}


def read_wav(uri: str) -> tuple[int, int, int]:
    """Channels, rate and frames of the wav file in a data URI."""
    with wave.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as reader:
        return reader.getnchannels(), reader.getframerate(), reader.getnframes()


def recorded_waves() -> list[bytes]:
    """Samples of the recorded files that are mono at 16 kHz with 16 bits."""
    found = []
    for path in sorted(AUDIO.glob("*.wav")):
        with wave.open(str(path)) as reader:
            if reader.getparams()[:3] == (1, 2, 16_000):
                found.append(reader.readframes(reader.getnframes()))
    return found


def wav(samples: bytes) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(16_000)
        writer.writeframes(samples)
    return file.getvalue()


def samples(uri: str) -> bytes:
    """What a wav file in a data URI holds, which must be mono, 16 bit, 24 kHz."""
    assert uri.startswith("data:audio/wav;base64,")
    with wave.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as reader:
        form = (reader.getnchannels(), reader.getsampwidth(), reader.getframerate())
        assert form == (1, 2, 24_000) and reader.getnframes() > 0
        return reader.readframes(reader.getnframes())


def joined(chunks: list[dict[str, Any]]) -> tuple[str, bytes]:
    """Text and samples of all pieces."""
    return (
        "".join(chunk["text"] or "" for chunk in chunks),
        b"".join(samples(chunk["audio"]) for chunk in chunks if chunk["audio"] is not None),
    )


def whole(server: Server, **inputs: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All pieces of a streamed answer, and its final state."""
    with server.stream(**inputs) as events:
        received = list(events)
    assert received[0][0] == "start" and received[-1][0] == "completed"
    outputs = [data for name, data in received if name == "output"]
    assert [data["index"] for data in outputs] == list(range(len(outputs)))
    return [data["chunk"] for data in outputs], received[-1][1]


def stored(server: Server) -> list[str]:
    """Files of requests that lie on the server's disk, in whichever folder."""
    return [str(path) for path in server.left_files() if path.name != ".owner"]
