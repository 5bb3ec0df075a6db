"""Kokoro as callers use it: events, words, voices, seeds and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kimia_infer.api.events import AudioChunk, Completion
from kimia_infer.api.kokoro import Kokoro
from kimia_infer.utils.errors import RequestError
from tests.models.kokoro.recorded import write_whole
from tests.models.kokoro.tiny import narrow_kokoro

TEXT = "Hello there, world! How are you?"
SHORT = "Hi there."


@pytest.fixture(scope="module")
def kokoro(tmp_path_factory: pytest.TempPathFactory) -> Kokoro:
    directory = tmp_path_factory.mktemp("kokoro")
    write_whole(directory)
    return Kokoro(directory, "cpu", lexicon={"kimi": "kˈimi"})


def test_events(kokoro: Kokoro) -> None:
    *chunks, last = kokoro.stream(TEXT, seed=5)
    assert isinstance(last, Completion) and len(chunks) == 2
    assert all(isinstance(c, AudioChunk) and c.sample_rate == 24_000 for c in chunks)
    assert torch.equal(last.wav[0], torch.cat([c.wav for c in chunks]))
    assert last.text == TEXT and last.metrics["sentences"] == 2 and last.metrics["seed"] == 5
    words = [word for chunk in chunks for word in chunk.words]
    assert [word.text for word in words] == ["Hello", "there", "world", "How", "are", "you"]
    ends = [time for word in words for time in (word.start, word.end)]
    assert ends == sorted(ends) and ends[-1] <= last.wav.shape[1] / 24_000
    assert words[3].start >= len(chunks[0].wav) / 24_000


def test_what_is_drawn_depends_on_the_seed_and_the_sentence(kokoro: Kokoro) -> None:
    one, same, other = (kokoro.speak(SHORT, seed=s).wav for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    quiet = [kokoro.speak(SHORT, seed=s, noise=False).wav for s in (1, 2)]
    assert torch.equal(*quiet)


def test_speed_and_voice(kokoro: Kokoro) -> None:
    slow, fast = (kokoro.speak(SHORT, speed=s, seed=1).wav.shape[1] for s in (0.5, 2))
    assert slow > fast
    mixed = kokoro.speak(SHORT, "af_heart:0.5+am_michael", seed=1).wav
    assert not torch.equal(mixed, kokoro.speak(SHORT, "am_michael", seed=1).wav)


def test_phonemes_and_lexicon(kokoro: Kokoro) -> None:
    spoken = kokoro.speak(phonemes="ðə kˈimi mˈɑdᵊl.", seed=1)
    read = kokoro.speak("[The](/ðə/) Kimi model.", seed=1)
    assert torch.equal(spoken.wav, read.wav)


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"architecture": "aarch64"}, torch.float32),
    ],
)
def test_dtype_by_processor(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capabilities: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    with narrow_kokoro(tmp_path):
        network = Kokoro(tmp_path, "cpu").network
        exact = Kokoro(tmp_path, "cpu", torch.float32).network
    assert network.decoder.dtype is dtype and network.bert_encoder.weight.dtype is torch.float32
    assert exact.decoder.dtype is torch.float32


def test_a_caller_that_gives_up(kokoro: Kokoro) -> None:
    def check() -> None:
        if chunks:
            raise TimeoutError

    chunks: list[object] = []
    with pytest.raises(TimeoutError):
        for event in kokoro.stream(TEXT, check=check):
            chunks.append(event)
    assert len(chunks) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ""}, "text: expected a text or phonemes"),
        ({"text": "a", "phonemes": "a"}, "and not both"),
        ({"text": "a", "voice": "nobody"}, "voice: unknown voice"),
        ({"text": "a", "speed": 9}, r"speed: expected 0\.25 \.\. 4"),
        ({"text": "a", "speed": float("nan")}, "speed: expected"),
        ({"text": "a", "seed": -1}, "seed: expected"),
        ({"text": "a", "language": "xx"}, "language: expected one of"),
        ({"text": "..."}, "text: nothing in it can be spoken"),
    ],
)
def test_refusals(kokoro: Kokoro, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        kokoro.speak(**arguments)
