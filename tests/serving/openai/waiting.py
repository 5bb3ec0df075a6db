"""Waiting for the OpenAI server to have nothing left to do."""

from __future__ import annotations

import time

from tests.serving.helpers import PATIENCE, Server, stored


def wait_until_idle(server: Server) -> None:
    """Until no request has a slot or waits for one, and no file of one is left."""
    deadline = time.monotonic() + PATIENCE
    while True:
        health = server.request("GET", "/health")[1]
        if health["running"] == health["queued"] == 0 and not stored(server):
            return
        assert time.monotonic() < deadline, f"{health}, {stored(server)}"
        time.sleep(0.02)
