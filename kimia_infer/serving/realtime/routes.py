"""The endpoint of sessions."""

from __future__ import annotations

from fastapi import APIRouter, WebSocket

from kimia_infer.serving.openai.errors import too_many, unsupported
from kimia_infer.serving.openai.service import Service
from kimia_infer.serving.realtime.config import SessionConfig
from kimia_infer.serving.realtime.session import Session
from kimia_infer.serving.realtime.voice_activity import VoiceActivity

SUBPROTOCOL = "realtime"
"""What browsers ask for beside the key."""

BUSY_RETRY_MS = 5_000

routes = APIRouter()


class Sessions:
    """Counts the open sessions, and holds what they share."""

    def __init__(self, service: Service):
        self._service = service
        self._activity = VoiceActivity()
        self._open = 0

    async def serve(self, websocket: WebSocket, model: str | None) -> None:
        """Serve one client until either side ends the session.

        Raises ApiError, as an answer to the handshake, if there are too many sessions.
        """
        service, limit = self._service, self._service.settings.max_sessions
        service.check_model(model)
        if self._open >= limit:
            raise too_many(f"{limit} sessions are open, the most here", BUSY_RETRY_MS, "busy")
        self._open += 1
        service.meters.sessions.inc()
        try:
            offered = websocket.scope.get("subprotocols", ())
            await websocket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
            config = SessionConfig(type="realtime", model=model or service.name)
            await Session(service, websocket, self._activity, config).run()
        finally:
            self._open -= 1
            service.meters.sessions.dec()

    def close(self) -> None:
        self._activity.close()


@routes.websocket("/realtime")
async def realtime(websocket: WebSocket, model: str | None = None) -> None:
    """A session of the Realtime API; see docs/realtime.md."""
    if "call_id" in websocket.query_params:
        raise unsupported("call_id", "open a session with ?model=NAME")
    sessions: Sessions = websocket.app.state.sessions
    await sessions.serve(websocket, model)
