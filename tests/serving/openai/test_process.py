"""The process around the server."""

from __future__ import annotations

import asyncio
import socket

from kimia_infer.serving.openai.server import bound


def test_what_is_written_is_sent_at_once() -> None:
    """Small writes do not wait for the acknowledgement of those before them."""
    accepted: asyncio.Queue[socket.socket] = asyncio.Queue()

    async def serve_one() -> int:
        def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.put_nowait(writer.get_extra_info("socket"))

        with bound("127.0.0.1", 0) as listener:
            listener.listen()
            async with await asyncio.start_server(note, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                connection = await accepted.get()
                delayed = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                writer.close()
                return delayed

    assert asyncio.run(serve_one()) == 1
