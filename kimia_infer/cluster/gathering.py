"""``/health`` and ``/metrics`` of all replicas together, whichever of them is asked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from fastapi.responses import JSONResponse, PlainTextResponse, Response
from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

METHOD = "report"
"""Of a replica: its health and its metrics, which are asked for here."""

SECONDS = 5.0
"""How long the slowest replica may take."""

COUNTED = ("queued", "running", "slots")


class Gathered:
    """The application ``app`` of a replica, which answers for the others, too."""

    def __init__(self, app: ASGIApp):
        self._app = app
        self._answers: dict[str, Callable[[], Awaitable[Response]]] = {
            "/health": health,
            "/metrics": metrics,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = None
        if scope["type"] == "http" and scope["method"] == "GET":
            answer = self._answers.get(scope["path"].removeprefix(scope.get("root_path", "")))
        if answer is None:
            await self._app(scope, receive, send)
        else:
            await (await answer())(scope, receive, send)


async def reports() -> list[tuple[dict[str, Any], str]]:
    """Health and metrics of every replica."""
    context = serve.get_replica_context()
    handle = serve.get_deployment_handle(context.deployment, context.app_name)
    asked = handle.broadcast(METHOD)
    found = await asked.results_async(timeout_s=SECONDS, return_exceptions=True)
    # One that has just died has nothing to report; this one is among those that answer.
    return [report for report in found if not isinstance(report, BaseException)]


async def health() -> Response:
    """200 while one of them is ready, as others are replaced; requests and slots of all."""
    found = [report for report, _ in await reports()]
    total = {name: sum(report[name] for report in found) for name in COUNTED}
    if any(report["status"] == "ready" for report in found):
        return JSONResponse({"status": "ready", **total})
    return JSONResponse({**found[0], **total}, 503)


async def metrics() -> Response:
    texts = [exposition for _, exposition in await reports()]
    return PlainTextResponse(summed(texts), media_type="text/plain; version=0.0.4")


def summed(expositions: Iterable[str]) -> str:
    """Prometheus' texts of several servers as that of one, with the sums of their samples.

    All samples of a metric follow its comments. Of the times at which a counter was made, the
    first one stays.
    """
    metrics: dict[str, dict[str, float | None]] = {}  # samples with their values, and comments
    for exposition in expositions:
        lines: dict[str, float | None] = {}
        for line in exposition.splitlines():
            name, _, value = line.rpartition(" ")
            if line.startswith("#"):  # "# HELP name ..." or "# TYPE name ..."
                lines = metrics.setdefault(line.split()[2], {})
                lines.setdefault(line, None)
            elif name.partition("{")[0].endswith("_created"):
                lines[name] = min(float(value), lines.get(name) or float(value))
            else:
                lines[name] = float(value) + (lines.get(name) or 0.0)
    merged = [item for lines in metrics.values() for item in lines.items()]
    return "".join(f"{name}\n" if v is None else f"{name} {v}\n" for name, v in merged)
