"""The page on narrow screens, for screen readers, in both colour schemes, without motion."""

from __future__ import annotations

import json

from tests.serving.page.browser import Browser, Tab
from tests.serving.page.scripted_server import ScriptedServer
from tests.serving.questions import QUESTION

CONTRAST = """
(() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = channels(colour).map((v) => {
      v /= 255;
      return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if ((channels(colour)[3] ?? 1) === 1) return colour;
    }
  };
  const poor = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !element.checkVisibility() || element.closest(".unseen")) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(ground(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${element.tagName} ${element.id} ${ratio.toFixed(2)}`);
  }
  return poor;
})()
"""
"""Elements whose text has less contrast than WCAG's level AA asks for."""

WIDE = """
[...document.querySelectorAll("body *")]
  .filter((e) => e.checkVisibility() && !e.closest(".unseen"))
  .filter((e) => e.getBoundingClientRect().right > innerWidth)
  .map((e) => e.tagName + e.id)
"""


BLANK = """
tape.getContext("2d").getImageData(0, 0, tape.width, 96).data.every((value) => !value)
""".strip()


def fill(tab: Tab, scripted: ScriptedServer) -> None:
    """Everything that can be seen is seen."""
    tab.state("ready")
    tab.evaluate(f"message.value = '{'word' * 40}'; composer.requestSubmit()")
    tab.shows("is nine")
    tab.state("ready")
    tab.choose_file("#file", QUESTION)
    tab.until("document.querySelector('#job-state').innerText === 'Done'")
    scripted.push(type="error", error={"message": "unspeakably" * 20})
    tab.shows("unspeakably")


def test_everything_fits_every_width_and_has_contrast(
    browser: Browser, scripted: ScriptedServer
) -> None:
    with browser.open(scripted.url) as tab:
        fill(tab, scripted)
        for width in (320, 360, 768, 1280):
            tab.resize(width, 740)
            assert tab.evaluate(WIDE) == [], width
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            sizes = tab.evaluate("[talk, message, voice].map((e) => e.clientHeight)")
            assert min(sizes) >= 24  # as WCAG asks of what is touched
        for scheme in ("light", "dark"):
            # Without the transitions from one colour to the other.
            tab.prefer(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
            assert tab.evaluate(CONTRAST) == [], scheme


def test_controls_have_names_and_roles(browser: Browser, scripted: ScriptedServer) -> None:
    with browser.open(scripted.url) as tab:
        fill(tab, scripted)
        tree = tab.call("Accessibility.getFullAXTree")["nodes"]
    nodes = [node for node in tree if not node["ignored"]]
    found = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes}
    expected = {
        ("button", "Talk"),
        ("button", "Send message"),
        ("radio", "Press to talk"),
        ("radio", "Hands-free"),
        ("combobox", "Voice"),
        ("textbox", "Message"),
        ("meter", "Microphone level"),
        ("image", "Spectrogram of what you and the model said"),
        ("region", "Conversation"),
        ("region", "Transcribe a recording"),
        ("group", "What was said"),
        ("link", "Subtitles (.srt)"),
    }
    assert expected <= found, json.dumps(sorted(found), indent=1)
    assert {"main", "banner", "heading", "status", "alert", "list"} <= {role for role, _ in found}
    nameless = [
        node["role"]["value"]
        for node in nodes
        if any(p["name"] == "focusable" and p["value"]["value"] for p in node.get("properties", []))
        and not node.get("name", {}).get("value")
    ]
    assert nameless == []


def test_without_motion_the_spectrogram_is_drawn_at_rest(
    browser: Browser, scripted: ScriptedServer
) -> None:
    with browser.open(scripted.url) as tab:
        tab.prefer(prefers_reduced_motion="reduce")
        tab.state("ready")
        scripted.seconds = 1.5
        tab.evaluate("message.value = 'hello'; composer.requestSubmit()")
        tab.until("played.length > 12000")
        assert tab.evaluate(BLANK)
        tab.state("ready")
        tab.until(f"!({BLANK})")


def test_the_page_works_behind_a_path(browser: Browser, scripted: ScriptedServer) -> None:
    with browser.open(f"{scripted.url}/behind/a/path/") as tab:
        tab.state("ready")
        tab.evaluate("message.value = 'hello'; composer.requestSubmit()")
        tab.shows("is nine")
