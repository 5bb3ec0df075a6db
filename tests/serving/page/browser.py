"""Chromium without a window, driven by its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import functools
import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

PATIENCE = 60.0
"""Seconds to wait for anything on a page."""

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--disable-dev-shm-usage", "--mute-audio", "--lang=en"),
    "--remote-debugging-port=0",
)

RECORD = """
globalThis.played = [];
globalThis.gaps = 0;
const Node = AudioWorkletNode;
globalThis.AudioWorkletNode = class extends Node {
  constructor(...given) {
    super(...given);
    this.port.addEventListener("message", ({ data }) => {
      if (data.played) played.push(...data.played);
      if (data.gap) gaps++;
    });
  }
};
"""
"""Keeps the samples that the page has played."""


def chromium() -> str | None:
    return shutil.which("chromium")


class Browser:
    """A running Chromium; ``open`` a page in it."""

    def __init__(self, socket: ClientConnection):
        self._socket = socket
        self._numbers = itertools.count(1)
        self.log: list[str] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        while True:
            answer = json.loads(self._socket.recv(timeout=PATIENCE))
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        """Keep what the page complains about."""
        parameters = event.get("params", {})
        match event["method"]:
            case "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                self.log.append(details.get("exception", {}).get("description", details["text"]))
            case "Log.entryAdded" if parameters["entry"]["level"] == "error":
                entry = parameters["entry"]
                self.log.append(f"{entry['source']}: {entry['text']} {entry.get('url', '')}")

    @contextlib.contextmanager
    def open(self, url: str, *scripts: str, microphone: str | None = "granted") -> Iterator[Tab]:
        """The page at ``url``, as if nothing had been there before.

        ``scripts`` run before its own ones; ``microphone``: granted, denied, None for a page from
        an address where there is none.
        """
        tab = self._tab
        given = [tab.call("Page.addScriptToEvaluateOnNewDocument", source=s) for s in scripts]
        if microphone is not None:
            permission = {"permission": {"name": "microphone"}, "setting": microphone}
            self.call("Browser.setPermission", **permission, origin=url)
        tab.resize(1280, 800)
        self.log.clear()
        tab.navigate(url)
        try:
            yield tab
        finally:
            tab.prefer()
            tab.evaluate("sessionStorage.clear()")
            for script in given:
                tab.call("Page.removeScriptToEvaluateOnNewDocument", **script)
            # Ends its session. The tab stays: another process for it takes a second.
            tab.evaluate("dispatchEvent(new Event('pagehide'))")

    @functools.cached_property
    def _tab(self) -> Tab:
        target = self.call("Target.createTarget", url="about:blank")
        session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        tab = Tab(self, session["sessionId"])
        for domain in ("Page", "Runtime", "Log", "DOM"):
            tab.call(f"{domain}.enable")
        tab.call("Page.addScriptToEvaluateOnNewDocument", source=RECORD)
        return tab


class Tab:
    def __init__(self, browser: Browser, session: str):
        self.browser, self._session = browser, session

    def call(self, method: str, **parameters: Any) -> Any:
        return self.browser.call(method, self._session, **parameters)

    def navigate(self, url: str) -> None:
        """Wait until the page at ``url`` is loaded."""
        self.evaluate("globalThis.left = true")
        self.call("Page.navigate", url=url)
        self.until("!globalThis.left && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, awaited, with a user's gesture."""
        answer = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str) -> Any:
        """The value of ``expression`` once it is true."""
        end = time.monotonic() + PATIENCE
        while not (value := self.evaluate(expression)):
            if time.monotonic() > end:
                page = self.evaluate("document.body.innerText")
                raise AssertionError(f"never: {expression}\n{page}\n{self.browser.log}")
            time.sleep(0.05)
        return value

    def text(self, selector: str) -> str:
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector: str) -> list[str]:
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return self.evaluate(f"{found}.map((element) => element.innerText.trim())")

    def shows(self, text: str) -> None:
        """Wait until the page shows ``text``."""
        self.until(f"document.body.innerText.includes({json.dumps(text)})")

    def state(self, state: str) -> None:
        """Wait until the page is in a state, such as ready or speaking."""
        self.until(f"document.body.dataset.state === {json.dumps(state)}")

    def mouse(self, selector: str, *events: str) -> None:
        """Press ("Pressed") or release ("Released") the left button over an element."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = self.evaluate(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({box})"
        )
        for event in events:
            kind = f"mouse{event}"
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def click(self, selector: str) -> None:
        self.mouse(selector, "Pressed", "Released")

    def key(self, name: str, *events: str, text: str = "") -> None:
        """Press ("Down") and release ("Up") a key, such as Tab; both if no event is given."""
        code = {" ": "Space"}.get(name, name)
        number = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowRight": 39}[name]
        for event in events or ("Down", "Up"):
            self.call(
                "Input.dispatchKeyEvent",
                type=f"key{event}",
                key=name,
                code=code,
                windowsVirtualKeyCode=number,
                **({"text": text} if text and event == "Down" else {}),
            )

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", mobile=False, **size)

    def prefer(self, **features: str) -> None:
        """Media features by name, ``prefers_color_scheme="dark"``."""
        listed = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.call("Emulation.setEmulatedMedia", features=listed)

    def screenshot(self, path: Path) -> None:
        shot = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browsing(directory: Path, *flags: str) -> Iterator[Browser]:
    """A Chromium whose profile is in ``directory``."""
    program = chromium()
    assert program is not None
    command = [program, *FLAGS, f"--user-data-dir={directory / 'profile'}", *flags]
    with (directory / "chromium.log").open("w+") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, start_new_session=True)
        try:
            with connect(_address(process, Path(log.name)), max_size=None) as socket:
                yield Browser(socket)
        finally:
            process.terminate()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + PATIENCE
    while True:
        text = log.read_text(errors="replace")
        if found := re.search(r"DevTools listening on (\S+)", text):
            return found[1]
        assert process.poll() is None and time.monotonic() < end, text
        time.sleep(0.05)
