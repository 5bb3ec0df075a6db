"""The page with the real server and the trained miniature: it hears, answers, is interrupted."""

from __future__ import annotations

import time

import numpy as np
import pytest
import soxr

from kimia_infer.audio.files import SAMPLE_RATE
from scripts.miniature.recognizer import SpeechRecognizer
from tests.serving.helpers import Server
from tests.serving.page.browser import Browser, Tab
from tests.serving.page.room import ROOM, say
from tests.serving.questions import QUESTION


@pytest.fixture(scope="module")
def recognizer() -> SpeechRecognizer:
    return SpeechRecognizer()


def played(tab: Tab) -> np.ndarray:
    """What the page has played, float samples [n] at 16 kHz."""
    return soxr.resample(np.array(tab.evaluate("played"), np.float32), 24_000, SAMPLE_RATE)


def test_a_question_is_heard_and_answered(
    front: Server, browser: Browser, recognizer: SpeechRecognizer
) -> None:
    with browser.open(front.url) as tab:
        tab.state("ready")
        tab.mouse("#talk", "Pressed")
        tab.state("listening")
        time.sleep(2.3)
        tab.mouse("#talk", "Released")
        tab.state("speaking")
        tab.state("ready")
        assert tab.texts("#turns p") == ["what is four plus five", "nine"]
        assert recognizer.hear(played(tab), "answer") == "nine"
        assert tab.evaluate("gaps") == 0
        assert browser.log == [] and not tab.evaluate("notice.checkVisibility()")


def test_hands_free_one_speaks_into_an_answer(
    front: Server, browser: Browser, recognizer: SpeechRecognizer
) -> None:
    with browser.open(front.url, ROOM) as tab:
        tab.state("ready")
        tab.click("[value=free] + span")
        tab.click("#talk")
        tab.state("listening")
        sentence = "Please read aloud: take the red ball to the school"
        tab.evaluate(f"message.value = {sentence!r}; composer.requestSubmit()")
        tab.until("played.length > 2400")
        say(tab, QUESTION.read_bytes())
        tab.shows("interrupted")
        tab.evaluate("played.length = 0")
        tab.shows("what is four plus five")
        tab.state("speaking")
        tab.state("listening")
        assert tab.texts("#turns p")[1:] == [
            "take the red ball to the school",
            "what is four plus five",
            "nine",
        ]
        assert recognizer.hear(played(tab), "answer") == "nine"
        assert browser.log == [] and not tab.evaluate("notice.checkVisibility()")


def test_a_recording_is_transcribed(front: Server, browser: Browser) -> None:
    with browser.open(front.url) as tab:
        tab.state("ready")
        tab.choose_file("#file", QUESTION)
        tab.until("document.querySelector('#job-state').innerText === 'Done'")
        assert tab.text("#job-text") == "what is four plus five"
