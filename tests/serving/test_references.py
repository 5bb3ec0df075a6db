"""Data URIs as callers write them: read rightly, or refused in one line."""

from __future__ import annotations

import base64
import time
import urllib.parse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimia_infer.serving.cog.fetch import Downloader, Limits
from kimia_infer.serving.cog.references import decode_data_uri, store
from kimia_infer.utils.errors import RequestError
from tests.serving.web import answers, web

headers = st.sampled_from(
    [
        *("data:audio/wav", "data:", "DATA:Audio/WAV", "data:audio/wav;codecs=1", "data:;x=y"),
        *('data:audio/wav;name="a,b"', "data:audio/wav;name=a,b", 'data:audio/wav;n=",;base64 ,"'),
        "data:audio/ogg; codecs=opus",
    ]
)
marks = st.sampled_from([";base64,", ";BASE64,", "; base64 ,"])


@st.composite
def spelled(draw: st.DrawFn, content: bytes) -> str:
    """``content`` in one of the ways that base64 is written in."""
    encode = draw(st.sampled_from([base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes]))
    text = encode(content).decode()
    if draw(st.booleans()):
        text = text.replace("=", "")
    if draw(st.booleans()):
        text = urllib.parse.quote(text)
    return text


@given(st.data(), st.binary(min_size=1, max_size=100), headers, marks)
def test_every_spelling_has_the_same_content(
    data: st.DataObject, content: bytes, header: str, mark: str
) -> None:
    uri = header + mark + data.draw(spelled(content))
    assert decode_data_uri(uri) == content


@given(
    st.binary(min_size=1, max_size=50),
    st.sampled_from(["data:,", "data:audio/wav,", 'data:audio/wav;name="a,b",']),
)
def test_percent_encoding_is_read(content: bytes, header: str) -> None:
    assert decode_data_uri(header + urllib.parse.quote(content)) == content


@pytest.mark.parametrize(
    "uri",
    [
        *("data:", "data:,", "data:audio/wav", "data:;base64", "data:;base64,", "data:;base64,=="),
        *("data:audio/wav;base64, \n", "data:audio/wav;x=" + "y" * 10_000 + ";base64,AAAA"),
    ],
    ids=lambda uri: uri[:30],
)
def test_missing_content_is_named(uri: str) -> None:
    with pytest.raises(RequestError, match="a data URI without content; expected data:audio/wav"):
        decode_data_uri(uri)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("AAA!", "'!' at character 3"),
        ("A", "it is cut off"),
        ("AAAAA", "it is cut off"),
        ("AAAAé", "'é' at character 4"),
        ("AA==AA", "'==A' at character 2"),
        ("AAAA,AAAA", "',' at character 4"),
        ("%ZZAA", "not valid base64"),
        ("\ud800", "at character 0"),
    ],
)
def test_wrong_base64_is_named(data: str, reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode_data_uri(f"data:audio/wav;base64,{data}")
    message = str(caught.value)
    assert message.startswith("the data URI is not valid base64: ") and reason in message


@given(st.text(max_size=60))
def test_any_text_is_decoded_or_refused(text: str) -> None:
    for uri in (f"data:{text}", f"data:;base64,{text}"):
        try:
            assert decode_data_uri(uri)
        except RequestError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 200


DOWNLOADER = Downloader(1)


def limits() -> Limits:
    return Limits(time.monotonic(), 10.0, 1000, private=True)


def test_both_kinds_are_stored(tmp_path: Path) -> None:
    assert store("data:;base64,UklGRg", tmp_path / "a", DOWNLOADER, limits()) == 4
    with web(answers(b"RIFF")) as server:
        assert store(server.url, tmp_path / "b", DOWNLOADER, limits()) == 4
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"RIFF"


def test_what_cannot_be_stored_is_said(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"cannot be stored on the server .No such file"):
        store("data:,x", tmp_path / "missing" / "a", DOWNLOADER, limits())
    with pytest.raises(RequestError, match=r"cannot be stored on the server .No space left"):
        store("data:,x", Path("/dev/full"), DOWNLOADER, limits())
