"""Answers whose text is spoken by Kokoro: events, order, ends, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kimia_infer.api.events import AudioChunk, Completion, Event, TextDelta
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.kokoro import Kokoro
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.api.reading import Reading, read_aloud
from kimia_infer.api.request import Deadline
from kimia_infer.api.spoken import speakers
from kimia_infer.models.kokoro.phonemes import misaki
from kimia_infer.utils.errors import NoSpeech, RequestCancelled, RequestError
from tests.models.kokoro.tiny import narrow_kokoro
from tests.scripted import script

CHAT = [{"role": "user", "message_type": "text", "content": "how are you"}]
TEXT = "Hello there, my good friend. It is 3.5 degrees here.\nHow are you today?"
HEART: dict[str, Any] = {"output_type": "both", "speaker": "kokoro:af_heart", "seed": 1}


@pytest.fixture(scope="module")
def kokoro(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kokoro]:
    with narrow_kokoro(tmp_path_factory.mktemp("kokoro")) as directory:
        yield Kokoro(directory, "cpu")


@pytest.fixture(scope="module")
def model(golden: Path, kokoro: Kokoro) -> KimiAudio:
    checkpoint = golden / "e2e" / "checkpoint"
    return KimiAudio(str(checkpoint), load_detokenizer=False, device="cpu", kokoro=kokoro)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, model: KimiAudio) -> Callable[[str], None]:
    return lambda text: script(monkeypatch, model, model.text_tokenizer.encode(text))


def kinds(events: list[Event]) -> str:
    """``T`` for each run of text, ``A`` for each chunk of sound, ``C`` for the completion."""
    letters = "".join({TextDelta: "T", AudioChunk: "A", Completion: "C"}[type(e)] for e in events)
    while "TT" in letters:
        letters = letters.replace("TT", "T")
    return letters


def test_the_text_is_spoken_sentence_by_sentence(
    model: KimiAudio, kokoro: Kokoro, says: Callable[[str], None]
) -> None:
    says(TEXT)
    events = list(model.stream(CHAT, **HEART))
    *_, last = events
    assert isinstance(last, Completion)
    assert last.text == TEXT == "".join(e.text for e in events if isinstance(e, TextDelta))
    assert last.metrics["speaker"] == "kokoro:af_heart"
    assert last.codes == last.audio_ids == [] and last.audio_reason is None and not last.notes
    chunks = [e for e in events if isinstance(e, AudioChunk)]
    assert [e.sample_rate for e in [*chunks, last]] == 4 * [24_000]
    assert torch.equal(last.wav[0], torch.cat([chunk.wav for chunk in chunks]))
    alone = kokoro.speak(TEXT, "af_heart", seed=1)
    assert torch.equal(last.wav, alone.wav)
    assert chunks[1].words[0].start >= len(chunks[0].wav) / 24_000
    assert last.metrics["output_audio_seconds"] == last.wav.shape[1] / 24_000


def test_sound_comes_before_the_text_is_complete(
    model: KimiAudio, kokoro: Kokoro, monkeypatch: pytest.MonkeyPatch, says: Callable[[str], None]
) -> None:
    """The model writes no more than a sentence ahead until the first one is heard."""
    says(TEXT)
    heard, step = threading.Event(), model.scheduler.decoder.step

    def waiting_step() -> Any:
        if decoded_steps[0] > 30:
            assert heard.wait(60)
        decoded_steps[0] += 1
        return step()

    decoded_steps = [0]
    monkeypatch.setattr(model.scheduler.decoder, "step", waiting_step)
    events = []
    for event in model.stream(CHAT, **HEART):
        events.append(event)
        if isinstance(event, AudioChunk):
            heard.set()
    assert kinds(events).startswith("TAT")


def test_the_same_seed_gives_the_same_answer(model: KimiAudio, says: Callable[[str], None]) -> None:
    says(TEXT)
    wav, text = model.generate(CHAT, **HEART)
    again, _ = model.generate(CHAT, **HEART)
    fast, _ = model.generate(CHAT, **HEART | {"speed": 2.0})
    other, _ = model.generate(CHAT, **HEART | {"speaker": "kokoro:af_heart:0.2+am_adam"})
    assert text == TEXT and torch.equal(wav, again)
    assert fast.shape[1] < wav.shape[1] and not torch.equal(other, wav)


def test_nothing_to_speak(model: KimiAudio, says: Callable[[str], None]) -> None:
    says("... !?")
    answer = model.complete(CHAT, parse_parameters(**HEART))
    assert answer.text == "... !?" and answer.wav is None
    assert answer.audio_reason == "no speech: nothing in the text can be spoken"


def test_a_cancelled_answer_speaks_no_further_sentence(
    model: KimiAudio, kokoro: Kokoro, monkeypatch: pytest.MonkeyPatch, says: Callable[[str], None]
) -> None:
    says(TEXT)
    deadline, spoken, waves = Deadline(None), [], kokoro.network.waves

    def counted(*given: Any) -> Any:
        spoken.append(given)
        deadline.cancel()
        return waves(*given)

    monkeypatch.setattr(kokoro.network, "waves", counted)
    with pytest.raises(RequestCancelled):
        list(model.respond(CHAT, parse_parameters(**HEART), deadline=deadline))
    assert len(spoken) == 1


def test_a_closed_answer_speaks_no_further_sentence(
    model: KimiAudio, kokoro: Kokoro, monkeypatch: pytest.MonkeyPatch, says: Callable[[str], None]
) -> None:
    says(TEXT)
    begun, closed, waves = [], threading.Event(), kokoro.network.waves

    def counted(*given: Any) -> Any:
        begun.append(given)
        assert len(begun) == 1 or closed.wait(60)
        return waves(*given)

    monkeypatch.setattr(kokoro.network, "waves", counted)
    events = model.stream(CHAT, **HEART)
    assert any(isinstance(event, AudioChunk) for event in events)
    events.close()
    closed.set()
    for thread in threading.enumerate():
        if thread.name == "speaker":
            thread.join(60)
    assert len(begun) <= 2  # the second may have begun before the close


def test_an_error_of_kokoro_is_that_of_the_answer(
    model: KimiAudio, kokoro: Kokoro, monkeypatch: pytest.MonkeyPatch, says: Callable[[str], None]
) -> None:
    def failing(*given: Any) -> Any:
        raise RuntimeError("planted")

    says(TEXT)
    monkeypatch.setattr(kokoro.network, "waves", failing)
    with pytest.raises(RuntimeError, match="planted"):
        model.generate(CHAT, **HEART)
    monkeypatch.undo()
    says("Fine again.")
    assert model.generate(CHAT, **HEART)[0] is not None


@pytest.mark.parametrize(("device", "name"), [("cpu", "speaker"), ("cuda", "engine")])
def test_an_accelerator_is_used_by_the_thread_of_the_engine_alone(
    model: KimiAudio,
    kokoro: Kokoro,
    monkeypatch: pytest.MonkeyPatch,
    says: Callable[[str], None],
    device: str,
    name: str,
) -> None:
    def counted(*given: Any) -> Any:
        threads.append(threading.current_thread().name)
        return waves(*given)

    says("Hello there. How are you today?")
    threads, waves = list[str](), kokoro.network.waves
    monkeypatch.setattr(kokoro.network, "waves", counted)
    monkeypatch.setattr(Kokoro, "device", torch.device(device))  # the network's is the CPU
    assert model.generate(CHAT, **HEART)[0] is not None
    assert threads == [name, name]


def test_a_text_is_read_aloud(model: KimiAudio, kokoro: Kokoro) -> None:
    options = parse_parameters(**HEART | {"speed": 1.5})
    *chunks, last = read_aloud(model, TEXT, options)
    assert isinstance(last, Reading) and last.metrics["seed"] == 1
    waves = [chunk.wav for chunk in chunks if isinstance(chunk, AudioChunk)]
    alone = kokoro.speak(TEXT, "af_heart", speed=1.5, seed=1)
    assert len(waves) == 3 and torch.equal(torch.cat(waves), alone.wav[0])
    with pytest.raises(NoSpeech, match="nothing in it can be spoken"):
        list(read_aloud(model, "...", options))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speaker": "af_heart"}, "speaker: expected kokoro:NAME, for example kokoro:af_heart"),
        ({"speaker": "kokoro:af_hart"}, "speaker: unknown voice 'af_hart'; did you mean af_heart"),
        ({"speaker": "kokoro:af_heart:0"}, "speaker: expected a weight above 0"),
        ({"output_type": "text"}, "speaker: only speech has one; ask for output_type='both'"),
        ({"voice": "a.wav"}, "voice: a speaker of Kokoro has its own"),
        (
            {"speed": 5.0},
            r"speed: expected a finite number of at least 0.25 and at most 4.0, found 5.0",
        ),
        ({"speaker": "", "speed": 2.0}, "speed: the model itself speaks at 1.0"),
        ({"speaker": ""}, "output_type: 'both' needs the detokenizer.*name a speaker of Kokoro"),
    ],
)
def test_what_is_refused(model: KimiAudio, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{message}"):
        model.generate(CHAT, **HEART | arguments)


def test_texts_that_end_an_answer_are_for_text_alone(model: KimiAudio) -> None:
    with pytest.raises(RequestError, match=r"^stop: only for answers that are text"):
        list(model.respond(CHAT, parse_parameters(**HEART), stop=["good"]))


def test_voices_that_nothing_reads_are_not_offered(
    model: KimiAudio, kokoro: Kokoro, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = ["jieba"]
    monkeypatch.setattr(misaki, "missing", lambda language: absent)
    monkeypatch.setattr(kokoro.voices, "names", ["af_heart", "bf_emma", "zf_xiaoxiao"])
    assert speakers(kokoro) == {"kokoro:af_heart": "en-us", "kokoro:bf_emma": "en-gb"}
    with pytest.raises(RequestError, match=r"^speaker: nothing is installed here that reads 'zh'"):
        model.generate(CHAT, **HEART | {"speaker": "kokoro:zf_xiaoxiao"})
    absent.clear()
    assert speakers(kokoro)["kokoro:zf_xiaoxiao"] == "zh"


def test_without_kokoro_the_fix_is_named(model: KimiAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "kokoro", None)
    with pytest.raises(RequestError, match=r"^speaker: .*KIMI_AUDIO_KOKORO=auto"):
        model.generate(CHAT, **HEART)
