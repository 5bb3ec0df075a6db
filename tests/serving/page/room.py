"""A microphone in the page that hears what a test says."""

from __future__ import annotations

import base64

from tests.serving.page.browser import Tab

ROOM = """
const room = new AudioContext();
const microphone = room.createMediaStreamDestination();
if (navigator.mediaDevices) navigator.mediaDevices.getUserMedia = async () => microphone.stream;
globalThis.say = async (wav) => {
  await room.resume();
  const bytes = Uint8Array.from(atob(wav), (character) => character.charCodeAt(0));
  const source = room.createBufferSource();
  source.buffer = await room.decodeAudioData(bytes.buffer);
  source.connect(microphone);
  source.start();
  globalThis.saying = new Promise((resolve) => { source.onended = () => resolve(true); });
};
"""
"""A script for ``Browser.open``."""


def say(tab: Tab, wav: bytes) -> None:
    """Begin to say a recording; ``saying`` in the page is a promise of its end."""
    tab.evaluate(f"say({base64.b64encode(wav).decode()!r})")
