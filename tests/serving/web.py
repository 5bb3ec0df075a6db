"""Small web servers that misbehave, for downloads of callers' URLs."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

Behaviour = Callable[[socket.socket], None]

BODY = b"HTTP/1.1 200 OK\r\n\r\n"
"""The head of an answer, which its body follows."""


class Web:
    """A server on a loopback address; ``peers`` are the addresses it was called at."""

    def __init__(self, behaviour: Behaviour, host: str):
        self._listener = socket.create_server((host, 0))
        self._behaviour = behaviour
        self.port = self._listener.getsockname()[1]
        self.url = f"http://{host}:{self.port}/sound.wav"
        self.called_at: list[str] = []
        self.left = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.called_at.append(connection.getsockname()[0])
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.recv(65536)
            with contextlib.suppress(OSError):
                self._behaviour(connection)
        self.left.set()

    def close(self) -> None:
        self._listener.close()


@contextlib.contextmanager
def web(behaviour: Behaviour, host: str = "127.0.0.1") -> Iterator[Web]:
    """A running server; ``behaviour`` answers each connection, after a request has come."""
    server = Web(behaviour, host)
    try:
        yield server
    finally:
        server.close()


def answers(body: bytes = b"", status: str = "200 OK", **headers: str) -> Behaviour:
    """One answer; a ``Content_Length`` other than that of ``body`` is sent as given."""
    headers = {"Content_Length": str(len(body))} | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    head = "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()

    def behave(connection: socket.socket) -> None:
        connection.sendall(head + body)

    return behave


def drips(content: bytes, seconds: float = 0.1) -> Behaviour:
    """``content`` at once, then a byte every so many ``seconds`` until the other side leaves."""

    def behave(connection: socket.socket) -> None:
        connection.sendall(content)
        connection.settimeout(seconds)
        while True:
            try:
                if not connection.recv(1):
                    return
            except TimeoutError:
                connection.sendall(b"x")

    return behave


def floods(connection: socket.socket) -> None:
    """A body without an end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(bytes(65536))


def is_silent(connection: socket.socket) -> None:
    """Nothing at all, until the other side leaves."""
    connection.recv(1)
    time.sleep(0)
