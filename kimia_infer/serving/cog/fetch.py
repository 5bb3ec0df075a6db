"""Download of a caller's URL: bounded in bytes and seconds, from public addresses alone.

An ordinary HTTP client limits the time between two packets, not the whole, resolves a name again
after it was checked, and cannot be stopped while it waits. Here the address that was checked is
the one that is connected to, after every redirect as well, and the download has a thread of its
own: the caller waits for it in short steps, between which it notices a cancellation, and closes the
connection when it leaves. Proxies of the environment are not used, as they would resolve the name.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import os
import queue
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import BinaryIO

from kimia_infer.utils.errors import RequestError

MAX_REDIRECTS = 5
CHUNK_BYTES = 1 << 16
STEP_SECONDS = 0.05
"""How long a cancellation may wait."""

SPARE_THREADS = 8
"""For downloads that were given up: one ends at once, unless it waits for a name server."""

_EMBEDDED = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that stand for IPv4 ones behind a gateway (RFC 6052)."""

_ALLOCATED = ipaddress.ip_network("2000::/3")
"""All IPv6 addresses of the internet so far; others may lead to networks nearby (RFC 8215)."""


class FetchError(RequestError):
    """The content of a URL cannot be had; the message does not repeat the URL."""


@dataclass(frozen=True)
class Limits:
    """What downloads may take: ``seconds`` from ``begun`` (monotonic) on, ``size`` in bytes.

    With ``private`` they may come from addresses that are not of the internet. ``check`` is called
    while they last, and may raise to end them.
    """

    begun: float
    seconds: float
    size: int
    private: bool = False
    check: Callable[[], None] = lambda: None


class Downloader:
    """Threads that download, all started here, for ``count`` requests at a time."""

    def __init__(self, count: int):
        self._downloads: queue.SimpleQueue[_Download] = queue.SimpleQueue()
        self._threads = count + SPARE_THREADS
        self._busy = 0
        self._lock = threading.Lock()
        for _ in range(self._threads):
            threading.Thread(target=self._work, name="download", daemon=True).start()

    def _work(self) -> None:
        while True:
            download = self._downloads.get()
            with self._lock:
                self._busy += 1
            download.run()
            with self._lock:
                self._busy -= 1

    @property
    def busy(self) -> int:
        """Threads that have not ended what they were given, though it may be given up."""
        return self._busy

    def fetch(self, url: str, file: BinaryIO, limits: Limits) -> int:
        """Write the content behind ``url`` (http or https) to ``file``; its size in bytes.

        Raises:
            FetchError: not a URL, not a permitted address, another status than 200, more than
                ``limits.size`` bytes or ``limits.seconds``, less than was announced, or a
                connection that broke. What ``limits.check`` raises is raised, too.
        """
        deadline = limits.begun + limits.seconds
        if self._busy >= self._threads:
            raise FetchError("too many earlier downloads are still ending; send it again later")
        download = _Download(url, file, limits, deadline)
        try:
            self._downloads.put(download)
            while not download.done.wait(STEP_SECONDS):
                if time.monotonic() >= deadline:
                    raise FetchError(
                        f"the URL was not read completely within {limits.seconds:g} s, the time "
                        "limit of this service"
                    )
                limits.check()
        finally:
            download.stop()
        if download.error is not None:
            raise download.error
        return download.size


class _Download:
    """One download, on its own thread. ``file`` is not written to after :meth:`stop`."""

    def __init__(self, url: str, file: BinaryIO, limits: Limits, deadline: float):
        self.done = threading.Event()
        self.error: FetchError | None = FetchError(_GIVEN_UP)
        self.size = 0
        self._url, self._file, self._limits, self._deadline = url, file, limits, deadline
        self._lock = threading.Lock()
        self._stopped = False
        self._socket: socket.socket | None = None

    def run(self) -> None:
        try:
            if not self._stopped:
                self._follow()
                self.error = None
        except FetchError as error:
            self.error = error
        except ssl.SSLCertVerificationError as error:
            self.error = FetchError(f"the certificate is not valid ({error.verify_message})")
        except ssl.SSLError as error:
            reason = (error.reason or "unknown reason").replace("_", " ").lower()
            self.error = FetchError(f"no encrypted connection could be made ({reason})")
        except OSError as error:
            self.error = FetchError(f"the connection failed ({error.strerror or error})")
        except (http.client.HTTPException, ValueError):
            self.error = FetchError("no readable answer of a web server")
        finally:
            self.done.set()

    def stop(self) -> None:
        """Close the connection, which ends the thread in whatever it waits for."""
        with self._lock:
            self._stopped = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    # Of the class, as that of an SSLSocket forgets its session first.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def hold(self, connection: socket.socket) -> socket.socket:
        """Take ``connection`` as the one that :meth:`stop` closes."""
        with self._lock:
            self._socket = connection
            if self._stopped:
                raise FetchError(_GIVEN_UP)
        return connection

    def patience(self) -> float:
        """Seconds to wait for the other side, a little longer than the caller waits."""
        return max(self._deadline - time.monotonic(), 0.0) + 1.0

    def _follow(self) -> None:
        url = self._url
        for _ in range(MAX_REDIRECTS + 1):
            location = self._read(url)
            if location is None:
                return
            url = urllib.parse.urljoin(url, location)
            if urllib.parse.urlsplit(url).scheme not in _KINDS:
                raise FetchError("the server redirected to something else than an http(s) URL")
        raise FetchError(f"more than {MAX_REDIRECTS} redirects")

    def _read(self, url: str) -> str | None:
        """Read what is at ``url``; where to look instead if it redirects."""
        connection, path, headers = self._open(url)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers)
            with connection.getresponse() as response:  # which has the socket from here on
                if response.status in (301, 302, 303, 307, 308) and response.headers.get(
                    "Location"
                ):
                    return response.headers["Location"]
                if response.status != 200:
                    raise FetchError(f"the server answered HTTP {response.status}")
                encoding = response.headers.get("Content-Encoding", "identity")
                if encoding.strip().lower() not in ("", "identity"):
                    raise FetchError("the server sent a compressed answer, which was not asked for")
                self._save(response)
        return None

    def _open(self, url: str) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
        """A connection that is not open yet, and the path and headers of the request."""
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname or "", parts.port
            host = host if host.isascii() else host.encode("idna").decode()
        except ValueError:
            raise FetchError(_NO_URL) from None
        kind = _KINDS.get(parts.scheme.lower())
        if kind is None or not host:
            raise FetchError(_NO_URL)
        # Spaces and letters beyond ASCII are common in URLs, though they should be quoted.
        path = urllib.parse.quote(parts.path or "/", safe=_KEPT)
        if parts.query:
            path += "?" + urllib.parse.quote(parts.query, safe=_KEPT)
        headers = {
            "User-Agent": os.environ.get("COG_USER_AGENT") or "kimi-audio",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        if parts.username is not None:
            pair = urllib.parse.unquote_to_bytes(f"{parts.username}:{parts.password or ''}")
            headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
        return kind(self, host, port), path, headers

    def connect(self, host: str, port: int) -> socket.socket:
        """A connection to one of the addresses of ``host``, all of which are permitted."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise FetchError(_NOT_PUBLIC) from None
        if not self._limits.private and not all(is_public(str(entry[4][0])) for entry in found):
            raise FetchError(_NOT_PUBLIC)
        problem: OSError | None = None
        for family, kind, protocol, _, address in found:
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(self.patience())
                self.hold(connection).connect(address)
                return connection
            except BaseException as error:
                connection.close()
                if not isinstance(error, OSError):
                    raise
                problem = error
        raise problem or FetchError(_NOT_PUBLIC)

    def _save(self, response: http.client.HTTPResponse) -> None:
        limit, announced = self._limits.size, response.length
        if (announced or 0) > limit:
            raise FetchError(_too_large(limit))
        while announced is None or self.size < announced:
            chunk = response.read1(CHUNK_BYTES)
            if not chunk:
                break
            if self.size + len(chunk) > limit:
                raise FetchError(_too_large(limit))
            self._write(chunk)
            self.size += len(chunk)
        if announced is not None and self.size < announced:  # other kinds of bodies raise
            raise FetchError(f"the connection ended {announced - self.size:,} bytes early")

    def _write(self, chunk: bytes) -> None:
        with self._lock:
            if self._stopped:
                raise FetchError(_GIVEN_UP)
            try:
                self._file.write(chunk)
            except OSError as error:
                raise FetchError(f"cannot be stored here ({error.strerror})") from error


_GIVEN_UP = "given up"
_NO_URL = "expected a URL such as https://host/file.wav"
_KEPT = "%:@!$&'()*+,;=~-._/?[]|{}^`"
_NOT_PUBLIC = (
    "not a public address; this service fetches URLs of public hosts only (KIMI_AUDIO_URLS)"
)
"""One message for all, so that names of the inner network cannot be told from unknown ones."""


def _too_large(limit: int) -> str:
    return f"larger than {limit / 1e6:,.0f} MB, the limit of this service for the URLs of a request"


class _Plain(http.client.HTTPConnection):
    """A connection to an address that the download has checked."""

    def __init__(self, download: _Download, host: str, port: int | None):
        super().__init__(host, port)
        self._download = download

    def connect(self) -> None:
        self.sock = self._download.connect(self.host, self.port)


class _Encrypted(http.client.HTTPSConnection):
    """The same with TLS, for the name in the URL."""

    def __init__(self, download: _Download, host: str, port: int | None):
        super().__init__(host, port, context=_trust())
        self._download = download

    def connect(self) -> None:
        plain = self._download.connect(self.host, self.port)
        # The handshake follows when stop() knows the new socket: wrapping takes it from the old.
        secure = _trust().wrap_socket(
            plain, server_hostname=self.host, do_handshake_on_connect=False
        )
        self.sock = self._download.hold(secure)
        secure.settimeout(self._download.patience())
        secure.do_handshake()


_KINDS = {"http": _Plain, "https": _Encrypted}


@cache
def _trust() -> ssl.SSLContext:
    """The system's certificates, and those that Python's HTTP clients bring for slim images."""
    import certifi  # which Cog requires, through requests

    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, and not one that only leads elsewhere."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _EMBEDDED:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if any(v4 is not None and not is_public(str(v4)) for v4 in inner):
            return False
        if ip.ipv4_mapped is not None:
            return True
        if ip not in _ALLOCATED and ip not in _EMBEDDED:
            return False
    return ip.is_global and not ip.is_multicast
