"""The way out of a session: events, one after another."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from kimia_infer.serving.realtime.conversation import new_id

SEND_SECONDS = 30.0
"""How long a client may take to read one event, before it counts as gone."""


class SessionOver(Exception):
    """Ends a session; ``code`` closes the WebSocket, None if there is nobody at its other end."""

    def __init__(self, code: int | None, reason: str):
        super().__init__(reason)
        self.code, self.reason = code, reason


class Outbox:
    """Sends events in the order of their calls.

    Whoever sends waits until the one before is in the socket's buffer, so a client that reads
    slowly holds back its own session only, and at most one event of each of its tasks is kept.
    """

    def __init__(self, websocket: WebSocket):
        self._websocket = websocket
        self._turn = asyncio.Lock()

    async def send(self, type: str, /, **fields: Any) -> None:
        """Send an event; raises SessionOver if the client is gone or does not read."""
        text = json.dumps({"type": type, "event_id": new_id("event"), **fields})
        try:
            async with asyncio.timeout(SEND_SECONDS), self._turn:
                await self._websocket.send_text(text)
        except TimeoutError as error:
            raise SessionOver(None, "the client does not read") from error
        except (WebSocketDisconnect, RuntimeError, OSError) as error:
            raise SessionOver(None, "the client hung up") from error
