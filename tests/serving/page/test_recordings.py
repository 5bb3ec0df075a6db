"""Recordings that are dropped on the page or chosen, and what can be saved of them."""

from __future__ import annotations

import base64
import time
from pathlib import Path

from tests.serving.page.browser import Browser, Tab
from tests.serving.page.scripted_server import ScriptedServer
from tests.serving.questions import QUESTION

DROP = """
(async () => {
  const bytes = Uint8Array.from(atob(CONTENT), (character) => character.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], "dropped.wav", { type: "audio/wav" }));
  for (const type of ["dragenter", "dragover", "drop"]) {
    const options = { bubbles: true, cancelable: true, dataTransfer };
    document.body.dispatchEvent(new DragEvent(type, options));
  }
})()
"""


def saved(tab: Tab, link: str, folder: Path) -> tuple[str, str]:
    """Name and content of the file that a link saves."""
    tab.browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    tab.evaluate(f"document.querySelector('{link}').click()")
    end = time.monotonic() + 30
    while not (files := [path for path in folder.glob("*.*") if path.suffix in (".srt", ".txt")]):
        assert time.monotonic() < end
        time.sleep(0.05)
    [path] = files
    content = path.read_text()
    path.unlink()
    return path.name, content


def test_a_recording_becomes_text_and_subtitles(
    browser: Browser, scripted: ScriptedServer, tmp_path: Path
) -> None:
    with browser.open(scripted.url) as tab:
        tab.state("ready")
        tab.choose_file("#file", QUESTION)
        tab.until("document.querySelector('#job-state').innerText === 'Done'")
        [form] = scripted.forms
        assert form["file"].filename == "question.wav"
        assert form["file"].size == QUESTION.stat().st_size
        assert tab.text("#job-text") == "what is four plus five"
        assert saved(tab, "#save-txt", tmp_path) == ("question.txt", "what is four plus five\n")
        assert saved(tab, "#save-srt", tmp_path) == (
            "question.srt",
            "1\n00:00:00,000 --> 00:00:01,500\nwhat is four\n\n"
            "2\n01:01:01,500 --> 01:01:03,000\nplus five\n",
        )
        assert browser.log == []


def test_a_recording_is_dropped_anywhere(browser: Browser, scripted: ScriptedServer) -> None:
    with browser.open(scripted.url) as tab:
        tab.state("ready")
        content = base64.b64encode(QUESTION.read_bytes()).decode()
        tab.evaluate(DROP.replace("CONTENT", repr(content)))
        tab.until("document.querySelector('#job-state').innerText === 'Done'")
        assert tab.text("#job-name") == "dropped.wav"


def test_a_refused_recording_is_explained(browser: Browser, scripted: ScriptedServer) -> None:
    with browser.open(scripted.url) as tab:
        tab.state("ready")
        scripted.refusal = 413
        tab.choose_file("#file", QUESTION)
        tab.shows("The server refused: all slots taken")
        assert not tab.evaluate("document.querySelector('#job-downloads').checkVisibility()")
