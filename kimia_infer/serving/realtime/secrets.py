"""Keys of short life, which a server that has a real one hands to a browser."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body
from pydantic import Field
from starlette.requests import Request

from kimia_infer.serving.openai.errors import too_many
from kimia_infer.serving.openai.service import Serving
from kimia_infer.serving.realtime.config import SessionConfig
from kimia_infer.serving.realtime.conversation import new_id
from kimia_infer.serving.realtime.schema import Strict, parse
from kimia_infer.serving.realtime.session import changed, default_config

PREFIX = "ek_"
DEFAULT_SECONDS = 600

MOST = 10_000
"""Secrets that are valid at a time."""

routes = APIRouter()


class Secrets:
    """The secrets that are valid, each with the session that it opens."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, SessionConfig]] = {}

    def create(self, config: SessionConfig, seconds: int) -> tuple[str, int]:
        """A secret, and when it expires in seconds since 1970. Raises ApiError if all are taken."""
        now = time.time()
        self._known = {key: item for key, item in self._known.items() if item[0] > now}
        if len(self._known) >= MOST:
            raise too_many(f"{MOST} client secrets are valid, the most here", 60_000, "busy")
        value = PREFIX + secrets.token_urlsafe(32)
        self._known[value] = now + seconds, config
        return value, int(now + seconds)

    def find(self, value: str) -> SessionConfig | None:
        """The session that a secret opens; None if it is not valid."""
        expires, config = self._known.get(value, (0.0, None))
        return config if expires > time.time() else None


class _Expiry(Strict):
    anchor: Literal["created_at"] = "created_at"
    seconds: int = Field(DEFAULT_SECONDS, ge=10, le=7200)


class _Body(Strict):
    expires_after: _Expiry = _Expiry()
    session: dict[str, Any] | None = None


@routes.post("/realtime/client_secrets")
async def create_secret(
    request: Request, service: Serving, sent: Annotated[dict[str, Any] | None, Body()] = None
) -> dict[str, Any]:
    """A secret that opens sessions for ten minutes, or as long as ``expires_after`` says."""
    body = parse(_Body, sent or {})
    config = default_config(service, service.name)
    if body.session is not None:
        config = changed(service, config, body.session)
    known: Secrets = request.app.state.sessions.secrets
    value, expires = known.create(config, body.expires_after.seconds)
    identity = {"id": new_id("sess"), "object": "realtime.session"}
    return {"value": value, "expires_at": expires, "session": identity | config.model_dump()}
