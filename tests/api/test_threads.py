"""A model that several threads use, and what becomes of its own thread."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.models.kimi_audio.prompt import parse_messages
from tests.paths import GOLDEN, ROOT

CHAT = [{"role": "user", "message_type": "text", "content": "tell me about the weather"}]
SPOKEN = {"output_type": "both", "max_new_tokens": 40, "text_temperature": 1.0,
          "audio_temperature": 1.0, "preset": "low_latency"}  # fmt: skip
PATIENCE = 60.0
AUDIO = GOLDEN / "e2e" / "audio"


@pytest.fixture
def load(golden: Path) -> Callable[[], KimiAudio]:
    return lambda: KimiAudio(str(golden / "e2e" / "checkpoint"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def model(golden: Path) -> KimiAudio:
    return KimiAudio(str(golden / "e2e" / "checkpoint"), device="cpu", dtype="float32")


def same(one: tuple, other: tuple) -> bool:
    return one[1] == other[1] and torch.allclose(one[0], other[0], atol=1e-5, rtol=0)


def test_many_threads_get_the_answers_of_one(model: KimiAudio) -> None:
    """More of them than there are slots."""
    count = model.scheduler.slots + 4

    def ask(seed: int) -> tuple:
        return model.generate(CHAT, seed=seed % 3, **SPOKEN)

    expected = [ask(seed) for seed in range(3)]
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(ask, range(count)))
    assert all(same(answer, expected[i % 3]) for i, answer in enumerate(answers))
    assert not same(expected[0], expected[1])
    assert model.decoder.room.spans.free == model.decoder.room.spans.places


def test_one_thread_computes(model: KimiAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what belongs to no request, beside requests: voices, prompts, speech of given codes."""
    voice, codes = str(AUDIO / "train.wav"), torch.arange(70)[None]
    heard = [{"role": "user", "message_type": "audio", "content": voice}]

    def say() -> torch.Tensor:
        return model.detokenize_audio(codes, seed=3)

    def answer(**arguments) -> torch.Tensor:
        return model.generate(CHAT, seed=1, **SPOKEN, **arguments)[0]

    def encode() -> torch.Tensor:
        _, features = model.encode_chat(parse_messages(heard), parse_parameters())
        assert features is not None
        return features

    asked = [say, encode, answer, lambda: answer(voice=voice)]
    expected, threads = [ask() for ask in asked], set()

    def watch(owner: object, name: str) -> None:
        compute = getattr(owner, name)

        def watched(*arguments):
            threads.add(threading.current_thread())
            return compute(*arguments)

        monkeypatch.setattr(owner, name, watched)

    watch(model.speech_codes, "encode_all")
    watch(model.whisper_features, "encode_all")
    watch(model.detokenizer, "push_together")
    watch(model.decoder, "step")
    other = str(AUDIO / "stereo24k.wav")  # so that the first voice is read again
    model.generate(CHAT, seed=1, voice=other, **SPOKEN)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda ask: ask(), asked * 2))
    for result, wanted in zip(found, expected * 2, strict=True):
        torch.testing.assert_close(result, wanted, atol=1e-5, rtol=0)
    assert threads == {model.scheduler._thread}


def test_a_call_that_fails_tells_its_caller_alone(model: KimiAudio) -> None:
    with pytest.raises(ZeroDivisionError):
        model.scheduler.call(lambda: 1 / 0)
    assert model.scheduler.call(lambda: 5) == 5


def test_who_never_reads_holds_back_nobody(model: KimiAudio) -> None:
    expected = model.generate(CHAT, seed=1, **SPOKEN)
    streams = [model.stream(CHAT, seed=2, **SPOKEN) for _ in range(model.scheduler.slots)]
    for stream in streams:
        next(stream)
    assert same(model.generate(CHAT, seed=1, **SPOKEN), expected)
    for stream in streams:
        stream.close()
    assert same(model.generate(CHAT, seed=1, **SPOKEN), expected)


def test_an_interrupt_leaves_a_usable_model(
    model: KimiAudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.generate(CHAT, seed=1, **SPOKEN)
    step = model.decoder.step

    def interrupted():
        """The step during which the user presses Ctrl-C, and which sees the request go."""
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGINT)
        (task,) = model.scheduler._tasks
        end = time.monotonic() + PATIENCE
        while not task.abandoned and time.monotonic() < end:
            time.sleep(0.001)
        return step()

    monkeypatch.setattr(model.decoder, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate(CHAT, seed=1, **SPOKEN)
    assert same(model.generate(CHAT, seed=1, **SPOKEN), expected)
    assert model.decoder.room.spans.free == model.decoder.room.spans.places


def test_the_thread_ends_with_the_model(load: Callable[[], KimiAudio]) -> None:
    model = load()
    stream = model.stream(CHAT, seed=1, **SPOKEN)
    next(stream)
    thread = model.scheduler._thread
    assert thread is not None and thread.is_alive()
    del model, stream
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_device_that_frees_nothing_ends_the_engine_with_an_error(
    load: Callable[[], KimiAudio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For those that run, those that wait and those that come later; nobody waits for ever."""
    model = load()
    begun, go = threading.Event(), threading.Event()

    def broken() -> None:
        begun.set()
        go.wait(PATIENCE)
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(model.decoder, "step", broken)
    monkeypatch.setattr(model.decoder, "reset", broken)
    scheduler = model.scheduler
    count = scheduler.slots + 2
    with ThreadPoolExecutor(count + 1) as pool:
        answers = [pool.submit(model.generate, CHAT, seed=1, **SPOKEN) for _ in range(count)]
        assert begun.wait(PATIENCE)
        answers.append(pool.submit(scheduler.call, lambda: None))
        end = time.monotonic() + PATIENCE
        while scheduler.queued + scheduler.taken < count or not scheduler._calls:
            assert time.monotonic() < end
            time.sleep(0.001)
        go.set()
        errors = [answer.exception(PATIENCE) for answer in answers]
    assert all("the device is lost" in str(error) for error in errors)
    with pytest.raises(RuntimeError, match=r"engine has stopped.*the device is lost"):
        model.generate(CHAT)
    with pytest.raises(RuntimeError, match=r"engine has stopped.*the device is lost"):
        scheduler.call(lambda: None)


LEAVES = """
import sys
from kimia_infer.api.kimia import KimiAudio

model = KimiAudio(sys.argv[1], device="cpu", dtype="float32")
chat = [{"role": "user", "message_type": "text", "content": "a long answer"}]
streams = [model.stream(chat, text_temperature=2.0, text_top_k=0, seed=n) for n in range(3)]
for stream in streams:
    next(stream)
print("leaving")
"""


def test_a_process_may_end_while_requests_run(golden: Path) -> None:
    command = [sys.executable, "-c", LEAVES, str(golden / "e2e" / "checkpoint")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert (done.returncode, done.stdout) == (0, "leaving\n"), done.stderr
    assert "Traceback" not in done.stderr
