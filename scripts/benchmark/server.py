"""A server to be measured: ``kimi-audio serve``, which ends when whoever started it does."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from kimia_infer.serving.client import PCM_BYTES, PCM_RATE, Chunk, stream_prediction
from scripts.benchmark.concurrency import INPUTS, Piece, Way
from scripts.benchmark.measuring import process_memory
from scripts.benchmark.requests import Audio
from scripts.benchmark.runner import ROOT


@contextlib.contextmanager
def serving(weights: Path, variables: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """The address and the process of a streaming server of a checkpoint.

    ``variables`` are added to its environment. RuntimeError if it does not become ready; it writes
    the reason to stderr.
    """
    arguments = ["--stream", "--port", "0", "--weights", str(weights)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.benchmark.server", *arguments],
        cwd=ROOT, env={**os.environ, **variables}, stdin=pipe, stdout=pipe, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        lines = (line for line in process.stdout if line.startswith("Ready:"))
        ready = next(lines, None)
        if ready is None:
            raise RuntimeError(f"the server ended with status {process.wait()}, see the log")
        yield ready.removeprefix("Ready:").strip(), process.pid
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def server(url: str, audio: Audio, process: int | None = None) -> Way:
    """Clients of a streaming server; ``process`` is that which started it, if it is local."""
    content = audio if isinstance(audio, bytes) else audio.read_bytes()
    uri = f"data:audio/wav;base64,{base64.b64encode(content).decode()}"

    def ask(seed: int) -> Iterator[Piece]:
        for piece in stream_prediction(url, {"audio": uri, **INPUTS, "seed": seed}):
            if isinstance(piece, Chunk):
                yield Piece(bool(piece.text), len(piece.pcm) / PCM_BYTES / PCM_RATE)
            else:
                yield Piece(steps=piece.metrics["decode_steps"])

    name = "server" if process is not None else f"server at {url}"
    return Way(name, ask, lambda: {} if process is None else process_memory(process))


def end_with_parent() -> None:
    """Wait for the end of stdin, which the parent holds open, and stop the server."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    from kimia_infer.commands.main import run_command

    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.exit(run_command("serve", sys.argv[1:], "serve"))
