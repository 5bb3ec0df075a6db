"""Keys of short life, which a server that has a real one hands to a browser."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body
from pydantic import Field

from kimia_infer.serving.openai.service import Serving
from kimia_infer.serving.realtime.conversation import new_id
from kimia_infer.serving.realtime.schema import Strict, parse
from kimia_infer.serving.realtime.session import changed, default_config

DEFAULT_SECONDS = 600

routes = APIRouter()


class _Expiry(Strict):
    anchor: Literal["created_at"] = "created_at"
    seconds: int = Field(DEFAULT_SECONDS, ge=10, le=7200)


class _Body(Strict):
    expires_after: _Expiry = _Expiry()
    session: dict[str, Any] | None = None


@routes.post("/realtime/client_secrets")
async def create_secret(
    service: Serving, sent: Annotated[dict[str, Any] | None, Body()] = None
) -> dict[str, Any]:
    """A secret that opens sessions for ten minutes, or as long as ``expires_after`` says."""
    body = parse(_Body, sent or {})
    config = default_config(service, service.name)
    if body.session is not None:
        config = changed(service, config, body.session)
    value, expires = service.secrets.create(config, body.expires_after.seconds)
    identity = {"id": new_id("sess"), "object": "realtime.session"}
    return {"value": value, "expires_at": expires, "session": identity | config.model_dump()}
