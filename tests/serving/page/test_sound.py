"""The worklets alone, faster than real time: samples in, samples out."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from tests.serving.page.browser import Browser, Tab
from tests.serving.page.scripted_server import RATE, ScriptedServer

PLAY = """
(async () => {
  const context = new OfflineAudioContext(1, SECONDS * 24000, 24000);
  await context.audioWorklet.addModule("page/playback.js");
  const node = new AudioWorkletNode(context, "playback", { numberOfInputs: 0 });
  node.connect(context.destination);
  for (const length of PIECES) {
    const samples = new Float32Array(length).map(() => ++globalThis.count / 1e6);
    node.port.postMessage({ samples }, [samples.buffer]);
  }
  if (END) node.port.postMessage({ end: true });
  await new Promise((resolve) => setTimeout(resolve, 50));
  const out = (await context.startRendering()).getChannelData(0);
  return [...out].map((sample) => Math.round(sample * 1e6));
})()
"""
"""Plays the numbers 1, 2, ... in pieces of some lengths."""

CAPTURE = """
(async () => {
  const context = new OfflineAudioContext(1, HERE, HERE);
  await context.audioWorklet.addModule("page/capture.js");
  const node = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0 });
  const sent = [];
  node.port.onmessage = ({ data }) => sent.push(...data.samples);
  const tone = new OscillatorNode(context, { frequency: HERTZ });
  tone.connect(node);
  tone.start();
  await context.startRendering();
  await new Promise((resolve) => setTimeout(resolve, 100));
  return sent;
})()
"""
"""What the microphone's worklet makes of a second of a tone of full scale."""


@pytest.fixture
def tab(browser: Browser, scripted: ScriptedServer) -> Iterator[Tab]:
    with browser.open(scripted.url) as tab:
        yield tab


def play(tab: Tab, seconds: float, pieces: list[int], end: bool) -> list[int]:
    script = PLAY.replace("SECONDS", str(seconds)).replace("PIECES", json.dumps(pieces))
    tab.evaluate("globalThis.count = 0")
    return tab.evaluate(script.replace("END", json.dumps(end)))


def test_every_sample_is_played_once_and_in_order(tab: Tab) -> None:
    """More than the ring holds at first, in pieces of all lengths."""
    pieces = [1, 127, 128, 129, 100_000, 3, 40_000, 24_000]
    count = sum(pieces)
    assert play(tab, 8, pieces, True)[: count + 1] == [*range(1, count + 1), 0]


def test_sound_begins_once_enough_has_come_or_no_more_comes(tab: Tab) -> None:
    few = round(0.08 * RATE) - 1
    assert not any(play(tab, 0.5, [few], False))
    assert play(tab, 0.5, [few], True)[:few] == [*range(1, few + 1)]
    assert play(tab, 0.5, [few, 1], False)[:few] == [*range(1, few + 1)]


def test_sound_that_comes_late_is_waited_for(browser: Browser, scripted: ScriptedServer) -> None:
    scripted.seconds, scripted.pace = 1.0, 0.35
    with browser.open(scripted.url) as tab:
        tab.state("ready")
        tab.evaluate("message.value = 'hello'; composer.requestSubmit()")
        tab.until(f"played.length === {RATE}")
        assert tab.evaluate("gaps") > 0
        tone = np.sin(np.arange(RATE) * 2 * np.pi * 440 / RATE) * 16_000 / 32_768
        assert np.abs(np.array(tab.evaluate("played")) - tone).max() < 1e-4


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_any_rate_of_the_microphone_becomes_the_protocols(tab: Tab, rate: int) -> None:
    def captured(hertz: float) -> np.ndarray:
        script = CAPTURE.replace("HERE", str(rate)).replace("HERTZ", str(hertz))
        return np.array(tab.evaluate(script), float)[2_400:-2_400] / 32_768

    wave = captured(1_000)
    assert abs(len(wave) + 4_800 - RATE) < 1_000
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    assert abs(np.argmax(spectrum) / len(wave) * RATE - 1_000) < 2
    assert abs(np.sqrt(2 * np.mean(wave**2)) - 1) < 0.01
    if rate > RATE:  # above what the protocol's rate can carry
        assert np.abs(captured(16_000)).max() < 0.01
