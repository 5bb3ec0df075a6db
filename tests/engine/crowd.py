"""A model whose engine advances only when a test tells it to, and what it is asked."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st

from kimia_infer.api.events import Completion
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.api.request import Deadline, Request, Response, Stopwatch
from kimia_infer.engine.repetition import RepetitionGuard
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.prompt import parse_audio, parse_messages
from tests.api.recorded_chats import CASES, SET, chat_of
from tests.traced import record_steps, set_slots

CAPACITY = 600
CHATS = [name for name in CASES if name != "asr_text_33s"]
SAMPLINGS = [
    {},
    {"text_temperature": 0.9, "text_repetition_penalty": 1.3, "text_repetition_window_size": 4},
    {"text_temperature": 1.3, "text_top_k": 0, "audio_temperature": 1.1, "audio_top_k": 0},
    {"audio_temperature": 0.8, "audio_top_k": 10, "audio_repetition_penalty": 1.4},
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request of the tests."""

    chat: str
    output_type: str = "both"
    steps: int = 40
    sampling: int = 2
    seed: int = 1
    preset: str = "low_latency"
    voice: str | None = None
    stop_repetition: bool = False

    def begin(self, model: KimiAudio) -> tuple[Response, Deadline]:
        options = parse_parameters(
            output_type=self.output_type,
            max_new_tokens=self.steps,
            seed=self.seed,
            preset=self.preset,
            stop_repetition=self.stop_repetition,
            **SAMPLINGS[self.sampling],
        )
        messages, clock = parse_messages(chat_of(CASES[self.chat])), Stopwatch()
        voice = None
        if self.voice is not None and self.output_type == "both":
            assert model.voice_reader is not None
            source = parse_audio("voice", str(SET / "audio" / self.voice))
            voice = model.voice_reader.read(source, model.scheduler.call)
        deadline = Deadline(None)
        request = Request(
            messages,
            model.encoder.load(messages, options, clock),
            options,
            SeededRandomness(self.seed),
            deadline,
            clock,
            RepetitionGuard(24) if self.stop_repetition else None,
            voice=voice,
        )
        return model.begin(request), deadline


requests = st.builds(
    Asked,
    st.sampled_from(CHATS),
    st.sampled_from(["text", "both"]),
    st.integers(1, 60),
    st.integers(0, len(SAMPLINGS) - 1),
    st.integers(0, 2),
    st.sampled_from(["quality", "low_latency"]),
    st.sampled_from([None, None, "train.wav", "stereo24k.wav"]),
    st.booleans(),
)


class Crowd:
    """A model whose engine advances only when it is told to."""

    def __init__(self, model: KimiAudio):
        self.model, self.scheduler, self.decoder = model, model.scheduler, model.decoder
        self.scheduler._thread = threading.current_thread()

    def turn(self) -> None:
        """As the loop of the engine's thread does."""
        try:
            self.scheduler._turn()
        except Exception as error:
            self.scheduler._fail_running(error)

    def finish(self) -> None:
        for _ in range(5000):
            if not (self.scheduler.taken or self.scheduler.queued):
                return
            self.turn()
        raise AssertionError("requests are never answered")

    def reset(self) -> None:
        """Forget what an example before has left when it failed."""
        self.scheduler._queue.clear()
        self.scheduler._fail_running(RuntimeError("forgotten"))

    def answer(self, asked: Asked) -> Completion:
        response, _ = asked.begin(self.model)
        self.finish()
        return completion(response)

    def check_idle(self) -> None:
        """Nothing is held any more."""
        scheduler, decoder = self.scheduler, self.decoder
        assert not (scheduler._queue or scheduler._tasks or scheduler._unread)
        assert not scheduler._running and scheduler._reading is None
        assert not decoder.running and not decoder.room.starts
        assert decoder.room.spans.free == decoder.room.spans.places
        assert decoder.rows.finished[:-1].all()


def completion(response: Response) -> Completion:
    *_, last = response.all_events()
    assert isinstance(last, Completion)
    return last


def error_of(response: Response) -> BaseException:
    with pytest.raises(Exception) as caught:
        completion(response)
    return caught.value


def loaded() -> KimiAudio:
    return KimiAudio(str(SET / "checkpoint"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def alone() -> Callable[[Asked], Completion]:
    """Answers of a model that has nothing else to do."""
    model, known = Crowd(set_slots(loaded(), 1)), {}

    def answer(asked: Asked) -> Completion:
        if asked not in known:
            known[asked] = model.answer(asked)
        return known[asked]

    return answer


@pytest.fixture(scope="module")
def crowds() -> dict[str, Crowd]:
    """One to four slots, with more or less room than they need; direct and recorded steps."""
    return {
        "one": Crowd(set_slots(loaded(), 1, CAPACITY)),
        "two": Crowd(set_slots(loaded(), 2, CAPACITY)),
        "four, little room": Crowd(set_slots(loaded(), 4, CAPACITY, CAPACITY)),
        "recorded": Crowd(record_steps(loaded(), 2, CAPACITY)),
        "recorded, little room": Crowd(record_steps(loaded(), 3, 200, 200)),
    }


def check_same(found: Completion, expected: Completion) -> None:
    assert found.text == expected.text and found.text_ids == expected.text_ids
    assert found.audio_ids == expected.audio_ids and found.codes == expected.codes
    assert found.notes == expected.notes and found.audio_reason == expected.audio_reason
    for name in ("stop_reason", "text_tokens", "speech_codes", "prompt_tokens"):
        assert found.metrics[name] == expected.metrics[name]
    assert (found.wav is None) == (expected.wav is None)
    if found.wav is not None and expected.wav is not None:
        torch.testing.assert_close(found.wav, expected.wav, atol=1e-5, rtol=0)
