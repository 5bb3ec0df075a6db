"""One request on its way through the model, as the host sees it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from kimia_infer.layers.sampler import Randomness, Sampling

OutputType = Literal["text", "both"]


class Tracks(NamedTuple):
    """Which tracks a step computes."""

    text: bool
    audio: bool


TEXT = Tracks(text=True, audio=False)
BOTH = Tracks(text=True, audio=True)
# After the text has ended: nothing above the fork reaches the audio track.
AUDIO = Tracks(text=False, audio=True)


@dataclass(frozen=True)
class ControlTokens:
    """Ids that steer the loop: the blank of both tracks and the tokens that end them."""

    blank: int
    text_end: int
    audio_ends: tuple[int, ...]


@dataclass(frozen=True)
class DecodeInput:
    """The prompt as the model reads it.

    audio_ids, text_ids int64 [1, length]; is_continuous bool [1, length]; features
    [continuous positions, adaptor_input_dim] or None when the prompt has no audio.
    """

    audio_ids: Tensor
    text_ids: Tensor
    is_continuous: Tensor | None = None
    features: Tensor | None = None

    @property
    def length(self) -> int:
        return self.audio_ids.shape[1]


@dataclass(frozen=True)
class Progress:
    """The result of a poll: new ids, and how far the generation is.

    ``text_ids`` exclude the end token; ``audio_ids`` begin after the delay, end token included.
    """

    steps: int
    text_ids: list[int]
    audio_ids: list[int]
    finished: bool


class Decodes(Protocol):
    """What a generation needs of the decoder: the positions and the delay, and a run alone."""

    capacity: int
    delay: int

    def run(self, generation: Generation) -> Generator[Progress]: ...


class Generation:
    """One request on its way through the model.

    ``text_ids`` and ``audio_ids`` grow with it. ``poll_interval`` is the most steps between two
    polls of the device. ``broken`` says that its logits were not finite, which ended it.
    """

    def __init__(
        self,
        decoder: Decodes,
        prompt: DecodeInput,
        output_type: OutputType,
        max_steps: int,
        sampling: Sampling,
        randomness: Randomness,
        poll_interval: int = 1,
    ):
        self.positions = prompt.length + max_steps
        if self.positions > decoder.capacity:
            raise ValueError(
                f"{self.positions} positions do not fit in a capacity of {decoder.capacity}"
            )
        self.decoder, self.prompt, self.randomness = decoder, prompt, randomness
        self.sampling, self.max_steps, self.poll_interval = sampling, max_steps, poll_interval
        self._poll_at = 0
        self.delay = decoder.delay
        self.tracks = BOTH if output_type == "both" else TEXT
        self.speaks = self.tracks.audio
        self.launched, self.fetched = 0, 0
        self.ended = self.broken = False
        self.text_ids: list[int] = []
        self.audio_ids: list[int] = []

    @property
    def positions_launched(self) -> int:
        """Positions of the prompt and of the steps launched so far."""
        return self.prompt.length + self.launched

    def run(self) -> Generator[Progress]:
        """Generate until the end token or the step limit, alone; may be stopped early."""
        return self.decoder.run(self)

    def poll_by(self, step: int) -> None:
        """Poll after ``step`` launched steps at the latest."""
        step = max(step, self.launched + 1)
        self._poll_at = min(self._poll_at, step) if self._poll_at > self.launched else step

    @property
    def due(self) -> int:
        """Steps to launch until the next poll, at least one."""
        next_poll = self.fetched + self.poll_interval
        if self._poll_at > self.launched:
            next_poll = min(next_poll, self._poll_at)
        return max(1, min(next_poll, self.max_steps) - self.launched)

    def take(self, row: Sequence[int], start: int, width: int) -> Progress:
        """Keep what a poll brought of the steps from ``start`` on."""
        steps, text_count, audio_count, text_ended, ended, finished, broken = row[:7]
        text, audio = row[7 : 7 + width], row[7 + width :]
        new = Progress(
            steps,
            list(text[: max(0, text_count - start)]),
            list(audio[max(0, self.delay - start) : max(0, audio_count + self.delay - start)]),
            bool(finished),
        )
        self.text_ids += new.text_ids
        self.audio_ids += new.audio_ids
        if self.speaks and text_ended:
            self.tracks = AUDIO
        self.ended, self.broken = bool(ended), bool(broken)
        return new

    @property
    def steps(self) -> int:
        """Steps up to the end of the answer; more may have been launched before it was seen."""
        if not self.ended:
            return self.launched
        return self.delay + len(self.audio_ids) if self.speaks else len(self.text_ids) + 1
