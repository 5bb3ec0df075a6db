"""The room that requests share: slots, places of one cache, and spans of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimia_infer.engine.decode import Decoder
from kimia_infer.engine.generation import Generation
from kimia_infer.engine.room import Spans
from kimia_infer.layers.sampler import SeededRandomness
from kimia_infer.models.kimi_audio.language_model import LanguageModel
from tests.engine.helpers import sampling_of

CAPACITY = 100


def test_what_does_not_fit_is_refused(model: LanguageModel, control, prompts) -> None:
    prompt, sampling = prompts["text_only"], sampling_of({})

    def make(decoder: Decoder) -> Generation:
        return Generation(decoder, prompt, "text", 5, sampling, SeededRandomness(0))

    length = prompt.length + 5
    few_slots = Decoder(model, control, CAPACITY, slots=1)
    few_places = Decoder(model, control, CAPACITY, slots=3, places=2 * length - 1)
    for decoder in (few_slots, few_places):
        list(decoder.begin(make(decoder)))
        assert not decoder.room.fits(length)
        with pytest.raises(ValueError, match="no slot is free"):
            decoder.begin(make(decoder))
    assert few_places.room.fits(length - 1)


@pytest.mark.parametrize(("kv_cache", "size"), [("none", 4), ("fp8", 1)])
def test_requests_share_one_cache(kv_cache: str, size: int, model: LanguageModel, control) -> None:
    """Keys and values of 2 heads of 16 in the trunk's 5 layers and the MIMO branch's, if any."""
    for speaks, layers in ((True, model.config.total_layers), (False, 5)):
        decoder = Decoder(
            model, control, CAPACITY, kv_cache=kv_cache, slots=3, places=250, speaks=speaks
        )
        cache = decoder.attention.cache
        assert cache.keys.nbytes == cache.values.nbytes == layers * 2 * 16 * 251 * size


@given(
    st.integers(1, 60),
    st.lists(st.tuples(st.sampled_from(["take", "release", "resize"]), st.integers(1, 30))),
)
def test_spans(places: int, wanted: list[tuple[str, int]]) -> None:
    """No two overlap, none goes beyond the end, and one is found wherever there is room."""
    spans, taken = Spans(places), {}
    for action, length in wanted:
        if taken and action != "take":
            start = sorted(taken)[length % len(taken)]
            if action == "release":
                spans.release(start)
                del taken[start]
            else:
                following = min((s for s in taken if s > start), default=places)
                fits = start + length <= following
                assert spans.resize(start, length) == fits
                taken[start] = length if fits else taken[start]
                assert spans.length(start) == taken[start]
        free = [all(not s <= p < s + n for s, n in taken.items()) for p in range(places)]
        gaps = [p for p in range(places - length + 1) if all(free[p : p + length])]
        assert spans.find(length) == (gaps[0] if gaps else None)
        assert spans.free == sum(free)
        if gaps:
            taken[spans.take(length)] = length
        else:
            with pytest.raises(ValueError, match=f"no {length} free places"):
                spans.take(length)
