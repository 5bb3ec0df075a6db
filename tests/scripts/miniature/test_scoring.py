"""Answers of a miniature, its ablations, and the figures that are made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.data.conversations import DataError
from scripts.miniature.scoring import (
    Answer,
    Case,
    agreement,
    answer,
    load_model,
    measure,
    read_cases,
    right,
    scores,
    spoken_right,
    understood,
    word_errors,
)
from scripts.miniature.world import unknown
from tests.paths import MINI


@pytest.fixture(scope="module")
def model() -> KimiAudio:
    return load_model(MINI)


def test_cases_are_what_the_service_answers(model: KimiAudio, world: Path, monkeypatch):
    cases = read_cases(world / "held_out.jsonl", ("question", "transcription"), 5)
    assert [(case.kind, case.text, case.spoken) for case in cases] == [
        ("question", "two", True), ("transcription", "one red cup", False),
    ]  # fmt: skip
    assert not read_cases(world / "held_out.jsonl", ("read",), 5)
    case = cases[1]
    _, text = model.generate(case.chats, output_type="text", max_new_tokens=400)
    assert answer(model, case).text == text
    encode = model.whisper_features.encode_all
    monkeypatch.setattr(
        model.whisper_features, "encode_all", lambda waves: [0 * found for found in encode(waves)]
    )
    _, text = model.generate(case.chats, output_type="text", max_new_tokens=400)
    monkeypatch.undo()
    assert answer(model, case, "features").text == text != answer(model, case).text


def test_shuffled_codes_are_the_same_codes(model: KimiAudio, world: Path, monkeypatch):
    (case,) = read_cases(world / "held_out.jsonl", ("transcription",), 1)
    embedded, embed = [], model.language_model.embed

    def watch(audio_ids, *rest):
        embedded.append(audio_ids[0].tolist())
        return embed(audio_ids, *rest)

    monkeypatch.setattr(model.language_model, "embed", watch)
    answer(model, case)
    answer(model, case, "codes")
    plain, shuffled = (ids for ids in embedded if len(ids) > 1)
    assert plain != shuffled
    assert sorted(plain) == sorted(shuffled)


def test_the_delay_can_be_taken_away(model: KimiAudio, world: Path):
    changed = load_model(MINI, audio_delay=0)
    assert changed.prompt_builder.audio_delay == 0
    (case,) = read_cases(world / "held_out.jsonl", ("question",), 1)
    assert answer(changed, case).codes != answer(model, case).codes


def given(kind: str, expected: str, text: str, heard: str) -> Answer:
    return Answer(Case(kind, [], expected, kind != "transcription"), text, heard=heard)


def test_the_figures():
    answers = [
        given("question", "one two", "one two", "one two"),
        given("question", "three", "four", "three"),
        given("question", "four five six", "four six", "four six"),
    ]
    assert word_errors(answers) == pytest.approx(2 / 6)
    assert right(answers) == pytest.approx(1 / 3)
    assert agreement(answers) == pytest.approx(2 / 3)
    assert spoken_right(answers) == pytest.approx(2 / 3)


def test_figures_of_a_set_and_of_an_ablation():
    answers = [
        given("transcription", "one two", "one two", ""),
        given("question", "three", "two", "three"),
        given("question", "four", "four", "four"),
        given("dialogue", "five", "five", "nine"),
        given("repeat", "six", "six", "six"),
        given("read", "seven", "seven", "seven"),
        given("unknown", unknown.ANSWER, unknown.ANSWER, ""),
        given("sound", "a clap", unknown.ANSWER, ""),
    ]
    found = scores(answers)
    assert found["transcription"] == {
        "count": 1, "word_errors": 0.0, "right": 1.0, "at_a_loss": 0.0
    }  # fmt: skip
    assert found["question"] == {
        "count": 2, "word_errors": 0.5, "right": 0.5, "at_a_loss": 0.0,
        "agreement": 0.5, "spoken_right": 1.0,
    }  # fmt: skip
    assert found["unknown"]["right"] == found["sound"]["at_a_loss"] == 1.0
    assert (found["dialogue"]["right"], found["dialogue"]["spoken_right"]) == (1.0, 0.0)
    assert found["agreement"] == pytest.approx(3 / 5)
    expected = {"all_right": 2 / 3, "word_errors": 0.0, "right": 0.5, "spoken_right": 1.0}
    assert understood(answers) == pytest.approx(expected)


def test_another_kind_of_answer_can_be_asked_for(model: KimiAudio, world: Path, monkeypatch):
    (case,) = read_cases(world / "held_out.jsonl", ("transcription",), 1)
    asked, prompt = [], model.encode_chat

    def watch(messages, options):
        asked.append(options.output_type)
        return prompt(messages, options)

    monkeypatch.setattr(model, "encode_chat", watch)
    answer(model, case)
    answer(model, case, "request")
    assert asked == ["text", "both"]


def test_a_world_without_a_kind_is_named(model: KimiAudio, world: Path):
    with pytest.raises(DataError, match=r"held_out.jsonl: no read, repeat, sound, unknown"):
        measure(lambda: model, world, limit=1)
