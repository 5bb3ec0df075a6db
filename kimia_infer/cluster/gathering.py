"""``/health`` and ``/metrics`` of all replicas together, whichever of them is asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from fastapi.responses import JSONResponse, PlainTextResponse, Response
from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger(__name__)

Report = tuple[dict[str, Any], str]
"""Health and metrics of a replica."""

METHOD = "report"
"""Of a replica, which gives its Report."""

SECONDS = 5.0
"""How long the slowest replica may take, before one answers for itself alone. Ray replaces one that
hangs after HEALTH_TIMEOUT."""

COUNTED = ("queued", "running", "slots")


class Gathered:
    """The application ``app`` of a replica, which answers for the others, too.

    ``own`` gives the report of this one.
    """

    def __init__(self, app: ASGIApp, own: Callable[[], Report]):
        self._app, self._own = app, own
        self._answers: dict[str, Callable[[list[Report]], Response]] = {
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
            await answer(await self._reports())(scope, receive, send)

    async def _reports(self) -> list[Report]:
        """Those of every replica, or of this one where another does not answer in time."""
        try:
            return await reports()
        except TimeoutError:
            log.warning("A replica did not report within %.0f s", SECONDS)
            return [self._own()]


async def reports() -> list[Report]:
    """Those of every replica. Raises TimeoutError if one takes longer than SECONDS."""
    context = serve.get_replica_context()
    handle = serve.get_deployment_handle(context.deployment, context.app_name)
    asked = handle.broadcast(METHOD)
    found = await asked.results_async(timeout_s=SECONDS, return_exceptions=True)
    # One that has just died has nothing to report; this one is among those that answer.
    return [report for report in found if not isinstance(report, BaseException)]


def health(reports: list[Report]) -> Response:
    """200 while one of them is ready, as others are replaced; requests and slots of all."""
    found = [state for state, _ in reports]
    total = {name: sum(state[name] for state in found) for name in COUNTED}
    if any(state["status"] == "ready" for state in found):
        return JSONResponse({"status": "ready", **total})
    return JSONResponse({**found[0], **total}, 503)


def metrics(reports: list[Report]) -> Response:
    texts = [exposition for _, exposition in reports]
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
