"""Requests that nobody sane would send, drawn by hypothesis: values, bodies, routes, bytes."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from kimia_infer.models.kimi_audio.text_tokenizer import special_names
from kimia_infer.serving.cog.schema import read_inputs
from tests.paths import GOLDEN
from tests.serving.helpers import data_uri

SHORT = {"text": "a", "output_type": "text", "max_new_tokens": 2}
"""A request that is answered at once."""

SOUND = data_uri((GOLDEN / "e2e" / "audio" / "station.wav").read_bytes())

SPECIAL = st.sampled_from(special_names())
ODD_TEXTS = (
    "\x00",
    "\u202e\u2066right to left\u2069",
    "👩‍👩‍👧‍👦🏴‍☠️",
    "é" * 3,
    "a" + "\u0301" * 500,
    "\ufeff\ufffe\uffff\U0010ffff",
    "\ud800",
    "\udfff\ud800",
    "\\u0000\\ud800",
    "%s%n{}{0}${jndi:ldap://127.0.0.1}",
    "'; DROP TABLE tokens; --",
    "$(reboot)`reboot`",
    "../" * 20,
    " \t\r\n\x0b\x0c\x1b[31m\u2028\u2029",
    "word " * 10_000,
    "x" * 50_000,
    "x" * 50_001,
    " " * 50_000,
    "語" * 50_000,
    "chats[0]: chats[999999].content",
)
texts = st.one_of(
    st.sampled_from(ODD_TEXTS),
    st.text(max_size=200),
    st.lists(st.one_of(SPECIAL, st.text(max_size=5))).map("".join),
)
any_number = st.one_of(
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([-0.0, 3.0, 5e-324, 1.7e308, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30]),
)
leaves = st.one_of(st.none(), st.booleans(), any_number, texts)
any_json = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
references = st.one_of(
    st.just(SOUND),
    st.sampled_from(
        [
            *("", "/etc/hostname", "file:///etc/hostname", "predict.py", "\x00", "~", "."),
            *("data:", "data:,", "data:audio/wav", "data:;base64", "data:;base64,A", "data:x,%ZZ"),
            *("data:audio/../../x;base64,AAAA", "DATA:audio/wav;base64,AAAA", "data:,http://x"),
            *("http://", "http://127.0.0.1:1/a", "http://[::1", "http://127.0.0.1:99999/"),
            *("https://127.0.0.1:1", "ftp://a/b", "gopher://127.0.0.1:1", "//127.0.0.1", "s3://a"),
            SOUND[:-1],
            SOUND[:1000],
            SOUND.replace("base64,", "base64,\n "),
            SOUND.replace("base64", "base65"),
        ]
    ),
    st.text(max_size=30).map(lambda text: "data:" + text),
)


def valid(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that the input takes, its limits among them."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema["type"] == "array":
        return st.lists(references, max_size=3)
    if schema["type"] == "string":
        return references if schema.get("format") == "uri" else texts
    strategy = st.integers if schema["type"] == "integer" else st.floats
    limits = (schema["minimum"], schema["maximum"])
    return st.one_of(st.sampled_from(limits), strategy(*limits))


def bounded(inputs: dict[str, Any]) -> dict[str, Any]:
    """``inputs`` with few steps where it asks for many: the length of answers is not at issue."""
    steps = inputs["max_new_tokens"]
    if isinstance(steps, int | float) and not isinstance(steps, bool) and not 0 <= steps <= 8:
        return inputs | {"max_new_tokens": 8} if -1 <= steps <= 7500 else inputs
    return inputs


INPUTS = read_inputs("Predictor")
odd = {name: st.one_of(valid(schema), any_json) for name, schema in INPUTS.items()}
chosen = st.lists(st.sampled_from(list(odd)), min_size=1, max_size=4, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: odd[name] for name in names})
)
unknown = st.dictionaries(st.text(max_size=20), any_json, max_size=1)
values = st.builds(lambda extra, found: bounded(extra | SHORT | found), unknown, chosen)
"""Inputs of which some are odd, of the wrong type, or unknown."""

roles = st.one_of(st.sampled_from(["user", "assistant", "system", "", "USER"]), leaves)
types = st.one_of(st.sampled_from(["text", "audio", "audio-text", None, "video"]), leaves)
contents = st.one_of(
    texts,
    st.integers(-2, 3),
    st.tuples(st.one_of(st.integers(-1, 2), leaves), texts).map(list),
    any_json,
)
well_formed = st.fixed_dictionaries({"role": roles, "message_type": types, "content": contents})
messages = st.one_of(
    well_formed,
    st.sampled_from(["text", "audio", "audio-text"]).flatmap(
        lambda kind: st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant"]), "message_type": st.just(kind)}
            | {"content": contents}
        )
    ),
    st.tuples(well_formed, st.dictionaries(st.text(max_size=8), leaves, max_size=2)).map(
        lambda pair: pair[1] | pair[0]
    ),
    any_json,
)
chats = st.lists(messages, min_size=1, max_size=4).map(json.dumps)
ODD_HISTORIES = (
    "[" * 100_000,
    "[" * 900 + "]" * 900,
    '{"a":' * 30_000,
    "[NaN, Infinity]",
    "[1e999]",
    "9" * 5000,
    '["\\ud800"]',
    '[{"role": "user", "role": "system"}]',
    json.dumps([{"role": "user", "message_type": "text", "content": "a"}] * 2000),
    json.dumps("x" * 100_000),
    json.dumps([{"x" * 100_000: "a"}]),
    json.dumps([{"role": "x" * 100_000, "message_type": "text", "content": "a"}]),
    json.dumps([{"role": "user", "message_type": "audio", "content": "x" * 100_000}]),
)
histories = st.one_of(
    chats,
    chats,
    any_json.map(json.dumps),
    texts,
    st.tuples(chats, st.floats(0, 1)).map(lambda pair: pair[0][: int(pair[1] * len(pair[0]))]),
    st.sampled_from(ODD_HISTORIES),
)

LITERALS = (
    *("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400", "-0.0", "-0", "01", "1.", ".5"),
    *("+1", "0x10", "1_000", "1e5", "1E+2", "9" * 400, "-" + "9" * 30, "0." + "0" * 400 + "1"),
    *("True", "nul", "'a'", '"\\ud800"', '"\\x"', '"\t"', '"\\u12"', "[1,]", "{}{}", "/**/1", ""),
)
NUMBERS = [name for name, schema in INPUTS.items() if schema["type"] in ("integer", "number")]

VALID = json.dumps({"input": SHORT}).encode()
LIMIT = b'"max_new_tokens": 2'
CHANGEABLE = [*range(VALID.index(LIMIT)), *range(VALID.index(LIMIT) + len(LIMIT), len(VALID))]
"""Positions outside the step limit, without which one answer would take most of the time."""
BODIES = (
    *(b"", b"null", b"[]", b"1", b'"a"', b"{}", b'{"input":null}', b'{"input":[]}', b'{"input":1}'),
    *(b'{"input":{"text":"a"},"id":1}', b'{"id":{},"input":{}}', b'{"webhook":1,"input":{}}'),
    *(b'{"webhook_events_filter":["x"],"input":{}}', b'{"context":{"a":1},"input":{}}'),
    *(b"[" * 200_000, b'{"input":' * 100_000, b'{"input":{"text":' + b"[" * 500),
    b'{"input":{"text":"a","x":' + b"[" * 120 + b"]" * 120 + b',"max_new_tokens":1}}',
    b'{"input":{' + b",".join(b'"k%d":%d' % (i, i) for i in range(50_000)) + b"}}",
    VALID.replace(b'"text"', b'"text": 1, "text"', 1),
    b"\xef\xbb\xbf" + VALID,
    VALID.decode().encode("utf-16"),
    VALID.replace(b'"a"', b'"\xff\xfe"'),
    VALID.replace(b'"a"', b'"\xed\xa0\x80"'),
    VALID + b"\x00",
    VALID * 2,
)
bodies = st.one_of(
    st.sampled_from(BODIES),
    st.binary(max_size=100),
    st.integers(0, len(VALID) - 1).map(lambda end: VALID[:end]),
    st.builds(
        lambda at, what: VALID[:at] + what + VALID[at + 1 :],
        st.sampled_from(CHANGEABLE),
        st.binary(max_size=3),
    ),
    st.builds(
        lambda name, literal: VALID[:-2] + f', "{name}": {literal}}}}}'.encode(),
        st.sampled_from(NUMBERS),
        st.sampled_from(LITERALS),
    ),
)
content_types = st.sampled_from(
    [
        *("application/json", "application/json", "application/json; charset=utf-16", ""),
        *("text/plain", "multipart/form-data; boundary=x", "multipart/form-data", "a" * 5000),
        *("application/x-www-form-urlencoded", "application/vnd.a+json", "\xff", "text/event"),
    ]
)

METHODS = ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "NONSENSE")
ROUTES = ("/", "/x", "/predictions", "/predictions/x", "/predictions//cancel", "/health-check/")
ROUTES += ("/predictions/%ff/cancel", "/predictions/x/cancel", "/predictions?a=1", "/%00", "//")
ROUTES += ("/predictions/x/y/z", "/openapi.json", "/docs", "/" + "a" * 5000, "/trainings/x/cancel")
ids = st.text("abcXYZ019-_", min_size=1, max_size=60)
HEADERS = (
    *({"Prefer": "respond-async"}, {"Prefer": "a,,;="}, {"Accept": "image/png"}, {"Accept": "é"}),
    *({"Transfer-Encoding": "x"}, {"Content-Encoding": "gzip"}, {"Expect": "nothing"}),
    *({"traceparent": "zz"}, {"X": "a" * 10_000}, {"Host": ""}, {"Range": "bytes=0-1"}),
    *({"Content-Length": "3"}, {"Cookie": "\xff" * 100}, {"Connection": "upgrade"}),
)


POST = b"POST /predictions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
RAW = (
    *(b"", b"\x00" * 100, b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"),
    *(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET " + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n"),
    *(POST, POST + b"Content-Length: 99\r\n\r\n" + VALID, POST + b"Content-Length: -1\r\n\r\n"),
    POST + b"Content-Length: 1099511627776\r\n\r\n" + VALID,
    POST + b"Content-Length: 99\r\nContent-Length: 1\r\n\r\n" + VALID,
    POST + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n" + VALID,
    POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    POST + b"X: y\r\n" * 5000 + b"\r\n",
    POST + b"Content-Length: %d\r\n\r\n%b" % (len(VALID), VALID) * 3,
)
