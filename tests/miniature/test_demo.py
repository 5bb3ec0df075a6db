"""The command that a newcomer runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.paths import ROOT


def test_the_demo_answers_in_words_sound_and_picture(tmp_path: Path):
    """Without a network, too: then the second voice alone is missing, and the demo says why."""
    answer = ROOT / "output" / "answer.wav"
    answer.parent.mkdir(exist_ok=True)
    for name in ("answer.wav", "answer.png", "answer-kokoro.wav"):
        (ROOT / "output" / name).write_bytes(b"of an earlier question")
    offline = {"KIMI_AUDIO_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo"],
        env=os.environ | offline,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(maxsplit=1) for line in lines[:4]] == [
        ["question", "what is four plus five"],
        ["answer", "nine"],
        ["speech", "output/answer.wav"],
        ["picture", "output/answer.png"],
    ]
    stages = ["input", "encoders", "prefill", "decode", "speech", "total"]
    assert [part.split()[-2] for part in lines[4].split(",")] == stages
    assert "real-time factor" in lines[5]
    assert lines[6:] == ["kokoro    none: see above"]
    assert "Kokoro cannot be had: " in done.stderr
    assert not answer.with_stem("answer-kokoro").exists()
    assert answer.read_bytes().startswith(b"RIFF")
    assert answer.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_question_that_is_not_there_is_named(tmp_path: Path):
    missing = tmp_path / "none.wav"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo", missing], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"{missing}: no such file" in done.stderr


def test_the_demo_opens_the_page_until_it_is_interrupted(tmp_path: Path):
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    demo = subprocess.Popen(
        [sys.executable, ROOT / "scripts" / "demo", "--talk"],
        env={**os.environ, "DISPLAY": ":0", "BROWSER": str(browser)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert demo.stdout is not None
        line = demo.stdout.readline()
        [url] = re.findall(r"http://127.0.0.1:\d+/", line)
        assert "Talk to Kimi-Audio" in httpx.get(url).text
        while not opened.exists() or not opened.read_text():
            time.sleep(0.05)
        assert opened.read_text() == f"{url}\n"
    finally:
        os.killpg(demo.pid, signal.SIGINT)  # as Ctrl-C does, to the server, too
        _, errors = demo.communicate(timeout=60)
    assert (demo.returncode, errors) == (0, "")
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
