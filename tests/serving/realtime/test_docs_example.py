"""The example of docs/realtime.md."""

from __future__ import annotations

import pytest

from tests.paths import ROOT
from tests.serving.helpers import Server
from tests.test_docs import blocks


def test_the_example_answers(
    front: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [(_, code)] = blocks(ROOT / "docs" / "realtime.md", "python")
    monkeypatch.chdir(ROOT)
    assert "http://127.0.0.1:5000" in code
    names: dict[str, object] = {}
    exec(compile(code.replace("http://127.0.0.1:5000", front.url), "realtime.md", "exec"), names)
    assert capsys.readouterr().out.split() == ["nine"]
    speech = names["speech"]
    assert isinstance(speech, bytes) and len(speech) > 24_000 // 2
