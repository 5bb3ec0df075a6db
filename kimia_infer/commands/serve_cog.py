"""`kimi-audio serve --cog`: Cog's own server around predict.py or predict_editx.py."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from kimia_infer.commands.parser import UsageError, model_variables
from kimia_infer.serving.client import open_url
from kimia_infer.utils.files import OwnedDirectory

STOP_SECONDS = 10

MAX_CONCURRENCY = 64
"""Predictions that the server takes at a time, with those that wait for a slot of the model."""

LONGEST_LINE = 2000
"""Bytes of a line of the log; Cog's server writes unknown names of inputs in full."""


def run(arguments: Namespace) -> int:
    from kimia_infer.serving.cog.schema import install_schema
    from kimia_infer.serving.cog.settings import CogSettings
    from kimia_infer.serving.settings import read_settings

    if importlib.util.find_spec("cog") is None:
        raise ModuleNotFoundError("No module named 'cog'", name="cog")
    # A bad value is named before a process has imported the model.
    read_settings(CogSettings, model_variables(arguments))
    try:
        port = free_port(arguments.host, arguments.port)
    except OSError as error:
        where = f"{arguments.host} port {arguments.port}"
        raise UsageError(f"cannot listen on {where}: {error.strerror}") from error
    predictor = "StreamingPredictor" if arguments.stream else "Predictor"
    if arguments.editx:
        predictor = "EditXPredictor"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with OwnedDirectory("kimi-audio-serve-") as directory:
        # The server reads the schema of its inputs from below the directory it runs in.
        install_schema(predictor, directory)
        server = start(arguments, port, f"{predictor_file(predictor)}:{predictor}", directory)
        problem = None
        try:
            problem = watch(server, arguments.host, port)
        except KeyboardInterrupt:
            print("Stopping", flush=True)
        finally:
            stop(server)
    if problem is None:
        return 0
    print(f"serve: {problem}", file=sys.stderr)
    return 1


def predictor_file(predictor: str) -> Path:
    """Its file: in the package where that was installed, above it in a checkout."""
    name = "predict_editx.py" if predictor == "EditXPredictor" else "predict.py"
    package = Path(__file__).resolve().parents[1]
    installed = package / name
    return installed if installed.is_file() else package.parent / name


def free_port(host: str, port: int) -> int:
    """``port``, or a free one for 0; OSError if it cannot be listened on."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        return probe.getsockname()[1]


def start(
    arguments: Namespace, port: int, predictor: str, directory: Path
) -> subprocess.Popen[bytes]:
    """The server process, in its own process group: signals reach it through this process."""
    variables = {"LOG_FORMAT": "console", **model_variables(arguments)}
    variables |= {"PORT": str(port), "COG_PREDICT_TYPE_STUB": predictor}
    variables.setdefault("COG_MAX_CONCURRENCY", str(max_concurrency(variables)))
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if not sys.stdout.isatty():
        variables.setdefault("NO_COLOR", "1")
    if arguments.weights:
        variables["KIMI_AUDIO_WEIGHTS"] = arguments.weights
    # The server starts its worker as "python" from PATH, and waits endlessly for a wrong one.
    beside = str(Path(sys.executable).parent)
    variables["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", "")])
    if shutil.which("python", path=beside) is None:
        raise FileNotFoundError(f"there is no 'python' beside {sys.executable}, which Cog needs")
    server = subprocess.Popen(
        [sys.executable, "-m", "cog.server.http", "--host", arguments.host],
        cwd=directory,
        env=variables,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    threading.Thread(target=show_log, args=(server.stderr,), daemon=True).start()
    return server


def max_concurrency(variables: Mapping[str, str]) -> int:
    """As many predictions wait for a slot of the model as have one, where their number is set."""
    slots = variables.get("KIMI_AUDIO_SLOTS", "")
    return 2 * int(slots) if slots.isdecimal() and int(slots) else MAX_CONCURRENCY


def show_log(lines: BinaryIO) -> None:
    """Copy the server's log to stderr, no line of it longer than LONGEST_LINE."""
    begins = True
    while part := lines.readline(LONGEST_LINE):
        ends = part.endswith(b"\n")
        if begins:
            with contextlib.suppress(OSError):  # the server goes on without a reader of its log
                sys.stderr.buffer.write(part if ends else part + b"...\n")
                sys.stderr.flush()
        begins = ends


def watch(server: subprocess.Popen[bytes], host: str, port: int) -> str:
    """Print when the server is ready, then wait; the reason why it or its model ended."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{local}]:{port}" if ":" in local else f"http://{local}:{port}"
    ready = False
    while server.poll() is None:
        state = health(url)
        status = state.get("status")
        if status == "SETUP_FAILED":
            logs = (state.get("setup") or {}).get("logs") or "no reason given"
            reason = logs.split("setup failed: ")[-1].strip()
            reason = re.sub(r"^(Configuration|Weights)Error: ", "", reason)
            return f"the model could not be loaded: {reason}"
        if status in ("DEFUNCT", "UNHEALTHY"):
            reason = state.get("user_healthcheck_error") or "the process with the model died"
            reason = re.sub(r"^Healthcheck failed: (\w+: )?", "", reason)
            return f"{reason} ({status}); start the server again"
        if status == "READY" and not ready:
            ready = True
            print(f"Ready: {url}", flush=True)
        time.sleep(2 if ready else 0.2)
    return f"the server ended with status {server.returncode}"


def health(url: str) -> dict:
    """The server's health; empty while it does not answer."""
    try:
        with open_url(f"{url}/health-check", timeout=5) as response:
            return json.load(response)
    except (OSError, ValueError):
        return {}


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and its process group, which has the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
