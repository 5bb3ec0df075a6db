"""What there is: the model, whether it answers, and counters."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from kimia_infer.serving.openai.service import Service, Serving

open_routes = APIRouter()
"""Routes that need no key."""

routes = APIRouter()


@open_routes.get("/health")
async def health(service: Serving) -> Response:
    """200 while the engine answers, 503 once it has failed."""
    state = state_of(service)
    return JSONResponse(state, 200 if state["status"] == "ready" else 503)


def state_of(service: Service) -> dict[str, Any]:
    """Whether the engine answers, or why not, and its requests and slots."""
    scheduler = service.model.scheduler
    reason = scheduler.stopped
    state = {"status": "failed", "reason": reason} if reason else {"status": "ready"}
    counts = {"queued": scheduler.queued, "running": scheduler.taken, "slots": scheduler.slots}
    return state | counts


@open_routes.get("/metrics")
async def metrics(service: Serving) -> Response:
    return Response(service.meters.exposition(), media_type="text/plain; version=0.0.4")


@routes.get("/models")
async def models(service: Serving) -> dict[str, Any]:
    return {"object": "list", "data": [describe(service, n) for n in service.speaking]}


@routes.get("/models/{name}")
async def model(service: Serving, name: str) -> dict[str, Any]:
    service.check_model(name, speech=True)
    return describe(service, name)


def describe(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "kimi-audio"}
