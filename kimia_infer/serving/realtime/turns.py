"""Turns of the user: cut out of the sound that comes in."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from kimia_infer.serving.openai.errors import ApiError
from kimia_infer.serving.realtime.config import ServerVad
from kimia_infer.serving.realtime.input_buffer import InputBuffer
from kimia_infer.serving.realtime.schema import SAMPLE_BYTES, SAMPLE_RATE, samples_in
from kimia_infer.serving.realtime.voice_activity import Stream, VoiceActivity

MAX_TURN_SECONDS = 60
"""Longest turn; with the answer it has to fit into two minutes of positions."""

MIN_TURN_SECONDS = 0.1

SLICE_BYTES = SAMPLE_RATE
"""Sound is listened to in pieces of half a second, between which other events are handled."""


@dataclass(frozen=True)
class SpeechStarted:
    """A turn begins at sample ``begin``, the padding before the voice included."""

    begin: int


@dataclass(frozen=True)
class SpeechStopped:
    """A turn ends before sample ``end``, the silence after it included; ``sound`` is all of it."""

    end: int
    sound: bytes


class Turns:
    """The input buffer, and the turns that voice activity makes of it."""

    def __init__(self, activity: VoiceActivity, stream: Stream):
        self._activity, self._stream = activity, stream
        self.buffer = InputBuffer()
        self._begin: int | None = None

    @property
    def speaking(self) -> bool:
        return self._begin is not None

    async def append(
        self, sound: bytes, vad: ServerVad | None
    ) -> AsyncGenerator[SpeechStarted | SpeechStopped]:
        """Add sound (int16 samples at 24 kHz); without ``vad`` it waits for :meth:`commit`.

        Raises ApiError if that would be more than a turn may have.
        """
        longest = MAX_TURN_SECONDS * SAMPLE_RATE
        if vad is None:
            if len(self.buffer) + len(sound) // SAMPLE_BYTES > longest:
                raise ApiError(
                    400,
                    f"audio: the buffer would hold more than {MAX_TURN_SECONDS} s, the longest "
                    "turn here; nothing was added: commit or clear it",
                    "audio",
                    "input_audio_buffer_full",
                )
            self.buffer.append(sound)
            return
        for place in range(0, len(sound), SLICE_BYTES):
            piece = sound[place : place + SLICE_BYTES]
            self.buffer.append(piece)
            for change in await self._activity.listen(self._stream, piece, vad):
                if change.speaking:
                    begin = change.sample - samples_in(vad.prefix_padding_ms)
                    self._begin = max(begin, self.buffer.begin)
                    yield SpeechStarted(self._begin)
                else:
                    yield self._stop(min(change.sample, self.buffer.end))
            if self._begin is not None and self.buffer.end - self._begin >= longest:
                self._stream.speaking = False
                yield self._stop(self._begin + longest)
            elif self._begin is None:
                self.buffer.drop(self.buffer.end - longest)

    def _stop(self, end: int) -> SpeechStopped:
        assert self._begin is not None
        sound = self.buffer.take(self._begin, end)
        self._begin = None
        return SpeechStopped(end, sound)

    def commit(self) -> bytes:
        """All that is in the buffer, as a turn. Raises ApiError for less than 100 ms."""
        if len(self.buffer) < MIN_TURN_SECONDS * SAMPLE_RATE:
            raise ApiError(
                400,
                f"the buffer holds {1000 * len(self.buffer) / SAMPLE_RATE:.2f} ms of sound, and a "
                f"turn has at least {1000 * MIN_TURN_SECONDS:.0f} ms",
                code="input_audio_buffer_commit_empty",
            )
        sound = self.buffer.take(self.buffer.begin, self.buffer.end)
        self.restart()
        return sound

    def silence(self, begin: int) -> bytes:
        """What was heard since sample ``begin`` without a voice in it, at least 100 ms."""
        sound = self.buffer.take(begin, self.buffer.end)
        self.restart()
        return sound.ljust(round(MIN_TURN_SECONDS * SAMPLE_RATE) * SAMPLE_BYTES, b"\0")

    def clear(self) -> None:
        self.buffer.drop(self.buffer.end)
        self.restart()

    def restart(self) -> None:
        """Listen anew from the end of the buffer: a voice that goes on begins another turn."""
        self._begin = None
        self._stream.received = self.buffer.end
        self._stream.reset()
