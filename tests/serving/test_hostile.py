"""Requests that nobody sane would send, to the real server: it answers all and stays well.

Every request must be answered with HTTP 200 (succeeded, or failed with a clear error) or 4xx,
and be followed by READY from the same processes; in between, normal requests must be answered
as ever. What arrived is printed as kind, status and count.

Ids of predictions are well-formed here: docs/deploy.md leaves others to a proxy.
"""

from __future__ import annotations

import base64
import collections
import hashlib
import http.client
import itertools
import json
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kimia_infer.models.kimi_audio.text_tokenizer import TextTokenizer, special_names
from kimia_infer.serving.cog.schema import read_inputs
from tests.audio.sounds import PLAYLISTS
from tests.paths import ROOT
from tests.serving.helpers import CASES, COG_PREFIX, Server, inputs_of
from tests.serving.hostile_audio import BOMB, Recipe, cook, originals, recipes
from tests.serving.hostile_requests import (
    BODIES,
    HEADERS,
    METHODS,
    ODD_HISTORIES,
    ODD_TEXTS,
    RAW,
    ROUTES,
    SHORT,
    SOUND,
    VALID,
    bodies,
    content_types,
    histories,
    ids,
    texts,
    values,
)

PATIENCE = 60
NORMAL_EVERY = 25
SPOKEN = {"text": "Where is the station?", "seed": 3, "max_new_tokens": 12}
LONG = settings.get_current_profile_name() == "long"

SECRETS = (str(ROOT), sys.prefix, "/tmp/", "site-packages", "Traceback", "coglet")
"""What no error may show; no request contains it."""


HUNG_UP = 0
BUFFERED = 10_000
"""Bytes that a connection surely takes before the server looks at them."""

BUSY = ("409, sent again", "409")


class Answer(NamedTuple):
    status: int
    content: bytes


def hostile(share: float) -> Callable[[Callable], Callable]:
    """``share`` of all requests; nothing is shrunk, as a server that is broken stays broken."""
    return settings(
        max_examples=max(1, int(share * (1500 if LONG else 120))),
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        database=None,
    )


class Target:
    """A server, what it has been asked, and what it must go on answering."""

    def __init__(self, server: Server):
        self.server = server
        self.processes = server.processes()
        self.sent: collections.Counter[tuple[str, str]] = collections.Counter()
        self.normal = itertools.cycle(CASES)
        self.spoken = self.ask(**SPOKEN)

    @property
    def names(self) -> re.Pattern[str]:
        """How an error of ours begins: with the input it is about."""
        names = "|".join(read_inputs("Predictor"))
        return re.compile(rf"{COG_PREFIX}({names})\b")

    def __repr__(self) -> str:
        return f"Target({self.server})"

    def predict(self, kind: str, inputs: dict[str, Any]) -> None:
        self.send(kind, "POST", "/predictions", json.dumps({"input": inputs}))

    def send(
        self, kind: str, method: str, path: str, body: str | bytes | None = None, **headers: str
    ) -> None:
        """One request, and what must be true of the answer and after it."""
        headers = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        deadline = time.monotonic() + PATIENCE
        while (answer := self.exchange(method, path, body, headers)).status == 409:
            # Ready it was; Cog takes a slot back only a moment after it has said so.
            assert time.monotonic() < deadline
            self.sent[BUSY] += 1
        status, content = answer
        assert status in (HUNG_UP, 200, 202) or 400 <= status < 500, content
        outcome = str(status) if status else "hung up"
        if path.startswith("/predictions") and status == 200:
            outcome += " " + self.check_prediction(content)
        self.check_well(kind, outcome)

    def exchange(
        self, method: str, path: str, body: str | bytes | None, headers: dict[str, str]
    ) -> Answer:
        """One answer, or HUNG_UP where the server would not take the whole request."""
        connection = http.client.HTTPConnection(self.address, timeout=PATIENCE)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, response.read())
        except (BrokenPipeError, ConnectionResetError):
            assert len(body or "") > BUFFERED, "hung up on a small request"
            return Answer(HUNG_UP, b"")
        finally:
            connection.close()

    @property
    def address(self) -> str:
        return self.server.url.partition("//")[2]

    def check_prediction(self, content: bytes) -> str:
        """Status of a prediction whose answer is as promised, also where it failed."""
        answer = json.loads(content)
        if "status" not in answer:  # of a cancellation
            return "canceled"
        assert answer["status"] in ("succeeded", "failed", "canceled"), answer
        assert not answer.get("logs"), answer["logs"]
        if answer["status"] == "failed":
            error = answer["error"]
            assert error == error.strip() and len(error.splitlines()) == 1, error
            assert len(error) < 2000, error
            assert not [secret for secret in SECRETS if secret in error], error
            assert self.names.match(error), error
        return answer["status"]

    def check_well(self, kind: str, outcome: str) -> None:
        """READY, with the processes of the beginning; from time to time, normal answers."""
        self.server.wait_for("READY")
        self.sent[kind, outcome] += 1
        if self.sent.total() % NORMAL_EVERY == 0:
            self.check_normal()

    def check_normal(self) -> None:
        assert self.server.processes() == self.processes
        case = next(self.normal)
        assert self.ask(**inputs_of(case))[0] == case["text"]
        assert self.ask(**SPOKEN) == self.spoken

    def ask(self, **inputs: Any) -> tuple[str, str]:
        """Text and a digest of the sound of a normal answer."""
        output = self.server.succeed(**inputs)["output"]
        sound = (output["audio"] or "").encode()
        return output["text"], hashlib.sha256(sound).hexdigest()


@pytest.fixture(scope="module")
def target(server: Server) -> Iterator[Target]:
    target = Target(server)
    yield target
    target.check_normal()
    log = (server.files.parent / "log").read_text()
    assert "panicked" not in log and "Traceback" not in log
    assert max(map(len, log.splitlines())) < 2100, "names and values are not written in full"
    counts = [f"  {kind}: {outcome}: {n}" for (kind, outcome), n in sorted(target.sent.items())]
    print("", f"{target.sent.total()} requests", *counts, sep="\n")


@pytest.fixture(scope="module")
def files(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    source = golden / "e2e" / "audio" / "station.wav"
    return originals(tmp_path_factory.mktemp("sounds"), source)


def test_every_known_oddity(target: Target) -> None:
    """Each of those that the draws below pick from, so that a sample leaves none out."""
    for text in ODD_TEXTS:
        target.predict("texts", SHORT | {"text": text})
    for history in ODD_HISTORIES:
        target.predict("histories", SHORT | {"history": history})
    for body in BODIES:
        target.send("bodies", "POST", "/predictions", body)
    target.predict("values", SHORT | {"tempature" * 200_000: 1})


@hostile(0.2)
@given(inputs=values)
def test_values_of_any_type_and_size(target: Target, inputs: dict[str, Any]) -> None:
    target.predict("values", inputs)


@hostile(0.12)
@given(body=bodies, content_type=content_types)
def test_bodies_that_are_no_request(target: Target, body: bytes, content_type: str) -> None:
    target.send("bodies", "POST", "/predictions", body, Content_Type=content_type)


@hostile(0.1)
@given(text=texts, task=st.sampled_from(["chat", "transcribe"]), speak=st.booleans())
def test_texts(target: Target, text: str, task: str, speak: bool) -> None:
    sound = {"audio": SOUND} if task == "transcribe" else {}
    output = {"output_type": "both"} if speak else {}
    target.predict("texts", SHORT | {"text": text, "task": task} | sound | output)


@hostile(0.15)
@given(history=histories, count=st.integers(0, 2))
def test_histories(target: Target, history: str, count: int) -> None:
    target.predict("histories", SHORT | {"history": history, "history_audio": [SOUND] * count})


def sound_inputs(content: bytes, place: str, declared: str) -> dict[str, Any]:
    uri = f"data:{declared};base64,{base64.b64encode(content).decode()}"
    if place == "history_audio":
        message = {"role": "user", "message_type": "audio", "content": 0}
        return SHORT | {"history": json.dumps([message]), place: [uri]}
    if place == "voice":
        return SHORT | {place: uri, "output_type": "both"}
    return SHORT | {"audio": uri, "task": place}


DECLARED = st.sampled_from(["audio/wav", "audio/mpeg", "video/mp4", "", "text/html", "x/../y"])
PLACES = ["chat", "transcribe", "history_audio", "voice"]


@hostile(0.3)
@given(recipe=recipes, place=st.sampled_from(PLACES), declared=DECLARED)
def test_sounds(
    target: Target, files: dict[str, bytes], recipe: Recipe, place: str, declared: str
) -> None:
    content = cook(recipe, files)
    if len(content) > 500_000 or (recipe[0] == BOMB and place == "transcribe"):
        place = "chat"
    target.predict(f"sounds, {recipe[0]}", sound_inputs(content, place, declared))


@hostile(0.08)
@given(
    method=st.sampled_from(METHODS),
    route=st.sampled_from(ROUTES),
    name=ids,
    headers=st.sampled_from(HEADERS),
    trial=st.integers(0, 3),
)
def test_routes_and_headers(
    target: Target, method: str, route: str, name: str, headers: dict[str, str], trial: int
) -> None:
    if trial == 0:
        target.send("methods", method, route, VALID)
    elif trial == 1:
        target.send("cancels", "POST", f"/predictions/{name}/cancel", VALID)
    elif trial == 2:
        target.send("ids", "PUT", f"/predictions/{name}", VALID, **headers)
    else:
        target.send("headers", "POST", "/predictions", VALID, **headers)


@hostile(0.05)
@given(raw=st.one_of(st.sampled_from(RAW), st.binary(max_size=60)), close=st.booleans())
def test_broken_connections(target: Target, raw: bytes, close: bool) -> None:
    """What is no HTTP at all may be left without an answer, but never with 5xx."""
    host, _, port = target.address.partition(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        answer = b""
        try:
            connection.sendall(raw)
            if not close:
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(100)
        except TimeoutError:
            raise
        except OSError:
            pass  # hung up on while sending, as is right
    assert not re.match(rb"HTTP/\S+ 5", answer), answer
    status = re.match(rb"HTTP/1.. (\d+)", answer)
    target.check_well("connections", status[1].decode() if status else "no HTTP answer")


def test_playlists_open_nothing(target: Target, files: dict[str, bytes], tmp_path: Path) -> None:
    """A playlist that names a sound that is there is not answered with that sound."""
    sounds = {"tone.wav": "pcm.wav", "tone.ts": "mp2.ts", "tone.m4a": "aac.m4a"}
    for name, source in sounds.items():
        (tmp_path / name).write_bytes(files[source])
    for playlist in PLAYLISTS.values():
        content = playlist(tmp_path).encode()
        error = target.server.fail(**sound_inputs(content, "chat", "audio/wav"))
        assert " audio: " in error and str(tmp_path) not in error


def test_special_tokens_that_users_type_are_plain_text(server: Server, golden: Path) -> None:
    """The prompt is as long as ordinary characters make it, and is answered as such."""
    tokenizer = TextTokenizer(golden / "e2e" / "checkpoint")

    def ask(text: str) -> tuple[int, str]:
        sampling = {"max_new_tokens": 12, "text_temperature": 2.0, "text_top_k": 0, "seed": 5}
        answer = server.succeed(**SHORT | sampling | {"text": text})
        return answer["metrics"]["prompt_tokens"], answer["output"]["text"]

    base, plain = ask("a")
    names = [name for name in special_names() if "reserved" not in name]
    differing = 0
    for name in [*names, special_names()[-1]]:
        tokens = tokenizer.encode("a" + name)
        assert max(tokens) < tokenizer.base_tokens and tokenizer.decode(tokens) == "a" + name
        prompt, answer = ask("a" + name)
        assert prompt - base == len(tokens) - len(tokenizer.encode("a")) > 1
        differing += answer != plain
    assert differing > len(names) / 2


def test_all_kinds_were_sent(target: Target, long: bool) -> None:
    """Last; after only some of the tests it has nothing to check."""
    kinds = {kind.partition(",")[0] for kind, _ in target.sent}
    if not kinds >= {"values", "bodies", "texts", "histories", "connections"}:
        pytest.skip("only some of the tests ran")
    assert target.sent.total() >= (1000 if long else 100)
    assert kinds >= {"methods", "cancels", "ids", "headers"}
