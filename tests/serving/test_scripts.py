"""The command lines as a user runs them: scripts/serve and scripts/infer."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import wave
from pathlib import Path

import pytest

from tests.command_line import run_here
from tests.paths import ROOT
from tests.serving.helpers import (
    PATIENCE,
    Server,
    model_environment,
    running,
    silence,
    wait_for_line,
)

SERVE = [sys.executable, str(ROOT / "scripts" / "serve")]
INFER = [sys.executable, str(ROOT / "scripts" / "infer")]
OUTPUT = {"audio": "data:audio/wav;base64," + base64.b64encode(b"RIFF").decode(), "text": "At ten."}


def run(command: list, *arguments, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """A finished script; variables of the model are only those given."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("KIMI_", "COG_"))}
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def shortest_sound(golden: Path) -> Path:
    return min((golden / "e2e" / "audio").resolve().iterdir(), key=lambda path: path.stat().st_size)


@pytest.fixture
def history(golden: Path, tmp_path: Path) -> Path:
    """A history file in a directory of its own, with its sounds beside it."""
    folder = tmp_path / "chat"
    folder.mkdir()
    for name in ("question.wav", "reply.wav"):
        (folder / name).write_bytes(shortest_sound(golden).read_bytes())
    messages = [
        {"role": "user", "message_type": "audio", "content": "question.wav"},
        {"role": "assistant", "message_type": "audio-text", "content": ["reply.wav", "At ten."]},
    ]
    (folder / "chat.json").write_text(json.dumps(messages))
    return folder / "chat.json"


def test_server_and_infer_alone_agree(
    server: Server,
    golden: Path,
    history: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One request, answered by the served model and by the command itself."""
    arguments = ["--history", history, "--audio", shortest_sound(golden), "--text", "Hi"]
    arguments += ["--max-new-tokens", 9, "--seed", 5, "--audio-temperature", 0, "--metrics"]
    remote = run(INFER, "--url", server.url, *arguments, "--output", "remote.wav", cwd=tmp_path)
    assert remote.returncode == 0, remote.stderr
    assert "speech: remote.wav" in remote.stderr and "seed: 5" in remote.stderr
    monkeypatch.chdir(tmp_path)
    arguments += ["--weights", os.path.relpath(golden / "e2e" / "checkpoint", tmp_path)]
    arguments += ["--device", "cpu", "--dtype", "float32", "--output", "local.wav"]
    assert run_here("infer", *arguments) == 0
    local = capsys.readouterr()
    assert "Loading weights" in local.err and "Generating" in local.err
    answers = []
    for name in ("remote.wav", "local.wav"):
        with wave.open(str(tmp_path / name)) as reader:
            answers.append((reader.getframerate(), reader.getnframes()))
    assert answers[0] == answers[1] and answers[0][1] > 0
    assert local.out == remote.stdout


def test_streamed_answer_is_printed_played_and_saved(
    streaming_server: Server, long_inputs: dict, tmp_path: Path
) -> None:
    player = tmp_path / "ffplay"
    player.write_text(f"#!/bin/sh\ncat > {tmp_path}/heard\n")
    player.chmod(0o755)
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in long_inputs.items()]
    done = run(
        INFER,
        *("--url", streaming_server.url, "--stream", "--play", "--output", "reply.wav"),
        *arguments,
        cwd=tmp_path,
        PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    )
    assert done.returncode == 0, done.stderr
    assert "first speech after" in done.stderr and "speech: reply.wav" in done.stderr
    with wave.open(str(tmp_path / "reply.wav")) as reader:
        assert reader.readframes(reader.getnframes()) == (tmp_path / "heard").read_bytes()
    state = streaming_server.succeed(**long_inputs)
    expected = "".join(chunk["text"] or "" for chunk in state["output"])
    # Reading as text turns every kind of line end into one.
    assert done.stdout.split() == expected.split()


def test_interrupted_stream_frees_the_server(
    streaming_server: Server, long_inputs: dict, tmp_path: Path
) -> None:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in long_inputs.items()]
    command = [*INFER, "--url", streaming_server.url, "--stream", *arguments]
    log = tmp_path / "log"
    streaming_server.wait_for("READY")
    with running(command, log, cwd=tmp_path) as process:
        streaming_server.wait_for("BUSY")
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
    streaming_server.wait_for("READY")
    assert log.read_text().splitlines()[-1].endswith("infer: interrupted")
    assert not (tmp_path / "answer.wav").exists()


def test_stream_of_a_plain_server_is_refused(server: Server, tmp_path: Path) -> None:
    done = run(INFER, "--url", server.url, "--stream", "--text", "Hi", cwd=tmp_path)
    assert done.returncode == 1 and "HTTP 406" in done.stderr


def test_recording_is_transcribed(
    server: Server, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--task", "transcribe", "--audio", shortest_sound(golden), "--seed", 1]
    arguments += ["--max-new-tokens", 6, "--metrics"]
    remote = run(INFER, "--url", server.url, *arguments, cwd=tmp_path)
    weights = str((golden / "e2e" / "checkpoint").resolve())
    arguments += ["--device", "cpu", "--quantization", "int8"]
    assert run_here("infer", "--weights", weights, *arguments) == remote.returncode == 0
    local = capsys.readouterr().err
    assert "segments: 1" in local and "segments: 1" in remote.stderr
    assert "quantization: int8" in local and "quantization: none" in remote.stderr


def test_infer_tells_what_the_server_refuses(server: Server, golden: Path, tmp_path: Path) -> None:
    done = run(INFER, "--url", server.url, "--text", "Hi", "--seed", -1, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "HTTP 422: seed:" in done.stderr
    (tmp_path / "noise.wav").write_bytes(b"no sound")
    done = run(INFER, "--url", server.url, "--audio", "noise.wav", cwd=tmp_path)
    assert done.returncode == 1 and "ended as failed" in done.stderr
    assert not (tmp_path / "answer.wav").exists()


@pytest.mark.parametrize("document", [OUTPUT, {"status": "succeeded", "output": OUTPUT}], ids=str)
def test_saved_answer_becomes_transcript_and_wav(document: dict, tmp_path: Path) -> None:
    (tmp_path / "saved.json").write_text(json.dumps(document))
    done = run(INFER, "--answer", "saved.json", "--output", "reply.wav", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "At ten.\n")
    assert (tmp_path / "reply.wav").read_bytes() == b"RIFF"
    done = run(INFER, "--answer", "saved.json", "--output", "/dev/full", "--metrics", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "At ten.\n")
    assert "--output: /dev/full cannot be written (No space left" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "nothing to answer"),
        (["--text", "Hi", "--url", "http://x", "--weights", "w"], 2, "not allowed with"),
        (["--text", "Hi", "--url", "http://x", "--device", "cpu"], 2, "--device has no effect"),
        (["--text", "Hi", "--quantization", "int2"], 2, "invalid choice"),
        (["--answer", "saved.json", "--seed", "3"], 2, "--seed has no effect"),
        (["--text", "Hi", "--stream"], 2, "--stream needs --url"),
        (["--text", "Hi", "--url", "http://x", "--play"], 2, "--play has no effect without"),
        (["--text", "Hi", "--preset", "quality"], 2, "--preset has no effect without --stream"),
        (["--text", "Hi", "--url", "http://127.0.0.1:1", "--stream"], 1, "cannot be reached"),
        (["--text", "Hi", "--url", "localhost:5000"], 2, "--url: expected http://HOST:PORT"),
        (["--text", "Hi", "--task", "transcribe"], 2, "audio: nothing to transcribe"),
        (["--audio", "missing.wav"], 2, "--audio: no such file: 'missing.wav'"),
        (["--text", "Hi", "--output", "no/where.wav"], 2, "no directory no"),
        (["--text", "Hi", "--output", "."], 2, "--output: . is a directory"),
        (["--text", "Hi", "--output", "/proc/a.wav"], 2, "/proc/a.wav cannot be written ("),
        (["--text", "Hi", "--output", "/proc/version"], 2, "/proc/version cannot be written ("),
        (["--answer", "missing.json"], 1, "missing.json"),
        (["--answer", "broken.json"], 1, "broken.json: not JSON"),
        (["--text", "Hi", "--audio-top-k", "-1"], 2, "audio_top_k: expected"),
        (["--text", "Hi", "--history", "broken.json"], 2, "broken.json: history: not valid JSON"),
        (["--text", "Hi", "--history", "lost.json"], 2, "'gone.wav' is not an audio file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_infer_fails_with_one_line(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "lost.json").write_text(
        '[{"role": "user", "message_type": "audio", "content": "gone.wav"}]'
    )
    done = run(INFER, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_infer_names_missing_weights_and_bad_sound(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(INFER, "--text", "Hi", cwd=tmp_path)
    assert done.returncode == 1 and "set KIMI_AUDIO_WEIGHTS" in done.stderr
    path = tmp_path / "zero.wav"
    path.write_bytes(silence(0))
    assert run_here("infer", "--audio", path, "--weights", golden / "e2e" / "checkpoint") == 1
    assert "zero.wav: no sound" in capsys.readouterr().err.splitlines()[-1]


def test_serve_needs_weights_and_a_free_port(golden: Path, tmp_path: Path) -> None:
    done = run(SERVE, "--port", "0", cwd=tmp_path)
    assert done.returncode == 2 and "no weights" in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(SERVE, "--weights", golden, "--port", port, cwd=tmp_path)
    assert done.returncode == 2 and f"cannot listen on 127.0.0.1 port {port}" in done.stderr


def test_serve_ends_when_the_model_cannot_be_loaded(tmp_path: Path) -> None:
    done = run(SERVE, "--port", "0", "--weights", tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("serve: the model could not be loaded: ") and "config.json" in last
    assert "Error: " not in last


def test_serve_names_a_variable_with_a_bad_value(golden: Path, tmp_path: Path) -> None:
    weights = str((golden / "e2e" / "checkpoint").resolve())
    arguments = ["--port", "0", "--weights", weights]
    done = run(SERVE, *arguments, cwd=tmp_path, KIMI_AUDIO_DTYPE="float16")
    assert done.returncode == 1
    assert "KIMI_AUDIO_DTYPE: expected one of 'float32', 'bfloat16'" in done.stderr.splitlines()[-1]


def processes_with(marker: str) -> list[str]:
    """Ids of the processes that have ``marker`` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("number", "line"), [(signal.SIGTERM, "Ready:"), (signal.SIGINT, "")], ids=["ready", "loading"]
)
def test_serve_stops_with_its_worker(number: int, line: str, golden: Path, tmp_path: Path) -> None:
    marker = f"KIMI_TEST_MARKER={tmp_path}"
    environment = model_environment(golden, tmp_path / "files")
    environment |= dict([marker.split("=", 1)])
    log = tmp_path / "log"
    with running([*SERVE, "--port", "0"], log, env=environment) as process:
        wait_for_line(process, log, line)
        if line:
            assert len(processes_with(marker)) >= 3, "serve, the server and its worker"
        process.send_signal(number)
        assert process.wait(PATIENCE) == 0
    assert processes_with(marker) == []
