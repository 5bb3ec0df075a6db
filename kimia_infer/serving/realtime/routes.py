"""The endpoint of sessions."""

from __future__ import annotations

from fastapi import APIRouter, WebSocket

from kimia_infer.serving.openai.errors import too_many, unsupported
from kimia_infer.serving.openai.service import Service, presented_key
from kimia_infer.serving.realtime.config import SessionConfig
from kimia_infer.serving.realtime.session import Session, default_config
from kimia_infer.serving.realtime.voice_activity import VoiceActivity

SUBPROTOCOL = "realtime"
"""What browsers ask for beside the key."""

BUSY_RETRY_MS = 5_000

sockets = APIRouter()


class Sessions:
    """Opens sessions, and holds what they share."""

    def __init__(self, service: Service):
        self._service = service
        self._activity = VoiceActivity()
        self._open = 0

    async def serve(self, websocket: WebSocket, model: str | None) -> None:
        """Serve one client until either side ends the session.

        Raises ApiError, as an answer to the handshake, for a wrong key or model, and if there are
        too many sessions.
        """
        config = self._admit(websocket, model)
        limit = self._service.settings.max_sessions
        if self._open >= limit:
            raise too_many(f"{limit} sessions are open, the most here", BUSY_RETRY_MS, "busy")
        self._open += 1
        self._service.meters.sessions.inc()
        try:
            offered = websocket.scope.get("subprotocols", ())
            await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
            await Session(self._service, websocket, self._activity, config).run()
        finally:
            self._open -= 1
            self._service.meters.sessions.dec()

    def _admit(self, websocket: WebSocket, model: str | None) -> SessionConfig:
        """How the session begins. A client secret is a key, and says that itself."""
        service = self._service
        config = service.secrets.find(presented_key(websocket))
        if config is None:
            service.admit(websocket)
            config = default_config(service, model or service.name)
        service.check_model(model)
        return config

    def close(self) -> None:
        self._activity.close()


@sockets.websocket("/realtime")
async def realtime(websocket: WebSocket, model: str | None = None) -> None:
    """A session of the Realtime API; see docs/realtime.md."""
    if "call_id" in websocket.query_params:
        raise unsupported("call_id", "open a session with ?model=NAME")
    if websocket.query_params.get("intent", "realtime") != "realtime":
        advice = "leave it out, and set session.audio.input.transcription"
        raise unsupported("intent", advice)
    sessions: Sessions = websocket.app.state.sessions
    await sessions.serve(websocket, model)
