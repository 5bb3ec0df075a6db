"""What the page says when something is missing, refused or gone."""

from __future__ import annotations

import pytest

from tests.serving.page.browser import Browser, Tab
from tests.serving.page.room import ROOM
from tests.serving.page.scripted_server import KEY, ScriptedServer

MISSING = """
navigator.mediaDevices.getUserMedia = async () => { throw new DOMException("", "NotFoundError"); };
"""


ANSWERS = "#turns .model:not(.pending)"


def send(tab: Tab, text: str = "hello") -> None:
    tab.evaluate(f"message.value = {text!r}; composer.requestSubmit()")


def assert_typing_works(tab: Tab) -> None:
    tab.state("ready")
    answers = len(tab.texts(ANSWERS))
    send(tab)
    tab.until(f"document.querySelectorAll({ANSWERS!r}).length === {answers + 1}")
    tab.state("ready")
    assert tab.texts(f"{ANSWERS} p")[-1] == "the answer is nine"
    assert tab.evaluate("talk.getAttribute('aria-pressed')") == "false"


def test_a_refused_microphone(browser: Browser, scripted: ScriptedServer) -> None:
    with browser.open(scripted.url, microphone="denied") as tab:
        tab.state("ready")
        tab.click("#talk")
        tab.shows("The browser was not allowed to use the microphone")
        assert tab.evaluate("notice.getAttribute('role')") == "alert"
        assert_typing_works(tab)


def test_a_server_that_writes_only_is_asked_for_text(
    browser: Browser, scripted: ScriptedServer
) -> None:
    """Unless Kokoro speaks for it."""
    scripted.described = {"output_modalities": ["text"]}
    with browser.open(scripted.url) as tab:
        assert_typing_works(tab)
        tab.evaluate("voice.append(new Option('af_heart', 'kokoro:af_heart'))")
        tab.evaluate("voice.value = 'kokoro:af_heart'; voice.dispatchEvent(new Event('change'))")
        assert_typing_works(tab)
    asked = [event["session"] for event in scripted.named("session.update")]
    assert [session["output_modalities"] for session in asked] == [["text"], ["audio"]]


def test_no_microphone(browser: Browser, scripted: ScriptedServer) -> None:
    with browser.open(scripted.url, MISSING) as tab:
        tab.state("ready")
        tab.click("#talk")
        tab.shows("No microphone was found")
        assert_typing_works(tab)


def test_a_microphone_that_is_taken_away(browser: Browser, scripted: ScriptedServer) -> None:
    with browser.open(scripted.url, ROOM) as tab:
        tab.state("ready")
        tab.click("#talk")
        tab.state("listening")
        tab.evaluate("microphone.stream.getTracks()[0].dispatchEvent(new Event('ended'))")
        tab.shows("The microphone was disconnected")
        assert_typing_works(tab)


def test_a_page_from_where_browsers_open_no_microphone(
    browser: Browser, scripted: ScriptedServer
) -> None:
    url = scripted.url.replace("127.0.0.1", "insecure.test")
    with browser.open(url, microphone=None) as tab:
        tab.state("ready")
        tab.click("#talk")
        tab.shows("only to pages from https://")
        scripted.seconds = 0.0
        assert_typing_works(tab)
        assert scripted.events[0]["session"]["output_modalities"] == ["text"]


def test_a_key_is_asked_for_only_where_it_is_needed(
    browser: Browser, scripted: ScriptedServer
) -> None:
    scripted.locked = True
    with browser.open(scripted.url) as tab:
        tab.shows("This server asks for a key")
        assert tab.evaluate("document.activeElement.id") == "key"
        tab.type("wrong")
        tab.key("Enter", text="\r")
        tab.shows("The server does not know that key")
        tab.key("Escape")
        tab.state("offline")
        tab.click("#reconnect")
        tab.shows("The server does not know that key")
        tab.type(KEY)
        tab.key("Enter", text="\r")
        assert_typing_works(tab)
        assert not tab.evaluate("document.querySelector('dialog').open")


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server(browser: Browser, scripted: ScriptedServer, status: int) -> None:
    scripted.refusal = status
    with browser.open(scripted.url) as tab:
        tab.shows("The server is busy (all slots taken)")
        tab.state("offline")
        assert tab.evaluate("talk.disabled && message.disabled")
        scripted.refusal = None
        tab.click("#reconnect")
        assert_typing_works(tab)
        assert not tab.evaluate("notice.checkVisibility()")


def test_no_session_to_be_had(browser: Browser, scripted: ScriptedServer) -> None:
    with browser.open(scripted.url) as tab:
        tab.state("ready")
        scripted.refusal = 429
        send(tab)
        tab.shows("The server is busy (all slots taken)")
        assert tab.evaluate("message.value") == "hello"
        scripted.refusal = None
        tab.click("#reconnect")
        assert_typing_works(tab)


@pytest.mark.parametrize(
    ("code", "reason", "shown"),
    [
        (1011, "", "The server took no session or ended it"),
        (1013, "all sessions are taken", "all sessions are taken"),
    ],
)
def test_a_session_that_breaks(
    browser: Browser, scripted: ScriptedServer, code: int, reason: str, shown: str
) -> None:
    scripted.seconds = 20.0
    with browser.open(scripted.url) as tab:
        tab.state("ready")
        send(tab)
        tab.state("speaking")
        scripted.hang_up(code, reason)
        tab.shows(shown)
        tab.state("offline")
        scripted.seconds = 0.4
        tab.click("#reconnect")
        assert_typing_works(tab)
        assert tab.evaluate("document.querySelectorAll('.pending').length") == 0
        assert tab.evaluate("document.querySelector('[data-before]').innerText").endswith("hello")


def test_a_session_that_ends_is_followed_by_another(
    browser: Browser, scripted: ScriptedServer
) -> None:
    with browser.open(scripted.url) as tab:
        assert_typing_works(tab)
        why = "the client sent nothing for 600 s"
        scripted.push(type="error", error={"code": "session_idle", "message": why})
        scripted.hang_up(1000, "session_idle")
        tab.shows(f"The session ended: {why}. Your next words begin another one.")
        assert_typing_works(tab)
        assert len(scripted.connections) == 2


def test_errors_of_the_session_are_shown_as_text(
    browser: Browser, scripted: ScriptedServer
) -> None:
    with browser.open(scripted.url) as tab:
        assert_typing_works(tab)
        message = "voice: there is no <img src=x onerror=alert(1)> here"
        late = {"code": "response_cancel_not_active", "message": "no response to cancel"}
        for error in ({"code": "invalid_value", "message": message}, late):
            scripted.push(type="error", error=error)
        tab.shows(message)
        assert_typing_works(tab)


def test_a_server_that_is_gone(browser: Browser, scripted: ScriptedServer) -> None:
    with browser.open(scripted.url) as tab:
        tab.state("ready")
        tab.call("Network.enable")
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        tab.call("Network.emulateNetworkConditions", **offline)
        send(tab)
        tab.shows("The server does not answer")
        tab.call("Network.emulateNetworkConditions", **offline | {"offline": False})
        tab.call("Network.disable")
