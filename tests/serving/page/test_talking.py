"""Talking to the page: what it sends, what it shows, what it plays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kimia_infer.audio.files import load_audio
from tests.serving.page.browser import Browser, Tab
from tests.serving.page.scripted_server import RATE, ScriptedServer
from tests.serving.questions import QUESTION


@pytest.fixture
def tab(browser: Browser, scripted: ScriptedServer) -> Iterator[Tab]:
    """The page, ready, on the scripted server; nothing in it may fail."""
    with browser.open(scripted.url) as tab:
        tab.state("ready")
        yield tab
        assert browser.log == []


COLOURS = """{
  const { data } = tape.getContext("2d").getImageData(0, 0, tape.width, tape.height);
  const found = new Set();
  for (let i = 0; i < data.length; i += 4) {
    if (data[i + 3] === 255) found.add(`${data.slice(i, i + 3)}`);
  }
  found.size;
}"""
"""How many colours the spectrogram has where it is loud: one for each speaker."""


UNPROCESSED = """
if (navigator.mediaDevices) {
  const open = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
  const as_is = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  navigator.mediaDevices.getUserMedia = () => open({ audio: as_is });
}
"""
"""Browsers change the sound for calls; with this they do not."""


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def heard_enough(scripted: ScriptedServer, seconds: float) -> None:
    """Wait until so much of a turn was sent."""
    wait_for(lambda: len(scripted.sound()) > seconds * RATE)


def likeness(piece: np.ndarray, whole: np.ndarray) -> float:
    """The correlation of a piece with where it fits best in a longer sound."""
    places = np.lib.stride_tricks.sliding_window_view(whole, len(piece))
    norms = np.linalg.norm(places, axis=1) * np.linalg.norm(piece)
    return float((np.correlate(whole, piece) / np.maximum(norms, 1e-6)).max())


def kinds(scripted: ScriptedServer) -> list[str]:
    """The types of the events that came, in order, sound left out."""
    types = [event["type"] for event in scripted.events]
    return [name for name in types if not name.endswith(".append")]


def test_a_turn_is_said_while_the_button_is_held(tab: Tab, scripted: ScriptedServer) -> None:
    tab.mouse("#talk", "Pressed")
    tab.state("listening")
    assert tab.evaluate("talk.getAttribute('aria-pressed')") == "true"
    tab.until("Number(level.getAttribute('aria-valuenow')) > 20")
    heard_enough(scripted, 2.1)
    tab.mouse("#talk", "Released")
    tab.shows("is nine")
    tab.until(f"played.length === {0.4 * RATE}")
    tab.state("ready")
    assert tab.texts("#turns li") == [
        "You\n\nwhat is four plus five",
        "Kimi-Audio\n\nthe answer is nine",
    ]
    assert tab.text("#announcer") == "Kimi-Audio: the answer is nine"
    assert 0 < float(tab.text("#first-sound").split()[-2]) < 30
    assert kinds(scripted) == ["session.update", "input_audio_buffer.commit", "response.create"]
    session = scripted.events[0]["session"]
    assert session["audio"]["input"]["turn_detection"] is None
    assert session["audio"]["input"]["format"] == {"type": "audio/pcm", "rate": RATE}

    tone = np.array(tab.evaluate("played"))
    assert (
        np.abs(tone - np.sin(np.arange(len(tone)) * 2 * np.pi * 440 / RATE) * 0.4883).max() < 1e-3
    )
    assert tab.evaluate(COLOURS) == 2


def test_what_the_microphone_hears_is_sent_at_the_rate_of_the_protocol(
    browser: Browser, scripted: ScriptedServer
) -> None:
    with browser.open(scripted.url, UNPROCESSED) as tab:
        tab.state("ready")
        tab.click("#talk")
        heard_enough(scripted, 2.2)
        sent = scripted.sound() / 32_768
    question = load_audio(QUESTION, sample_rate=RATE)
    # A busy machine loses moments of the sound on its way through the browser: piece by piece.
    size = RATE // 10
    pieces = [sent[i : i + size] for i in range(0, len(sent) - size, size)]
    alike = [likeness(piece, question) for piece in pieces if np.abs(piece).max() > 0.1]
    assert len(alike) > 5 and np.median(alike) > 0.99


def test_a_tap_starts_a_turn_and_another_sends_it(tab: Tab, scripted: ScriptedServer) -> None:
    tab.click("#talk")
    tab.state("listening")
    assert tab.text("#talk") == "Send"
    heard_enough(scripted, 0.5)
    tab.click("#talk")
    tab.shows("is nine")
    tab.state("ready")
    assert tab.text("#talk") == "Talk"

    tab.evaluate("talk.click()")  # as screen readers do
    tab.state("listening")
    scripted.events.clear()
    heard_enough(scripted, 0.3)
    tab.key("Escape")
    tab.state("ready")
    wait_for(lambda: kinds(scripted) == ["input_audio_buffer.clear"])


def test_the_keyboard_alone_suffices(tab: Tab, scripted: ScriptedServer) -> None:
    focused = []
    for _ in range(6):
        tab.key("Tab")
        focused.append(tab.evaluate("document.activeElement.id || document.activeElement.value"))
    assert focused == ["scroll", "hold", "talk", "voice", "message", ""]
    tab.evaluate("document.activeElement.blur()")
    tab.key(" ", "Down")
    heard_enough(scripted, 0.6)
    tab.key(" ", "Up")
    tab.shows("is nine")
    tab.state("ready")
    tab.evaluate("message.focus()")
    tab.key(" ", "Down", "Up", text=" ")
    tab.type("hello")
    assert tab.evaluate("message.value") == " hello"
    tab.key("Enter", text="\r")
    wait_for(lambda: scripted.named("conversation.item.create"))
    [typed] = scripted.named("conversation.item.create")
    assert typed["item"]["content"] == [{"type": "input_text", "text": "hello"}]
    tab.until("document.querySelectorAll('#turns .model').length === 2")
    assert tab.texts("#turns .you p")[-1] == "hello"


def test_a_slip_of_the_finger_is_no_turn(tab: Tab, scripted: ScriptedServer) -> None:
    tab.click("#talk")
    tab.state("listening")
    tab.click("#talk")
    tab.shows("Hold the button while you speak")
    assert "response.create" not in kinds(scripted)


def test_speaking_interrupts(tab: Tab, scripted: ScriptedServer) -> None:
    """Hands-free, the server hears speech; the page stops at once and says what was heard."""
    scripted.seconds = 6.0
    tab.click("[value=free] + span")
    tab.click("#talk")
    tab.state("listening")
    heard_enough(scripted, 0.5)
    detection = scripted.named("session.update")[-1]["session"]["audio"]["input"]["turn_detection"]
    assert detection["type"] == "server_vad" and detection["interrupt_response"]
    tab.evaluate("message.value = 'a long answer'; composer.requestSubmit()")
    tab.until(f"played.length > {RATE}")
    scripted.push(type="input_audio_buffer.speech_started", audio_start_ms=900, item_id="user_9")
    wait_for(lambda: scripted.named("conversation.item.truncate"))
    tab.state("listening")
    heard = tab.evaluate("played.length") / RATE * 1000
    [cut] = scripted.named("conversation.item.truncate")
    assert heard - 300 < cut["audio_end_ms"] <= heard
    assert cut["item_id"].startswith("item_") and cut["content_index"] == 0
    assert tab.texts("#turns .model small") == ["interrupted"]
    time.sleep(0.3)  # what still comes of that answer is not played
    assert tab.evaluate("played.length") / RATE * 1000 - heard < 100
    tab.click("#talk")
    tab.state("ready")
    wait_for(lambda: kinds(scripted)[-1] == "input_audio_buffer.clear")


def test_pressing_the_button_interrupts(tab: Tab, scripted: ScriptedServer) -> None:
    """Whether the answer is still made or not; a further answer is heard as a whole."""
    for pace, made in ((0.0, True), (0.15, False)):
        scripted.events.clear()
        scripted.seconds, scripted.pace = 6.0, pace
        tab.evaluate("message.value = 'a long answer'; composer.requestSubmit()")
        tab.until(f"played.length > {RATE}")
        tab.mouse("#talk", "Pressed")
        wait_for(lambda: scripted.named("conversation.item.truncate"))
        tab.state("listening")
        scripted.seconds = 0.4
        heard_enough(scripted, 0.5)
        tab.evaluate("played.length = 0")
        tab.mouse("#talk", "Released")
        tab.until("played.length > 0")
        tab.state("ready")
        assert tab.evaluate("played.length") == 0.4 * RATE
        assert len(scripted.named("response.cancel")) == (not made)


def test_a_voice_is_chosen(tab: Tab, scripted: ScriptedServer) -> None:
    assert tab.texts("#voice > option") == ["default", "anna"]
    groups = tab.evaluate("[...voice.querySelectorAll('optgroup')].map((g) => g.label)")
    assert groups == ["Kokoro, American English", "Kokoro, Spanish"]
    assert tab.texts("#voice optgroup:first-of-type option") == ["af_heart", "am_adam"]
    tab.evaluate("voice.value = 'anna'; voice.dispatchEvent(new Event('change'))")
    tab.evaluate("message.value = 'hello'; composer.requestSubmit()")
    tab.shows("is nine")
    assert scripted.named("session.update")[0]["session"]["audio"]["output"]["voice"] == "anna"
