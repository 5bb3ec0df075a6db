"""The shipped miniature says and understands the right words."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from statistics import fmean

import pytest
import torch

from kimia_infer.api.events import AudioChunk, Completion, TextDelta
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import parse_parameters
from scripts.miniature.recognizer import Heard, SpeechRecognizer, recall
from scripts.miniature.scoring import (
    ASKED,
    MOST_STEPS,
    Answer,
    Case,
    answer,
    answer_all,
    hear_all,
    recognizable,
    right,
    spoken_right,
    word_errors,
)
from tests.paths import MINI

Cases = Callable[..., list[Case]]
Answered = Callable[..., list[Answer]]
Listen = Callable[[KimiAudio, list[Answer]], list[Answer]]

HEARD = 8
"""Without ``--long``: spoken answers that are recognized, which takes longer than to give them, and
conversations of a kind that are asked without something that they need."""


@pytest.fixture
def heard(recognizer: SpeechRecognizer, long: bool) -> Listen:
    """Answers with what is recognized in them; without ``--long``, the first ones."""

    def hear(model: KimiAudio, given: list[Answer]) -> list[Answer]:
        return hear_all(model, recognizer, given if long else given[:HEARD])

    return hear


@pytest.mark.parametrize(("voices", "most"), [("held_out", 0.05), ("held_out_voices", 0.10)])
def test_transcription(answered: Answered, voices: str, most: float):
    given = answered("transcription", voices)
    assert len(given) >= 30
    assert word_errors(given) <= most


def test_spoken_questions_are_answered_in_both_tracks(
    trained: KimiAudio, answered: Answered, heard: Listen
):
    given = answered("question")
    assert right(given) >= 0.9
    assert spoken_right(heard(trained, given)) >= 0.85


def test_dialogues_use_their_history(
    trained: KimiAudio, cases: Cases, answered: Answered, heard: Listen, long: bool
):
    given = answered("dialogue")
    assert right(given) >= 0.85
    assert spoken_right(heard(trained, given)) >= 0.7
    forgetful = [Case(c.kind, c.chats[-1:], c.text, c.spoken) for c in cases("dialogue")]
    forgetful = forgetful if long else forgetful[:HEARD]
    assert right(answer_all(trained, forgetful)) <= 0.5


def test_read_aloud_is_understood(
    trained: KimiAudio, cases: Cases, recognizer: SpeechRecognizer, long: bool
):
    found = []
    for case in cases("read")[: None if long else HEARD]:
        wave, _ = trained.generate(case.chats, output_type="both", seed=0)
        found.append(Heard(case.text, recognizer.hear(recognizable(wave))))
    assert recall(found) >= 0.9


def test_what_is_heard_is_repeated(trained: KimiAudio, answered: Answered, heard: Listen):
    given = answered("repeat")
    assert right(given) >= 0.85
    assert spoken_right(heard(trained, given)) >= 0.75


def test_streamed_speech_says_the_same(
    trained: KimiAudio, cases: Cases, recognizer: SpeechRecognizer
):
    case = cases("question")[0]
    events = list(trained.stream(case.chats, output_type="both", preset="low_latency", seed=0))
    pieces = [event.wav for event in events if isinstance(event, AudioChunk)]
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert isinstance(events[-1], Completion)
    assert text == events[-1].text == case.text
    assert recognizer.hear(recognizable(torch.cat(pieces)), "answer") == case.text


@pytest.mark.parametrize("ablation", ["features", "delay"])
def test_what_the_pipeline_needs(
    trained: KimiAudio,
    changed: Callable[..., KimiAudio],
    answered: Answered,
    heard: Listen,
    long: bool,
    ablation: str,
):
    """Without it, answers are lost: Whisper's features when voices that it does not know are heard,
    the delay of the audio track when it speaks. Next to these features, codes add little."""
    most = None if long else HEARD
    if ablation == "delay":
        early = changed(audio_delay=0)
        given = answer_all(early, [whole.case for whole in answered("question")[:most]])
        assert spoken_right(heard(early, given)) <= 0.3
    else:
        whole = [a for kind in ASKED for a in answered(kind, "held_out_voices")[:most]]
        without = answer_all(trained, [a.case for a in whole], ablation)
        assert right(without) <= right(whole) - 0.05


def test_full_heads_give_the_same_tokens(changed: Callable[..., KimiAudio], answered: Answered):
    full = changed(head_rows="full")
    for given in (a for kind in ("transcription", "question", "read") for a in answered(kind)[:2]):
        assert answer(full, given.case) == given


def test_words_in_bfloat16_are_those_in_float32_with_others_beside_them(
    answered: Answered, long: bool
):
    """Products of several rows round differently, which changes next to no greedy token."""
    model = KimiAudio(str(MINI), device="cpu", dtype="bfloat16", head_rows="track")
    kinds = "transcription", "question", "dialogue", "repeat"
    given = [a for kind in kinds for a in answered(kind)[: None if long else 2]]

    def ask(exact: Answer) -> Completion:
        output = "both" if exact.case.spoken else "text"
        options = parse_parameters(output_type=output, max_new_tokens=MOST_STEPS)
        return model.complete(exact.case.chats, options)

    alone = [ask(exact) for exact in given]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, given))
    for answers in (alone, together):
        assert [a.text for a in answers] == [exact.text for exact in given]
    equal = fmean(
        id == other
        for a, b in zip(alone, together, strict=True)
        for track in ((a.text_ids, b.text_ids), (a.audio_ids, b.audio_ids))
        for id, other in zip_longest(*track)
    )
    assert equal >= 0.99
