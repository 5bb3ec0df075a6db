"""Serve the model over HTTP: for OpenAI's clients and a browser, or with Cog's own server.

    kimi-audio serve --weights weights/mini
    KIMI_AUDIO_WEIGHTS=moonshotai/Kimi-Audio-7B-Instruct kimi-audio serve --host 0.0.0.0
    kimi-audio serve --ray --replicas 1-4 --weights weights/mini
    kimi-audio serve --cog --weights weights/mini
    kimi-audio serve --cog --editx auto

--openai, the default of the installed command: /v1/chat/completions, /v1/audio/transcriptions,
/v1/audio/speech, /v1/realtime and others (docs/openai.md), and at / a page to talk to the model; on
port 8000; with --ray as replicas on one machine or many (docs/cluster.md). --cog, the default in a
checkout: POST /predictions, as in the image of cog.yaml; --stream serves the streaming predictor
(docs/deploy.md); on port 5000. How the model runs is set with KIMI_AUDIO_DEVICE, _DTYPE,
_QUANTIZATION, _KV_CACHE, _OFFLOAD, _ATTENTION, _HEAD_ROWS, _TIMEOUT, _ADAPTER, _KOKORO, _EDITX and
_OUTPUT.
Exit status: 0 stopped by a signal, 1 the model could not be loaded or died, 2 usage.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from argparse import Namespace
from pathlib import Path

from kimia_infer.commands.parser import (
    WEIGHTS_HELP,
    Parser,
    add_change,
    add_kokoro,
    add_slots,
    check_adapter,
    check_kokoro,
    model_variables,
)

PACKAGES = (
    *("fastapi", "limits", "prometheus_client", "python_multipart"),
    *("silero_vad", "uvicorn", "websockets"),
)
"""What the OpenAI server needs besides the library."""

OPENAI_PORT, COG_PORT = 8000, 5000
"""Ports unless told otherwise; that of Cog is fixed in its images."""


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--weights", help=f"{WEIGHTS_HELP} [KIMI_AUDIO_WEIGHTS, else COG_WEIGHTS]")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [%(default)s]")
    ports = f"[{OPENAI_PORT}; {COG_PORT} for Cog's server]"
    parser.add_argument("--port", type=int, help=f"0 for any free port {ports}")
    doors = parser.add_mutually_exclusive_group()
    doors.add_argument("--openai", action="store_true", help="for OpenAI's clients and a browser")
    doors.add_argument("--cog", action="store_true", help="Cog's server, for its predictor")
    doors.add_argument(
        "--stream",
        action="store_true",
        help="Cog's server, for its streaming predictor: text and speech as server-sent events",
    )
    parser.add_argument(
        "--ray",
        action="store_true",
        help="with --openai: replicas of Ray Serve, here or on the cluster of RAY_ADDRESS",
    )
    parser.add_argument(
        "--replicas", metavar="N|MIN-MAX", help="with --ray: models that are loaded [1]"
    )
    add_change(parser)
    add_slots(parser)
    add_kokoro(parser)
    parser.add_argument(
        "--editx",
        metavar="DIR|auto",
        help="offer Step-Audio-EditX, too; with --cog, it alone [KIMI_AUDIO_EDITX with --openai]",
    )


def check(parser: Parser, arguments: Namespace) -> None:
    script = parser.prog.startswith("scripts/")  # which served with Cog before there was a choice
    if arguments.ray and (arguments.cog or arguments.stream):
        parser.error("--ray: with the server for OpenAI's clients only, not with Cog's")
    if arguments.replicas is not None and not arguments.ray:
        parser.error("--replicas goes with --ray")
    arguments.replicas = arguments.replicas or "1"
    arguments.openai |= arguments.ray or not (script or arguments.cog or arguments.stream)
    if arguments.port is None:
        arguments.port = OPENAI_PORT if arguments.openai else COG_PORT
    weights = arguments.weights or os.environ.get("KIMI_AUDIO_WEIGHTS", "")
    alone = arguments.editx and not arguments.openai
    if alone:
        check_alone(parser, arguments, weights)
    check_adapter(parser, arguments)
    check_kokoro(parser, arguments)
    if not weights and not os.environ.get("COG_WEIGHTS") and not alone:
        parser.error("no weights: give --weights, or set KIMI_AUDIO_WEIGHTS")
    arguments.weights = absolute(weights)
    arguments.editx = absolute(arguments.editx)


def check_alone(parser: Parser, arguments: Namespace, weights: str) -> None:
    """Refuse what the predictor of Step-Audio-EditX has no use for."""
    if arguments.stream:
        parser.error("--stream: the predictor of --editx does not stream; --openai does")
    useless = ["kokoro", "kokoro_adapter"]
    if not weights:  # of the Kimi-Audio that writes transcripts
        useless += ["adapter", "slots"]
    for name in useless:
        if getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} has no effect with --editx and Cog")


def absolute(weights: str | None) -> str | None:
    """A directory by its absolute path, since Cog's server runs in another one."""
    path = Path(weights or "").expanduser()
    return str(path.resolve()) if weights and path.is_dir() else weights


def run(arguments: Namespace) -> int:
    if arguments.openai:
        return serve_openai(arguments)
    from kimia_infer.commands import serve_cog

    return serve_cog.run(arguments)


def show_url(url: str) -> None:
    print(f"Ready: {url}", flush=True)


def serve_openai(arguments: Namespace) -> int:
    """Serve in this process until a signal."""
    for package in PACKAGES:  # a lack of some would be noticed late, and said in other ways
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    if arguments.ray:
        from kimia_infer.commands import serve_ray

        return serve_ray.run(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.update(model_variables(arguments))
    from kimia_infer.models.kimi_audio.checkpoint import weights_from_environment
    from kimia_infer.serving.openai.server import serve

    try:
        weights = arguments.weights or weights_from_environment()
        serve(weights, arguments.host, arguments.port, show_url)
    except KeyboardInterrupt:
        print("Stopping", flush=True)
    return 0
