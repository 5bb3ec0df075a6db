"""The page to talk to the model, at ``/``, and the files it is made of."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

METHODS = ["GET", "HEAD"]

HEADERS = {
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "media-src blob:",  # a file that was dropped, whose length is read
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "permissions-policy": "microphone=(self)",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # the files of one version belong together
}
"""Nothing comes from elsewhere, and no other page may show this one."""

routes = APIRouter(include_in_schema=False)
files = StaticFiles(directory=Path(__file__).parents[1] / "page")


@routes.api_route("/", methods=METHODS)
async def page(request: Request) -> Response:
    return await file("index.html", request)


@routes.api_route("/page/{path:path}", methods=METHODS)
async def file(path: str, request: Request) -> Response:
    """A file of the page; the addresses in it are relative, so that a path may come before them."""
    response = await files.get_response(path, request.scope)
    response.headers.update(HEADERS)
    return response
