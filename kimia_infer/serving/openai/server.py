"""The process that serves: loads the model, listens, stops."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import uvicorn

from kimia_infer.api.editx import EditX
from kimia_infer.api.editx_request import WORKING_BYTES
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.models.step_audio_editx.layout import resolve_editx
from kimia_infer.serving.openai.app import create_app
from kimia_infer.serving.openai.service import Service
from kimia_infer.serving.openai.settings import OpenAISettings
from kimia_infer.serving.openai.state import State
from kimia_infer.serving.openai.voices import check_voices
from kimia_infer.serving.process import run_periodically, show_log, trim_heap
from kimia_infer.serving.settings import read_settings

CLEANUP_SECONDS = 30.0
DRAIN_SECONDS = 10
"""How long running answers may still take once the server is told to stop."""

MAX_FRAME = 16_000_000
"""Bytes of a WebSocket message: above the 15 MiB of sound that OpenAI's protocol allows."""

PING_SECONDS = 20.0
"""Time after which a WebSocket whose other end is gone is noticed, twice."""


def serve(weights: str, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Load ``weights`` and serve until a signal; ``ready`` is called with the server's URL.

    The address is taken first, so that one in use is known before the model is loaded; until that
    is done, connections are refused.

    Raises OSError if the address cannot be listened on, and what KimiAudio raises.
    """
    show_log()
    settings = read_settings(OpenAISettings, os.environ)
    check_voices(settings)
    with bound(host, port) as listener:
        service = load_service(weights, settings)
        config = uvicorn.Config(
            create_app(service),
            log_config=None,
            access_log=False,
            ws="websockets-sansio",
            ws_max_size=MAX_FRAME,
            ws_per_message_deflate=False,  # sound in base64 hardly shrinks
            ws_ping_interval=PING_SECONDS,
            ws_ping_timeout=PING_SECONDS,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
        listener.listen(config.backlog)  # who comes before the loop runs waits for it
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{listener.getsockname()[1]}")
        uvicorn.Server(config).run([listener])


def load_service(weights: str, settings: OpenAISettings, state: State | None = None) -> Service:
    """The models that ``settings`` name, loaded, and a thread that cleans up after requests.

    Raises what KimiAudio raises.
    """
    editx = load_editx(settings)  # first: requests fill what memory is left
    reserved = 0 if editx is None else WORKING_BYTES
    model = KimiAudio(weights, **settings.model_arguments(), reserved=reserved)
    service = Service(model, settings, editx, state)
    run_periodically([service.uploads.keep, trim_heap], CLEANUP_SECONDS)
    return service


def load_editx(settings: OpenAISettings) -> EditX | None:
    """Step-Audio-EditX where the settings have it, on the device of the speech."""
    if settings.editx is None:
        return None
    return EditX(
        resolve_editx(settings.editx),
        settings.speech_device or settings.device,
        settings.dtype,
        settings.quantization or "none",
    )


def bound(host: str, port: int) -> socket.socket:
    """A socket with the address ``host`` and ``port``, 0 for any free one.

    It says that it is of TCP: for such alone asyncio sends small writes at once. Otherwise each
    answer, and each event of a stream, waits for the client's acknowledgement of the write before
    it, which systems delay by 40 ms.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
