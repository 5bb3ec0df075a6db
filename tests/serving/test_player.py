"""Speech as wav files in answers, and what an audio player receives."""

from __future__ import annotations

import base64
import stat
from pathlib import Path

import pytest
import torch

from kimia_infer.audio.files import wav_bytes
from kimia_infer.serving.cog.base import wav_uri
from kimia_infer.serving.player import PLAYERS, Player

RATE = 24_000
WAVE = torch.cat([torch.linspace(-1.5, 1.5, 999), torch.randn(500) / 3])


def test_speech_is_a_data_uri() -> None:
    expected = "data:audio/wav;base64," + base64.b64encode(wav_bytes(WAVE, RATE)).decode()
    assert wav_uri(WAVE, RATE) == expected
    assert wav_uri(None, RATE) is None


def install(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("name", PLAYERS)
def test_player_gets_the_samples_as_they_come(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, name, f'echo "$@" > {tmp_path}/arguments; exec /bin/cat > {tmp_path}/heard')
    monkeypatch.setenv("PATH", str(tmp_path))
    player = Player()
    assert player.name == name
    player.play(b"")
    assert not (tmp_path / "heard").exists(), "nothing is started for nothing"
    player.play(b"one")
    player.play(b"two")
    assert player.finish()
    assert (tmp_path / "heard").read_bytes() == b"onetwo"
    assert "24000" in (tmp_path / "arguments").read_text()


def test_player_that_fails_or_is_missing_loses_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    player = Player()
    player.play(b"one")
    assert player.name is None and player.finish()
    player.stop()
    install(tmp_path, "aplay", "exit 1")
    player = Player()
    for _ in range(100):
        player.play(bytes(10_000))
    assert not player.finish()


def test_player_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "ffplay", "exec /bin/sleep 600")
    monkeypatch.setenv("PATH", str(tmp_path))
    player = Player()
    player.play(b"one")
    player.stop()
    assert not player.finish()
