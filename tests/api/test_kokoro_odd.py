"""Whatever Kokoro is given is spoken, or refused in words of the caller."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimia_infer.api.events import AudioChunk, Completion
from kimia_infer.api.kokoro import FRAMES_PER_SECOND, Kokoro
from kimia_infer.models.kokoro.phonemes.espeak import ESPEAK_LANGUAGES
from kimia_infer.utils.errors import RequestError
from tests.models.kokoro.tiny import SYMBOLS, narrow_kokoro

ODD = (
    "word", "Hello, you!", "...", "?!", "—", "…", '"', "(", ")", "“", ",", ":", " - ", "\n\n", "\t",
    "1" * 40, "1,000.5", "$", "$1e9", "€3", "%", "&", "@", "a@b.c", "www.", "https://a.b/c", "0/0",
    "<speak>", "<break time='1s'/>", "</p", "[a](/b/)", "[x](/ /)", "[x](/?/)", "[](//)", "[",
    "😀", "👩‍👩‍👧", "Привет", "你好。", "こんにちは", "مرحبا", "שלום", "नमस्ते", "ﬁ", "𝓗", "½", "Ⅻ",
    "\x00", "\x1b[31m", "\u202e", "\u2028", "\ufeff", "\ue000", "\udfff", "e\u0301\u0301", "\u0301",
    "a" * 300, "ha" * 200, "a.b.c.", "'", "'tis", "Mr.", "No. 1", "12:61", "9999-99-99", "a-b-c",
)  # fmt: skip
odd_texts = st.lists(st.sampled_from(ODD) | st.text(max_size=6), max_size=8).map("".join)


@pytest.fixture(scope="module")
def kokoro(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kokoro]:
    with narrow_kokoro(tmp_path_factory.mktemp("kokoro")) as directory:
        yield Kokoro(directory, "cpu")


def assert_spoken_or_refused(kokoro: Kokoro, **request: str) -> None:
    """Every chunk has sound, whole frames of it, and words in order; or an error says why not."""
    try:
        *chunks, last = kokoro.stream(**request, noise=False)
    except RequestError as error:
        [given_field] = request.keys() & {"text", "phonemes"}
        assert str(error).startswith(f"{given_field}: ")
        return
    assert chunks and isinstance(last, Completion) and last.wav is not None
    assert torch.isfinite(last.wav).all() and last.wav.abs().max() <= 1
    end = 0.0
    for chunk in chunks:
        assert isinstance(chunk, AudioChunk) and len(chunk.wav) > 0
        assert len(chunk.wav) % (chunk.sample_rate // FRAMES_PER_SECOND) == 0
        for word in chunk.words:
            assert end <= word.start <= word.end
            end = word.end
    assert end <= last.wav.shape[1] / last.sample_rate


@settings(max_examples=settings.default.max_examples // 2)
@given(odd_texts, st.sampled_from(ESPEAK_LANGUAGES))
def test_odd_texts(kokoro: Kokoro, text: str, language: str) -> None:
    assert_spoken_or_refused(kokoro, text=text, language=language)


@given(st.text(st.sampled_from([*SYMBOLS, "g", "\n", "é"]), min_size=1, max_size=400))
def test_odd_phonemes(kokoro: Kokoro, phonemes: str) -> None:
    assert_spoken_or_refused(kokoro, phonemes=phonemes)
