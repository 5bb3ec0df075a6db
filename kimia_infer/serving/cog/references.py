"""What callers send for a file: a data URI, which is decoded, or a URL, which is downloaded."""

from __future__ import annotations

import base64
import dataclasses
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

from kimia_infer.api.parameters import show
from kimia_infer.serving.cog.fetch import Downloader, Limits
from kimia_infer.utils.errors import RequestError

LONGEST_HEADER = 4096
"""Characters in which the data of a data URI must have begun."""

BASE64_MARK = re.compile(r'data:("[^"]*"|[^"])*?;\s*base64\s*,', re.IGNORECASE)
FIRST_COMMA = re.compile(r'data:([^",]|"[^"]*")*,', re.IGNORECASE)
"""Where the data begins; what is quoted does not count."""

_STANDARD = bytes.maketrans(b"-_", b"+/")


def store_all(references: Mapping[Path, str], downloader: Downloader, limits: Limits) -> None:
    """Write what callers sent to the paths that have the names of the inputs, within ``limits``.

    Raises:
        RequestError: naming the input and why its file cannot be had.
    """
    for path, reference in references.items():
        try:
            size = store(reference, path, downloader, limits)
        except RequestError as error:
            raise RequestError(f"{path.name}: {error}") from error
        limits = dataclasses.replace(limits, size=limits.size - size)


def store(reference: str, path: Path, downloader: Downloader, limits: Limits) -> int:
    """Write what a data URI or an http(s) URL stands for to ``path``; its size in bytes.

    Raises:
        RequestError: it has no content, cannot be decoded, downloaded or stored.
    """
    try:
        with path.open("wb") as file:
            if reference[:5].lower() == "data:":
                return file.write(decode_data_uri(reference))
            return downloader.fetch(reference, file, limits)
    except OSError as error:
        raise RequestError(f"cannot be stored on the server ({error.strerror})") from error


def decode_data_uri(uri: str) -> bytes:
    """The content of a data URI (RFC 2397): base64, or characters that may be percent-encoded.

    Base64 may also be the URL-safe kind, lack its padding, or have line breaks. Parameters may
    have commas: where ``;base64,`` occurs, the data begins after it.

    Raises:
        RequestError: no data, or characters that are not base64.
    """
    head = uri[:LONGEST_HEADER]
    if encoded := BASE64_MARK.match(head):
        content = decode_base64(uri[encoded.end() :])
    elif plain := FIRST_COMMA.match(head):
        content = urllib.parse.unquote_to_bytes(uri[plain.end() :].encode(errors="replace"))
    else:
        content = b""
    if not content:
        raise RequestError(
            "a data URI without content; expected data:audio/wav;base64, and the file in base64"
        )
    return content


def decode_base64(text: str) -> bytes:
    """Base64 in any of its common spellings; raises RequestError for what is none."""
    try:
        data = urllib.parse.unquote_to_bytes(text) if "%" in text else text.encode("ascii")
        data = data.translate(_STANDARD, b" \t\r\n\v\f").rstrip(b"=")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        wrong = re.search(r"[^A-Za-z0-9+/_%=\s-]|=+[^=\s]", text)
        reason = f"{show(wrong[0])} at character {wrong.start()}" if wrong else "it is cut off"
        raise RequestError(f"the data URI is not valid base64: {reason}") from error
