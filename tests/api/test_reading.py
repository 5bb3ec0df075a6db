"""Texts read aloud: where they are cut, and how their pieces follow each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from kimia_infer.api.events import AudioChunk, Completion, Event
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.api.reading import READ, Reading, read_aloud
from kimia_infer.utils.errors import NoSpeech, RequestCancelled, RequestError

SPEECH = parse_parameters(output_type="both")
RATE = 10
METRICS = {"prompt_tokens": 5, "decode_steps": 4, "text_tokens": 3, "speech_codes": 2}


@dataclass
class Answer:
    """Two chunks of speech whose samples are the number of the piece, or none."""

    model: Model
    number: int

    def all_events(self) -> Iterator[Event]:
        speaks = self.number not in self.model.mute
        for _ in range(2 * speaks):
            self.model.log.append(f"sound {self.number}")
            yield AudioChunk(torch.full((2,), float(self.number)), RATE)
        reason = None if speaks else "no speech: scripted"
        yield Completion(None, RATE, "", [], [], [], METRICS, reason)

    def close(self) -> None:
        self.model.log.append(f"close {self.number}")


@dataclass
class Model:
    """Stands for an engine; the pieces ``mute`` are not spoken."""

    mute: tuple[int, ...] = ()
    log: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def start(self, chat: list[dict], options: Any, **rest: Any) -> Answer:
        [message] = chat
        self.asked.append(message["content"])
        self.log.append(f"begin {len(self.asked)}")
        return Answer(self, len(self.asked))


def read(model: Any, text: str, **arguments: Any) -> tuple[list[float], Reading]:
    *chunks, reading = read_aloud(model, text, SPEECH, **arguments)
    assert isinstance(reading, Reading)
    assert all(isinstance(chunk, AudioChunk) and chunk.sample_rate == RATE for chunk in chunks)
    return torch.cat([chunk.wav for chunk in chunks]).tolist(), reading


def test_the_next_piece_begins_once_one_sounds() -> None:
    model = Model()
    samples, reading = read(model, "One. Two. Three.")
    assert samples == [1.0] * 4 + [0.0] * 2 + [2.0] * 4 + [0.0] * 2 + [3.0] * 4
    order = ["begin 1", "sound 1", "begin 2", "sound 1", "sound 2", "begin 3", "sound 2"]
    assert model.log == [*order, "sound 3", "sound 3"]
    assert model.asked == [f"{READ}One.", f"{READ}Two.", f"{READ}Three."]
    assert reading.metrics["speech_codes"] == 6 and reading.metrics["output_audio_seconds"] == 1.2
    assert reading.notes == []


def test_instructions_go_before_every_piece() -> None:
    model = Model()
    read(model, "One. Two.", instructions=" Softly. ")
    assert model.asked == [f"Softly.\n{READ}One.", f"Softly.\n{READ}Two."]


def test_a_piece_that_is_not_spoken_is_noted() -> None:
    samples, reading = read(Model(mute=(1, 3)), "One. Two. Three.")
    assert samples == [2.0] * 4
    assert reading.notes == [f"piece {n} of 3: no speech: scripted" for n in (1, 3)]
    with pytest.raises(NoSpeech, match=r"spoke none of it.*piece 2 of 2: no speech: scripted"):
        read(Model(mute=(1, 2)), "One. Two.")


def test_what_cannot_be_read_is_refused_before_anything_is_asked() -> None:
    model: Any = Model()
    with pytest.raises(NoSpeech, match="no words"):
        read_aloud(model, " ... ", SPEECH)
    with pytest.raises(RequestError, match=r"^output_type: "):
        read_aloud(model, "One.", parse_parameters(output_type="text"))
    assert model.log == []


def test_who_stops_listening_gives_up_what_is_under_way() -> None:
    model: Any = Model()
    events = read_aloud(model, "One. Two. Three.", SPEECH)
    next(events)
    next(events)  # which began the second piece
    events.close()
    assert model.log[-2:] == ["close 1", "close 2"]


def test_a_failure_gives_up_what_is_under_way() -> None:
    class Failing(Model):
        def start(self, chat: list[dict], options: Any, **rest: Any) -> Answer:
            if len(self.asked) == 2:
                raise RequestCancelled("gone")
            return super().start(chat, options, **rest)

    model = Failing()
    with pytest.raises(RequestCancelled):
        read(model, "One. Two. Three.")
    assert model.log[-1] == "close 2"
