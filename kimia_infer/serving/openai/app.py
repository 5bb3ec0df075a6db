"""The application: endpoints, errors in OpenAI's form, limits on bodies."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Route

from kimia_infer.serving.openai import chat, models, page, speech, transcriptions, voices
from kimia_infer.serving.openai.errors import ApiError, as_api_error, no_room, response_to
from kimia_infer.serving.openai.middleware import Admission, Bodies, Counted
from kimia_infer.serving.openai.service import Service
from kimia_infer.serving.realtime import routes as realtime
from kimia_infer.serving.realtime import secrets
from kimia_infer.utils.errors import RequestError, explain_fault, place_of

log = logging.getLogger(__name__)


def create_app(service: Service) -> FastAPI:
    """The server around a loaded model, an ASGI application."""

    sessions = realtime.Sessions(service)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        sessions.close()
        service.answers.close()

    app = FastAPI(title="Kimi-Audio", docs_url="/docs", redoc_url=None, lifespan=lifespan)
    app.state.service, app.state.sessions = service, sessions
    app.include_router(models.open_routes)
    app.include_router(page.routes)
    openai_routes = (models, voices, chat, speech, transcriptions, secrets)
    for routes in (module.routes for module in openai_routes):
        app.include_router(
            routes,
            prefix="/v1",
            responses={"4XX": {"description": "OpenAI's error object, under the key error"}},
        )
    app.include_router(realtime.sockets, prefix="/v1")
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)
    app.add_middleware(Admission, service=service)
    app.add_middleware(Bodies, megabytes=service.settings.max_megabytes)
    if origins := service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
        )
    shown = [route.path for route in (*page.routes.routes, *app.routes) if isinstance(route, Route)]
    app.add_middleware(Counted, meters=service.meters, paths=[*app.openapi()["paths"], *shown])
    return app


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return response_to(error)


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return response_to(as_api_error(error))


async def _validation_error(request: Request, error: Exception) -> Response:
    """The first thing that is wrong with a body: ``messages[0].role: missing``."""
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    fault = {**fault, "loc": fault["loc"][1:]}  # without "body"
    where = place_of(fault)
    if not where and fault["type"] == "model_attributes_type":
        text = "expected a JSON object, with the header Content-Type: application/json"
        return response_to(ApiError(400, f"body: {text}"))
    if fault["type"] == "json_invalid":
        return response_to(ApiError(400, f"the body is not valid JSON: {fault['ctx']['error']}"))
    body = request.scope["route"].body_field
    message = explain_fault(fault, body and body.field_info.annotation)
    return response_to(ApiError(400, message if where else f"body: {message}", where or None))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(cause := error.__cause__, OSError):  # which FastAPI takes for a broken body
        return response_to(no_room(cause))
    message = {
        404: f"there is no {request.url.path} here; /docs lists what there is",
        405: f"{request.method} is not for {request.url.path}",
    }.get(error.status_code, str(error.detail))
    answer = response_to(ApiError(error.status_code, message))
    answer.headers.update(error.headers or {})
    return answer


async def _unexpected_error(request: Request, error: Exception) -> Response:
    """The server's fault; its log has the traceback."""
    return response_to(ApiError(500, "the server failed; its log says why", retry=False))
