"""Chromium and the servers of the page, started once for all tests here and ended with them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serving.page.browser import Browser, browsing, chromium
from tests.serving.page.scripted_server import ScriptedServer, running
from tests.serving.questions import QUESTION


@pytest.fixture(scope="package")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A Chromium whose microphone says a question whenever it is opened.

    A page that is open computes its silence, which later tests would wait for.
    """
    if chromium() is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    device = "--use-fake-device-for-media-stream"
    names = "--host-resolver-rules=MAP insecure.test 127.0.0.1"
    speech = f"--use-file-for-fake-audio-capture={QUESTION}%noloop"
    with browsing(tmp_path_factory.mktemp("chromium"), device, speech, names) as browser:
        yield browser


@pytest.fixture(scope="package")
def _scripted() -> Iterator[ScriptedServer]:
    with running(ScriptedServer()) as server:
        yield server


@pytest.fixture
def scripted(_scripted: ScriptedServer) -> ScriptedServer:
    """The scripted server as it is at first."""
    _scripted.reset()
    return _scripted
