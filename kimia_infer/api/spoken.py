"""Text in one of Kokoro's voices: whole texts, and answers while the model writes them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from kimia_infer.api.kokoro import Call, Kokoro
from kimia_infer.api.sentences import SentenceStream
from kimia_infer.layers.sampler import Randomness
from kimia_infer.models.kokoro.phonemes.sources import readable
from kimia_infer.models.kokoro.voices import LANGUAGES, language_of
from kimia_infer.utils.errors import NoSpeech, RequestError

PREFIX = "kokoro:"
"""Begins the name of a speaker: ``kokoro:af_heart``, ``kokoro:af_heart:0.7+am_michael:0.3``."""


def speakers(kokoro: Kokoro) -> dict[str, str]:
    """The languages of the voices that can read a text, by the names of the speakers."""
    languages = {PREFIX + name: language_of(name) for name in kokoro.voices.names}
    return {name: spoken for name, spoken in languages.items() if readable(spoken)}


def voice_of(kokoro: Kokoro | None, speaker: str) -> str:
    """The voice, or the mixture, that ``speaker`` names.

    Raises RequestError naming ``speaker`` if there is no such voice, no Kokoro, or nothing that
    reads the voice's language.
    """
    voice = speaker.removeprefix(PREFIX)
    if voice == speaker:
        raise RequestError(
            f"speaker: expected {PREFIX}NAME, for example {PREFIX}af_heart, found {speaker[:60]!r}"
        )
    if kokoro is None:
        raise RequestError(
            f"speaker: {speaker[:60]!r} needs Kokoro, which was not loaded; start the service "
            "with KIMI_AUDIO_KOKORO=auto (--kokoro auto), or KimiAudio with kokoro='auto'"
        )
    try:
        kokoro.require(voice)
    except RequestError as error:
        raise RequestError(f"speaker: {str(error).removeprefix('voice: ')}") from error
    if not readable(language := language_of(voice)):
        letters = ", ".join(c for c, spoken in LANGUAGES.items() if readable(spoken))
        raise RequestError(
            f"speaker: nothing is installed here that reads {language!r}, the language of "
            f"{voice!r} (docs/kokoro.md); choose a voice whose name begins with {letters}"
        )
    return voice


class SpokenAnswer:
    """Speaks a text sentence by sentence while it is written, on a thread of its own.

    ``send`` gets an AudioChunk for each sentence, then None, or the error that ended it. ``check``
    is called before each sentence and raises to end it.
    """

    def __init__(
        self,
        kokoro: Kokoro,
        voice: str,
        speed: float,
        randomness: Randomness,
        check: Callable[[], None],
        call: Call,
        send: Callable[[Any], None],
    ):
        self.name = PREFIX + voice
        self._sentences, self._written = SentenceStream(), SimpleQueue[str | None]()
        self._closed, self._check, self._send = False, check, send
        text = kokoro.read(iter(self._written.get, None), language_of(voice))
        self._chunks = kokoro.chunks(text, voice, speed, randomness, self._check_open, call)
        self._thread = threading.Thread(target=self._speak, name="speaker", daemon=True)

    def push(self, text: str) -> None:
        """The next piece of the text."""
        self._write(self._sentences.push(text))

    def finish(self) -> None:
        """There is no more text; all of it is still spoken."""
        self._write([*self._sentences.finish(), None])

    def close(self) -> None:
        """End it before the next sentence."""
        self._closed = True
        self._written.put(None)

    def _write(self, pieces: Sequence[str | None]) -> None:
        if pieces and self._thread.ident is None:
            self._thread.start()
        for piece in pieces:
            self._written.put(piece)

    def _check_open(self) -> None:
        self._check()
        if self._closed:
            raise NoSpeech("the answer was closed")

    def _speak(self) -> None:
        end: BaseException | None = None
        try:
            for chunk in self._chunks:
                self._send(chunk)
        except NoSpeech:
            pass  # the completion says so
        except BaseException as error:
            end = error
        self._send(end)
