"""Step-Audio-EditX as services offer it: parameters, transcripts, one request after the other."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from kimia_infer.api.editx import Clone, EditX
from kimia_infer.api.parameters import Seed, whole_float
from kimia_infer.models.step_audio_editx.edits import NO_TEXT, Edit
from kimia_infer.models.step_audio_editx.reference import LONGEST_SECONDS, Source, load_reference
from kimia_infer.utils.errors import RequestError, ServiceBusy, renamed_as

if TYPE_CHECKING:
    from kimia_infer.api.events import Event
    from kimia_infer.api.kimia import KimiAudio
    from kimia_infer.api.request import Deadline

CLONE = "clone"

NAMES = {"text": "transcript", "target": "text", "new_text": "text", "kind": "task"}
"""Fields of EditXParameters by the names that the library's errors have for them."""

WORKING_BYTES = 3_000_000_000
"""Computed, for the longest answer in bfloat16: 0.3 GB of keys and values, the rest for a chunk of
the flow and the vocoder. Not measured on a GPU."""

KEPT = 64
"""Transcripts that are kept."""

WAIT_SECONDS = 0.1
"""How often a request that waits for its turn looks whether it is still wanted."""

MOST_WAITING = 16
"""Requests that wait; each keeps a thread of its service."""

BUSY_RETRY_MS = 5000
"""When to try again after a refusal for lack of a place among them."""


Task = Literal["clone", "emotion", "style", "speed", "denoise", "vad", "paralinguistic"]


class EditXParameters(BaseModel):
    """What a service is asked for besides the recording; see Clone and Edit of the library."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    task: Task = Field(
        "clone",
        description="Say text in the voice of audio (clone), or the kind of edit that audio gets",
    )
    text: str = Field(
        "",
        max_length=4096,
        description="What to say, or for paralinguistic the transcript with tags like [Laughter]",
    )
    option: str = Field(
        "",
        max_length=100,
        description="Of an edit: the emotion (happy), style (whisper) or speed (faster)",
    )
    transcript: str = Field(
        "",
        max_length=2000,
        description="What is said in audio; not needed for denoise and vad",
    )
    seed: Seed = None

    _whole_float = field_validator("seed", mode="before")(whole_float)

    @property
    def needs_transcript(self) -> bool:
        """Whether what is said in the recording has to be known, and is not given."""
        return self.task not in NO_TEXT and not self.transcript.strip()

    def request(self, transcript: str) -> Clone | Edit:
        """The task of a recording in which ``transcript`` is said.

        Raises RequestError naming the field that is missing, unknown or not used.
        """
        if self.task != CLONE:
            words = "" if self.task in NO_TEXT else transcript
            edit = Edit(self.task, self.option, words, self.text)
            with renamed_as(NAMES):
                edit.check()
            return edit
        if not self.text.strip():
            raise RequestError("text: expected what to say, found none")
        if self.option:
            raise RequestError(f"option: {CLONE} has none, found {self.option[:60]!r}")
        return Clone(transcript, self.text)


class Editor:
    """Answers requests with EditX, one after the other, as they came; others wait.

    ``kimi`` writes down what is said in recordings without a transcript; it may be None.
    """

    def __init__(self, editx: EditX, kimi: KimiAudio | None):
        self.editx, self._kimi = editx, kimi
        self._line: list[object] = []  # who has the turn, then who waits, as they came
        self._moved = threading.Condition()
        self._words: dict[bytes, str] = {}

    def check(self, asked: EditXParameters) -> None:
        """Raise RequestError for what cannot be done with any recording."""
        asked.request(asked.transcript.strip() or "its words")
        if asked.needs_transcript and self._kimi is None:
            raise RequestError(
                "transcript: expected what is said in the recording; this service has no "
                "Kimi-Audio to write it down"
            )

    def respond(
        self, audio: bytes, asked: EditXParameters, deadline: Deadline, *, streams: bool
    ) -> Generator[Event]:
        """What becomes of ``audio``, the content of a file; the last event is the Completion.

        With ``streams`` the others are its sound, while it is made. Raises RequestError naming a
        field of EditXParameters or ``audio``, ServiceBusy where too many wait, and what
        ``deadline`` raises.
        """
        self.check(asked)
        transcript = asked.transcript.strip()
        if asked.needs_transcript:
            transcript = self.words_in(audio, deadline)
        task = asked.request(transcript)
        with renamed_as(NAMES), self._own_turn(deadline):
            if streams:
                yield from self.editx.stream(audio, task, asked.seed, check=deadline.check)
            else:
                yield self.editx.answer(audio, task, asked.seed, check=deadline.check)

    def words_in(self, audio: bytes, deadline: Deadline) -> str:
        """What is said in a recording; that of the last ones is kept.

        Raises RequestError naming ``audio`` or ``transcript``.
        """
        key = hashlib.sha256(audio).digest()
        words = self._words.pop(key, None)
        if words is None:
            assert self._kimi is not None
            with renamed_as(NAMES):
                words = words_of(self._kimi, audio, deadline)
        self._words[key] = words  # last, as the one that was used last
        for old in list(self._words)[:-KEPT]:
            self._words.pop(old, None)
        return words

    @contextlib.contextmanager
    def _own_turn(self, deadline: Deadline) -> Iterator[None]:
        own = object()
        with self._moved:
            if len(self._line) > MOST_WAITING:
                raise ServiceBusy(len(self._line) - 1, BUSY_RETRY_MS)
            self._line.append(own)
        try:
            self._wait(own, deadline)
            yield
        finally:
            with self._moved:
                self._line.remove(own)
                self._moved.notify_all()

    def _wait(self, own: object, deadline: Deadline) -> None:
        while True:
            with self._moved:
                if self._moved.wait_for(lambda: self._line[0] is own, WAIT_SECONDS):
                    return
            deadline.check()


def words_of(model: KimiAudio, audio: Source, deadline: Deadline | None = None) -> str:
    """What is said in a recording, as ``model`` writes it down.

    Raises:
        AudioError: naming ``audio``, for what is no recording of a voice.
        RequestError: naming ``text``, where no words are heard.
    """
    if deadline is None:
        load_reference(audio)
    else:
        load_reference(audio, check=deadline.check)
    heard = model.transcribe(audio, max_seconds=LONGEST_SECONDS, deadline=deadline)
    if not heard.text.strip():
        raise RequestError(
            "text: Kimi-Audio heard no words in the recording; give what is said in it"
        )
    return heard.text.strip()
