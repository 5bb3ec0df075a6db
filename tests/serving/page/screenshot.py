"""Takes docs/page.png: ``python -m tests.serving.page.screenshot``, with chromium installed."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from tests.paths import GOLDEN, MINI, ROOT
from tests.serving.helpers import serve
from tests.serving.page.browser import Tab, browsing
from tests.serving.page.room import ROOM, say
from tests.serving.questions import QUESTION

PICTURE = ROOT / "docs" / "page.png"
COLOURS = 64


DIALOGUE = ("what is two plus three", "and one more")
SPEAK = ("espeak-ng", "-v", "en-us+m3", "-s", "150", "--stdout")


def ask(tab: Tab, text: str) -> None:
    """Say something to the page and wait for the end of the answer."""
    tab.mouse("#talk", "Pressed")
    tab.state("listening")
    say(tab, subprocess.run([*SPEAK, text], capture_output=True, check=True).stdout)
    tab.evaluate("saying")
    tab.mouse("#talk", "Released")
    tab.state("speaking")
    tab.state("ready")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        variables = {"KIMI_AUDIO_WEIGHTS": str(MINI)}
        with (
            serve(GOLDEN, directory, "--openai", **variables) as server,
            browsing(directory) as browser,
            browser.open(server.url, ROOM) as tab,
        ):
            tab.resize(1120, 760)
            tab.state("ready")
            for text in DIALOGUE:
                ask(tab, text)
            tab.choose_file("#file", QUESTION)
            tab.until("document.querySelector('#job-state').innerText === 'Done'")
            tab.screenshot(PICTURE)
    Image.open(PICTURE).convert("RGB").quantize(COLOURS).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
