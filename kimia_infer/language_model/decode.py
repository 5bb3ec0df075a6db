"""The generation loop over both tracks.

The state of a request - both token stores, the delay, the blanks, the stop conditions - lives
in tensors on the device; the host only looks at them every ``check_interval`` steps and then
trims what ran past the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kimia_infer.language_model.model import LanguageModel
from kimia_infer.language_model.sampler import Sampling, TrackSampling, sample
from kimia_infer.randomness import Randomness

OutputType = Literal["text", "both"]
HeadRows = Literal["full", "track"]


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
    """What a look at the loop brought: ids that are new, and how far it is.

    ``text_ids`` exclude the end token; ``audio_ids`` begin after the delay, end token included.
    """

    steps: int
    text_ids: list[int]
    audio_ids: list[int]
    finished: bool


class Generation:
    """One request on its way through the model.

    Iterate :meth:`run` to the end, or stop early; ``text_ids`` and ``audio_ids`` grow with it.
    ``head_rows="track"`` computes only the logits a track can use: text ids below
    ``token_offset``, audio ids from ``base_tokens`` up; ``"full"`` is what was published.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: DecodeInput,
        control: ControlTokens,
        output_type: OutputType,
        max_steps: int,
        sampling: Sampling,
        randomness: Randomness,
        head_rows: HeadRows = "full",
        check_interval: int = 1,
    ):
        self.model, self.prompt, self.control = model, prompt, control
        self.sampling, self.max_steps = sampling, max_steps
        self.check_interval, self.next_look = check_interval, check_interval
        self.speaks = output_type == "both"
        config, device = model.config, model.device
        cut = head_rows == "track"
        self.text_rows = slice(0, config.token_offset if cut else config.vocab_size)
        self.audio_rows = slice(config.base_tokens if cut else 0, config.vocab_size)
        self.text_uniforms = randomness.uniforms("text", max_steps).to(device)
        self.audio_uniforms = randomness.uniforms("audio", max_steps).to(device)
        self.text_store = torch.zeros(max_steps, dtype=torch.int64, device=device)
        self.audio_store = torch.zeros_like(self.text_store)
        self.text_count = torch.zeros((), dtype=torch.int64, device=device)
        self.text_finished = torch.zeros((), dtype=torch.bool, device=device)
        self.audio_count = torch.zeros_like(self.text_count)
        self.finished = torch.zeros_like(self.text_finished)
        self.audio_ends = torch.tensor(control.audio_ends, device=device)
        self.launched = 0
        self.text_ids: list[int] = []
        self.audio_ids: list[int] = []

    @torch.inference_mode()
    def run(self) -> Iterator[Progress]:
        """Generate until the end token or the step limit; look every ``check_interval`` steps."""
        prompt = self.prompt
        cache = self.model.new_cache(prompt.length + self.max_steps)
        x = self.model.embed(
            prompt.audio_ids, prompt.text_ids, prompt.is_continuous, prompt.features
        )
        position, needs_text = 0, True
        for step in range(self.max_steps):
            hidden = self.model(x, cache, position, text=needs_text, audio=self.speaks)
            position += x.shape[1]
            self._advance(step, hidden.text, hidden.audio)
            self.launched = step + 1
            if self.launched >= min(self.next_look, self.max_steps):
                self.next_look = self.launched + self.check_interval
                progress, text_finished = self._look()
                yield progress
                if progress.finished:
                    return
                # Nothing above the fork reaches the audio track.
                needs_text = not text_finished
            x = self.model.embed(
                self.audio_store[step].view(1, 1), self.text_store[step].view(1, 1)
            )

    def look_by(self, step: int) -> None:
        """Have the next look at ``step`` launched steps, if it is not due earlier."""
        self.next_look = min(self.next_look, step)

    def _look(self) -> tuple[Progress, bool]:
        """Fetch what is new in one transfer; also whether the text track has ended."""
        delay = self.model.config.audio_delay
        text_from, audio_from = len(self.text_ids), delay + len(self.audio_ids)
        state = [self.text_count, self.audio_count, self.text_finished, self.finished]
        new = [
            self.text_store[text_from : self.launched],
            self.audio_store[audio_from : self.launched],
        ]
        values = torch.cat([torch.stack([value.long() for value in state]), *new]).tolist()
        text_count, audio_count, text_finished, finished = values[:4]
        text, audio = values[4 : 4 + len(new[0])], values[4 + len(new[0]) :]
        text = text[: text_count - len(self.text_ids)]
        audio = audio[: audio_count - len(self.audio_ids)]
        self.text_ids += text
        self.audio_ids += audio
        done = bool(finished) or self.launched == self.max_steps
        return Progress(self.launched, text, audio, done), bool(text_finished)

    def _advance(self, step: int, text_hidden: Tensor | None, audio_hidden: Tensor | None) -> None:
        """Choose and store the tokens of ``step`` and update the stop conditions."""
        running = ~self.finished
        text = self.text_store.new_full((), self.control.blank)
        if text_hidden is not None:
            sampled = self._text_token(step, text_hidden)
            text = torch.where(self.text_finished, text, sampled)
            ends = ~self.text_finished & (sampled == self.control.text_end)
            self.text_count += running & ~self.text_finished & ~ends
            self.text_finished |= ends
        self.text_store[step] = text
        audio = self.audio_store.new_full((), self.control.blank)
        if self.speaks and step >= self.model.config.audio_delay:
            audio = self._audio_token(step, audio_hidden)
            self.audio_count += running
            self.finished |= (audio == self.audio_ends).any()
        self.audio_store[step] = audio
        if not self.speaks:
            self.finished |= self.text_finished

    def _text_token(self, step: int, hidden: Tensor) -> Tensor:
        weight = self.model.text_head.weight[self.text_rows]
        return _choose(
            weight, hidden, self.text_rows.start, self.text_store, step, self.text_uniforms,
            self.sampling.text,
        )  # fmt: skip

    def _audio_token(self, step: int, hidden: Tensor) -> Tensor:
        weight = self.model.audio_head.weight[self.audio_rows]
        return _choose(
            weight, hidden, self.audio_rows.start, self.audio_store, step, self.audio_uniforms,
            self.sampling.audio,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        """Steps up to the end of the answer; more may have been launched before it was seen."""
        if not self.finished:
            return self.launched
        if self.speaks:
            return self.model.config.audio_delay + len(self.audio_ids)
        return len(self.text_ids) + 1


def _choose(
    head: Tensor,
    hidden: Tensor,
    first_row: int,
    history: Tensor,
    step: int,
    uniforms: Tensor,
    sampling: TrackSampling,
) -> Tensor:
    """Sample from the last position's logits over the head's rows, which start at an id."""
    logits = torch.nn.functional.linear(hidden[0, -1], head)
    return first_row + sample(logits, history - first_row, step, uniforms[step], sampling)
