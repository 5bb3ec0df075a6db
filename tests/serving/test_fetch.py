"""Downloads of callers' URLs: of permitted addresses alone, bounded in bytes and seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import ipaddress
import socket
import ssl
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimia_infer.serving.cog import fetch as module
from kimia_infer.serving.cog.fetch import (
    SPARE_THREADS,
    Downloader,
    FetchError,
    Limits,
    is_public,
)
from kimia_infer.utils.errors import RequestCancelled
from tests.serving.helpers import PATIENCE
from tests.serving.web import Behaviour, answers, drips, floods, is_silent, web

SOUND = bytes(range(256)) * 1000
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
DOWNLOADER = Downloader(1)
fetch = DOWNLOADER.fetch

LATE = 0.5
"""How much later than its limit a download may end on a busy machine."""


def limits(seconds: float = 30.0, size: int = 10**6, private: bool = True) -> Limits:
    return Limits(time.monotonic(), seconds, size, private)


def refused(url: str, permitted: Limits | None = None) -> str:
    file = io.BytesIO()
    with pytest.raises(FetchError) as caught:
        fetch(url, file, permitted or limits())
    assert len(file.getvalue()) <= (permitted or limits()).size
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 200 and url not in message
    return message


def wait_for_threads() -> None:
    """A download that was given up leaves no busy thread and no connection."""
    deadline = time.monotonic() + PATIENCE
    while DOWNLOADER.busy:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "behaviour",
    [
        answers(SOUND),
        lambda connection: connection.sendall(OK + b"\r\n" + SOUND),
        lambda connection: connection.sendall(
            CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(SOUND), SOUND)
        ),
    ],
    ids=["length", "until the end", "chunks"],
)
def test_content_arrives(behaviour: Behaviour) -> None:
    with web(behaviour) as server:
        file = io.BytesIO()
        assert fetch(server.url, file, limits()) == len(SOUND)
    assert file.getvalue() == SOUND


def test_redirects_are_followed() -> None:
    with web(answers(SOUND)) as last, web(answers(b"", "302 Found", Location=last.url)) as first:
        file = io.BytesIO()
        assert fetch(first.url.upper().replace("SOUND.WAV", "a b?c=ü"), file, limits())
    assert file.getvalue() == SOUND


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (answers(b"no", "404 Not Found"), "HTTP 404"),
        (answers(b"", "204 No Content"), "HTTP 204"),
        (answers(SOUND, Content_Length="300000"), "ended 44,000 bytes early"),
        (lambda connection: connection.sendall(CHUNKED + b"ff\r\nab"), "no readable answer"),
        (answers(SOUND, Content_Length="99999999999"), "larger than 1 MB"),
        (answers(SOUND, Content_Encoding="gzip"), "compressed"),
        (answers(b"", "302 Found", Location="/again"), "more than 5 redirects"),
        (
            answers(b"", "302 Found", Location="file:///etc/hostname"),
            "redirected to something else",
        ),
        (answers(b"", "302 Found", Location="http://[::1"), "no readable answer"),
        (lambda connection: connection.sendall(b"SSH-2.0-x\r\n"), "no readable answer"),
        (lambda connection: connection.sendall(OK + b"x: y\r\n" * 1000), "no readable answer"),
        (lambda connection: None, "failed"),
        (floods, "larger than 1 MB"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_sound_is_refused_at_once(behaviour: Behaviour, message: str) -> None:
    with web(behaviour) as server:
        assert message in refused(server.url)
    wait_for_threads()


@pytest.mark.parametrize(
    "url",
    [
        *("http://", "http:///a", "http://[::1", "http://127.0.0.1:99999/", "http://a:b/"),
        *(
            "ftp://a/b",
            f"https://é{80 * 'x'}.test",
            "http://a b/",
            "http://127.0.0.1:1/",
            "http://\x00/",
        ),
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    assert refused(url)


@pytest.mark.parametrize(
    "behaviour",
    [
        is_silent,
        drips(b""),
        drips(OK),
        drips(OK + b"X: "),
        drips(OK + b"\r\n"),
        drips(OK + b"Content-Length: 99999\r\n\r\n"),
        drips(CHUNKED),
    ],
    ids=["nothing", "status", "headers", "header", "body", "length", "chunk"],
)
def test_slow_server_is_left_in_time(behaviour: Behaviour) -> None:
    with web(behaviour) as server:
        begun = time.monotonic()
        assert "not read completely within 0.3 s" in refused(server.url, limits(0.3))
        assert time.monotonic() - begun < 0.3 + LATE
        assert server.left.wait(PATIENCE), "the connection stays open"
    wait_for_threads()


def test_slow_handshake_is_left_in_time() -> None:
    with web(drips(b"\x16\x03\x03\x40\x00")) as server:
        refused(server.url.replace("http", "https"), limits(0.3))
        assert server.left.wait(PATIENCE)
    wait_for_threads()


CERTIFICATE = """\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIEHdT2jt3E9jsZ7ZEOy1R4d7OX9fNKa96k8u7e+p+NfZoAoGCCqGSM49
AwEHoUQDQgAEKrV8U81fLujDfz02pMzx15TKgfgi6a0NYrv3EUm15MC7e4X9qklR
q6WVUpPwG3gspTdARnbgQxYB7+yPLdidWg==
-----END EC PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBlTCCATugAwIBAgIUeLGFZD+ZG/xbBxU4IrKpA0i6Cg0wCgYIKoZIzj0EAwIw
FTETMBEGA1UEAwwKb3RoZXIudGVzdDAgFw0yNjExMjkxNjMyNDJaGA8yMTI2MTEw
NTE2MzI0MlowFTETMBEGA1UEAwwKb3RoZXIudGVzdDBZMBMGByqGSM49AgEGCCqG
SM49AwEHA0IABCq1fFPNXy7ow389NqTM8deUyoH4IumtDWK79xFJteTAu3uF/apJ
UaullVKT8Bt4LKU3QEZ24EMWAe/sjy3YnVqjZzBlMB0GA1UdDgQWBBTkXocyKUbQ
vDAElPO6scHYacQLqTAfBgNVHSMEGDAWgBTkXocyKUbQvDAElPO6scHYacQLqTAV
BgNVHREEDjAMggpvdGhlci50ZXN0MAwGA1UdEwQFMAMBAf8wCgYIKoZIzj0EAwID
SAAwRQIhALoSE+tFmsSkl4M2pam9zIZA6x8aanJ+vRYvaWzGLMLDAiAz6f+wymNM
DfwvnDSJbMYovM6vYAljzncBL+wiZj34SQ==
-----END CERTIFICATE-----
"""
"""A key made for this test, and a certificate signed with it, for other.test and 100 years."""


@pytest.mark.parametrize(
    ("trusted", "message"),
    [(False, "certificate is not valid (self-signed"), (True, "certificate is not valid (IP addr")],
    ids=["issuer", "host"],
)
def test_certificates_are_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trusted: bool, message: str
) -> None:
    path = tmp_path / "certificate"
    path.write_text(CERTIFICATE)
    if trusted:
        monkeypatch.setattr(module, "_trust", lambda: ssl.create_default_context(cafile=path))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def shake_hands() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                context.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=shake_hands)
        thread.start()
        assert message in refused(f"https://127.0.0.1:{listener.getsockname()[1]}/")
        thread.join()


def test_server_without_encryption_is_named() -> None:
    with web(answers(SOUND)) as server:
        url = server.url.replace("http", "https")
        assert "no encrypted connection could be made" in refused(url)


def test_slow_name_server_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, downloader = threading.Event(), Downloader(1)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: answer.wait(PATIENCE) and [])

    def attempt() -> None:
        downloader.fetch("http://slow.test/", io.BytesIO(), limits(0.1))

    for _ in range(1 + SPARE_THREADS):
        with pytest.raises(FetchError, match="not read completely"):
            attempt()
    with pytest.raises(FetchError, match="too many earlier downloads"):
        attempt()
    answer.set()
    deadline = time.monotonic() + PATIENCE
    while downloader.busy:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(FetchError, match="not a public address"):
        attempt()


def test_cancellation_reaches_a_download() -> None:
    cancelled, ended = threading.Event(), threading.Event()

    def check() -> None:
        if cancelled.is_set():
            raise RequestCancelled("by its caller")

    def download(url: str) -> None:
        try:
            fetch(url, io.BytesIO(), dataclasses.replace(limits(), check=check))
        except RequestCancelled:
            ended.set()

    with web(drips(OK)) as server:
        thread = threading.Thread(target=download, args=(server.url,))
        thread.start()
        while not server.called_at:
            time.sleep(0.01)
        begun = time.monotonic()
        cancelled.set()
        assert ended.wait(PATIENCE) and time.monotonic() - begun < LATE
        assert server.left.wait(PATIENCE)
    thread.join()
    wait_for_threads()


def test_a_download_starts_no_thread() -> None:
    """They are started with the service, so that their number has a limit."""
    with web(answers(SOUND)) as server:
        before = threading.active_count()
        counts = []
        file = io.BytesIO()
        file.write = lambda chunk: counts.append(threading.active_count())  # type: ignore
        fetch(server.url, file, limits())
    assert set(counts) <= {before, before + 1}, "one is of the server"


def test_full_disk_is_named() -> None:
    with (
        web(answers(SOUND)) as server,
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(FetchError, match=r"cannot be stored here .*No space left on device"),
    ):
        fetch(server.url, full, limits())


PRIVATE = [
    *(
        "127.0.0.1",
        "127.9.9.9",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.0.1",
        "169.254.169.254",
    ),
    *(
        "100.64.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "203.0.113.9",
        "224.0.0.1",
        "239.1.1.1",
        "240.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
    ),
    *(
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12::1",
        "ff02::1",
        "2001:db8::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
    ),
    *("::127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b:1::10.0.0.1", "fec0::1", "4000::1"),
    *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a00:1::1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are(address: str) -> None:
    assert is_public(address)


@given(st.ip_addresses(v=4))
def test_however_an_address_is_embedded_it_is_judged_alike(inner: ipaddress.IPv4Address) -> None:
    public = is_public(str(inner))
    for prefix in ("::ffff:", "64:ff9b::"):
        assert is_public(f"{prefix}{inner}") == public
    assert public or not is_public(str(ipaddress.IPv6Address(0x2002 << 112 | int(inner) << 80)))


SPELLINGS = ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "0", "localhost", "[::1]"]
SPELLINGS += ["[::ffff:127.0.0.1]", "localhost.", "no.such.invalid"]


@pytest.mark.parametrize("host", SPELLINGS)
def test_this_machine_is_not_called(host: str) -> None:
    with web(answers(SOUND)) as server:
        message = refused(f"http://{host}:{server.port}/", limits(private=False))
        assert message.startswith("not a public address") and "KIMI_AUDIO_URLS" in message
        assert server.called_at == []


def test_redirect_to_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_public", lambda address: address == "127.0.0.2")
    with (
        web(answers(SOUND)) as inner,
        web(answers(b"", "307 Temporary Redirect", Location=inner.url), "127.0.0.2") as outer,
    ):
        assert "not a public address" in refused(outer.url, limits(private=False))
        assert outer.called_at == ["127.0.0.2"] and inner.called_at == []


def test_address_that_was_checked_is_the_one_that_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name server may give another address the next time it is asked."""
    monkeypatch.setattr(module, "is_public", lambda address: address == "127.0.0.2")
    given = iter(["127.0.0.2", "127.0.0.1"])

    def rebinding(host: str, port: int, **options: int) -> list:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(given), port))]

    with web(answers(SOUND), "0.0.0.0") as server:
        monkeypatch.setattr(socket, "getaddrinfo", rebinding)
        url = f"http://rebinding.test:{server.port}/"
        assert fetch(url, io.BytesIO(), limits(private=False)) == len(SOUND)
        assert server.called_at == ["127.0.0.2"]
        assert "not a public address" in refused(url, limits(private=False))


def test_one_private_address_among_public_ones_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 1)) for a in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: found)
    assert "not a public address" in refused("http://both.test/", limits(private=False))


def test_proxies_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with web(answers(SOUND)) as server:
        assert fetch(server.url, io.BytesIO(), limits()) == len(SOUND)
