"""What a teacher says to strings of phonemes: durations, pitch and energy to learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kimia_infer.data.conversations import DataError
from kimia_infer.data.phoneme_strings import phoneme_string
from kimia_infer.models.kokoro.config import KokoroConfig
from kimia_infer.models.kokoro.layers import Rows
from kimia_infer.models.kokoro.network import KokoroNetwork, batch_of
from kimia_infer.models.kokoro.prosody import repeat_phonemes, round_durations
from kimia_infer.models.kokoro.voices import Voices
from kimia_infer.training.dataset import TrainingData, usable
from kimia_infer.training.plan import MicroBatch
from kimia_infer.training.tasks.kokoro_config import KokoroTrainingConfig


@dataclass(frozen=True)
class Line:
    """A string of phonemes and the voice that is to say it; ``where`` it is, for reports."""

    where: str
    phonemes: str
    voice: str


@dataclass(frozen=True)
class Example:
    """What goes into the prosody predictor, and what is to come out; of one line or a batch.

    ``encoded`` [time, channels] are phonemes before the first LSTM, ``style`` [style] the prosody
    half of a voice. Of the teacher: ``logits`` [time, longest], ``durations`` int64 [time] in
    frames, ``pitch`` in Hz and ``energy``, both [2 * frames], and ``d`` [time, channels], encoded
    phonemes behind the LSTMs, where its voice is the student's. A batch has a dimension more.
    """

    encoded: Tensor
    style: Tensor
    logits: Tensor
    durations: Tensor
    pitch: Tensor
    energy: Tensor
    d: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class ExampleBatch:
    """Examples padded with zeros; ``lengths`` int64 [batch] in phonemes."""

    examples: Example
    lengths: Tensor
    weights: Tensor
    names: list[str]

    @property
    def rows(self) -> Rows:
        return Rows(self.lengths)

    @property
    def frames(self) -> Rows:
        return Rows(self.examples.durations.sum(1))

    def to(self, device: torch.device) -> ExampleBatch:
        moved = {name: value.to(device) for name, value in self.examples.tensors().items()}
        examples = replace(self.examples, **moved)
        return replace(self, examples=examples, lengths=self.lengths.to(device))


def join(examples: Sequence[Example], weights: Sequence[float], names: list[str]) -> ExampleBatch:
    """A batch of examples, all with or all without ``d``."""
    columns = [example.tensors() for example in examples]
    joined = {
        name: pad_sequence([column[name] for column in columns], batch_first=True)
        for name in columns[0]
    }
    lengths = torch.tensor([len(example.durations) for example in examples])
    return ExampleBatch(Example(**joined), lengths, torch.tensor(weights), names)


class Teacher:
    """The model as it is, or its prosody in ``teacher_voice`` for every other voice."""

    def __init__(self, network: KokoroNetwork, voices: Voices, teacher_voice: str | None):
        self.network, self.voices, self.voice = network, voices, teacher_voice

    @torch.no_grad()
    def __call__(self, line: Line) -> Example:
        network, count = self.network, len(line.phonemes)
        style = taught = prosody_style(self.voices, line.voice, count).to(network.device)
        if self.voice is not None:
            taught = prosody_style(self.voices, self.voice, count).to(network.device)
        predictor = network.predictor
        encoded, rows = encoded_phonemes(network, line.phonemes)
        d = predictor.text_encoder(encoded, taught, rows)
        logits = predictor.durations(d, rows)
        durations = round_durations(logits, logits.new_ones(1), rows)
        frames = repeat_phonemes(d, durations, int(durations.sum()))
        pitch, energy = predictor.curves(frames, taught, Rows())
        kept = d[0, :, : -style.shape[1]] if torch.equal(style, taught) else None
        found = (encoded[0], style[0], logits[0], durations[0], pitch[0], energy[0])
        return Example(*(x.cpu() for x in found), d=None if kept is None else kept.cpu())


def prosody_style(voices: Voices, voice: str, phonemes: int) -> Tensor:
    """The prosody half of a voice, [1, style]."""
    return voices.style(voice, phonemes).chunk(2)[1][None]


def encoded_phonemes(network: KokoroNetwork, phonemes: str) -> tuple[Tensor, Rows]:
    """Phonemes before the first LSTM, [1, time, channels], both boundaries included."""
    symbols = [network.config.vocab[symbol] for symbol in phonemes]
    ids, rows = batch_of([symbols], network.device)
    return network.bert_encoder(network.bert.encode(ids, rows)), rows


@dataclass
class Lines(TrainingData):
    """Lines with what the teacher says to them; the first ones stay in memory.

    ``room`` is how many bytes may still be kept there.
    """

    items: Sequence[Line]
    teacher: Callable[[Line], Example]
    room: float
    kept: dict[Line, Example] = field(default_factory=dict)
    unit = "line"

    @property
    def lengths(self) -> list[int]:
        """Of all lines, in phonemes."""
        return [len(line.phonemes) for line in self.items]

    def example(self, line: Line) -> Example:
        if line in self.kept:
            return self.kept[line]
        example = self.teacher(line)
        size = sum(tensor.nbytes for tensor in example.tensors().values())
        if size <= self.room:
            self.room -= size
            self.kept[line] = example
        return example

    def __getitem__(self, part: MicroBatch) -> ExampleBatch:
        lines = [self.items[index] for index in part.indices]
        examples = [self.example(line) for line in lines]
        return join(examples, part.weights, [line.where for line in lines])


def read_lines(
    settings: KokoroTrainingConfig, data: str | None, config: KokoroConfig
) -> list[Line]:
    """The lines of the file ``data``, or made-up ones, dealt to the voices of ``settings``.

    Raises:
        DataError: naming lines that are empty, too long, or hold what is no phoneme.
    """
    if data is None:
        texts = [phoneme_string(settings.seed, index) for index in range(settings.strings)]
        where = "made-up string"
    else:
        try:
            texts = Path(data).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{data}: cannot be read as text ({error})") from error
        where = f"{data}, line"
    dealt = zip(texts, cycle(settings.voices), strict=False)
    lines = [Line(f"{where} {n}", text.strip(), voice) for n, (text, voice) in enumerate(dealt, 1)]

    def check(line: Line) -> None:
        unknown = sorted(set(line.phonemes) - config.vocab.keys())
        if unknown:
            shown = " ".join(unknown[:10])
            raise DataError(f"{line.where}: {shown}: no phonemes of this model; write phonemes")
        if not 1 <= len(line.phonemes) <= config.max_phonemes:
            raise DataError(
                f"{line.where}: expected 1 .. {config.max_phonemes} phonemes, found "
                f"{len(line.phonemes)}"
            )

    return usable(lines, check, data or "made-up strings", "line", settings.bad_lines == "skip")
