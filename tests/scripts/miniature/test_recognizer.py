"""The recognizer understands the original voice, and not what is something else."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kimia_infer.audio.files import SAMPLE_RATE
from scripts.miniature.espeak import Synthesizer
from scripts.miniature.recognizer import (
    OPEN_WORDS,
    Heard,
    SpeechRecognizer,
    chance_recall,
    content_words,
    recall,
    template_of,
    understands,
)
from scripts.miniature.spoken_world import resampled
from scripts.miniature.voices import Utterance, Voice
from scripts.miniature.world.core import dialogue, questions, sentence

VOICE = Voice("en-us+f3", 140, 50)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    chance = random.Random(1)
    answers = [dialogue(chance, "held_out")[-1].answer for _ in range(6)]
    answers += [turn.answer for turn in questions("held_out")["count"]]
    return [sentence(chance, "held_out") for _ in range(12)] + answers


@pytest.fixture(scope="module")
def waves(texts: list[str]) -> list[np.ndarray]:
    synthesizer = Synthesizer()
    speeches = [synthesizer.speak(Utterance(text, VOICE)) for text in texts]
    return [resampled(speech.wave, SAMPLE_RATE) for speech in speeches]


@pytest.fixture(scope="module")
def recognizer() -> SpeechRecognizer:
    return SpeechRecognizer()


@pytest.fixture(scope="module")
def understood(recognizer: SpeechRecognizer, waves: list[np.ndarray]) -> list[str]:
    return [recognizer.hear(wave) for wave in waves]


def test_the_original_voice_is_understood(texts: list[str], understood: list[str]):
    assert recall(map(Heard, texts, understood)) > 0.9


def test_answers_are_heard_among_answers(
    recognizer: SpeechRecognizer, texts: list[str], waves: list[np.ndarray], understood: list[str]
):
    assert understood[1] == texts[1] != recognizer.hear(waves[1], "answer")
    assert recognizer.hear(waves[-1], "answer") == understood[-1] == texts[-1]


def test_other_words_are_not_understood(
    recognizer: SpeechRecognizer, texts: list[str], understood: list[str]
):
    """Sounds of other texts score near chance, noise gives next to nothing."""
    assert recall(map(Heard, texts, understood[1:] + understood[:1])) < 0.35
    noise = np.random.default_rng(1).normal(0, 0.05, 2 * SAMPLE_RATE)
    heard = recognizer.hear(noise)
    assert recall(Heard(text, heard) for text in texts) < 0.3
    assert recognizer.hear(np.zeros(0)) == ""


def test_hearing_depends_on_the_sound_alone(
    recognizer: SpeechRecognizer, waves: list[np.ndarray], understood: list[str]
):
    """In another order, the same is heard."""
    assert [recognizer.hear(wave) for wave in waves[::-2]] == understood[::-2]


def test_content_words_are_those_of_open_slots():
    text = "a red cup and a red hat"
    assert template_of(text) == "a {color} {object} and a {color} {object}"
    assert content_words(text) == {"red": 2, "cup": 1, "hat": 1}
    assert content_words("turn on the lamp in the garden") == {"on": 1, "garden": 1}
    assert content_words("okay blue key") == {"blue": 1, "key": 1}
    heard = Heard(text, "a red book and a blue hat")
    assert recall([heard]) == 2 / 4
    assert recall([heard, Heard("red", "red")]) == 3 / 5
    with pytest.raises(ValueError, match="not a sentence"):
        content_words("the sky is blue")
    assert understands(text) and not understands("the sky is blue")


def test_chance_is_that_of_a_random_slot():
    """Of one slot, one in as many as it has words; templates are understood by themselves."""
    colors = ["red", "blue", "green"] * 400
    assert abs(chance_recall(colors) - 1 / len(OPEN_WORDS["color"])) < 0.03
