"""Texts that end before a sequence, however they come in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimia_infer.api.events import Completion, TextDelta
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import parse_parameters
from kimia_infer.models.kimi_audio.text_tokenizer import StopText
from kimia_infer.utils.errors import RequestError

CHAT = [{"role": "user", "message_type": "text", "content": "tell me about the weather"}]


@given(
    st.lists(st.text("ab", max_size=4), max_size=6),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_pieces_joined_end_before_the_first_sequence(pieces: list[str], stop: list[str]) -> None:
    text = "".join(pieces)
    places = [place for sequence in stop if (place := text.find(sequence)) >= 0]
    watch = StopText(stop)
    given_out = "".join(map(watch.push, pieces))
    assert text[: min(places, default=None)].startswith(given_out)
    assert given_out + watch.finish() == text[: min(places, default=None)]
    assert watch.found == bool(places)


def test_an_answer_ends_before_a_sequence_and_frees_its_slot(golden: Path) -> None:
    model = KimiAudio(str(golden / "e2e" / "checkpoint"), device="cpu", dtype="float32")
    options = parse_parameters(text_temperature=1.0, seed=4, max_new_tokens=100)
    whole = model.complete(CHAT, options)
    sequence = whole.text[20:23]
    *pieces, cut = model.respond(CHAT, options, stop=["nowhere", sequence])
    assert isinstance(cut, Completion)
    assert cut.text == whole.text[: whole.text.find(sequence)]
    assert cut.text == "".join(piece.text for piece in pieces if isinstance(piece, TextDelta))
    assert cut.metrics["stop_reason"] == "stop"
    assert cut.metrics["decode_steps"] < whole.metrics["decode_steps"]
    again = model.complete(CHAT, options)
    assert again.text == whole.text
    assert model.scheduler.taken == 0
    with pytest.raises(RequestError, match=r"^stop: only for answers that are text"):
        spoken = parse_parameters(output_type="both")
        next(model.respond(CHAT, spoken, stop=[sequence]))
