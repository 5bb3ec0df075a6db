"""The whole small world: its core and all further subjects."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

from scripts.miniature import sounds
from scripts.miniature.world import (
    calendar,
    choices,
    core,
    dialogues,
    letters,
    numbers,
    talk,
    things,
    unknown,
)
from scripts.miniature.world.splits import SPLITS, Dialogue, Turn, split_of, split_of_dialogue

SLOTS = core.SLOTS | {
    "number": tuple(numbers.number(n) for n in range(1, 100)),
    "color": (*core.COLORS, "orange", "pink", "gray"),
    "object": (*core.OBJECTS, "pen", "knife", "spoon", "clock", "phone", "bag"),
    "place": (*core.PLACES, "bedroom", "library", "hospital", "cinema", "city", "river"),
    "name": dialogues.MORE_NAMES,
    "animal": (*things.ANIMALS, "horse", "bird", "rabbit"),
    "food": (*things.FRUIT, "bread", "cheese", "rice", "soup", "cake"),
    "drink": things.DRINKS,
    "day": calendar.DAYS,
    "month": calendar.MONTHS,
    "part": ("morning", "afternoon", "evening"),
    "size": ("big", "small", "old", "new", "long", "short"),
    "mood": ("happy", "sad", "early", "late", "quiet", "loud"),
}

SENTENCES = (
    "the {animal} sleeps under the {object}",
    "{name} buys {food} and {drink} at the market",
    "we meet on {day} in the {place}",
    "the train comes at {number} in the {part}",
    "my {animal} likes {food}",
    "{name} and {name} go to the {place}",
    "the {size} {animal} runs to the {river}",
    "it is cold in {month}",
    "the {size} {object} is on the {color} chair",
    "{name} is {mood} on {day}",
    "i have {number} {animal} pictures",
    "please bring me the {drink} and the {food}",
    "the door of the {place} is open",
    "there are {number} people in the {place}",
    "she reads the {size} book in the {part}",
    "he plays with the {color} ball",
    "do not close the window",
    "the sun shines in the {part}",
)
SLOTS |= {"river": ("river", "garden", "house", "water")}

KINDS = {
    "transcription": 0.24,
    "question": 0.34,
    "dialogue": 0.14,
    "repeat": 0.08,
    "read": 0.04,
    "unknown": 0.1,
    "sound": 0.06,
}
"""Shares of the kinds of conversations."""

POOLED = True  # as in core

QUESTIONS = {
    "sum": 0.14,
    "neighbor": 0.06,
    "count": 0.05,
    "color": 0.03,
    "large_sum": 0.10,
    "difference": 0.08,
    "product": 0.05,
    "large_neighbor": 0.05,
    "long_count": 0.03,
    "comparison": 0.06,
    "date": 0.06,
    "length": 0.02,
    "season": 0.02,
    "clock": 0.02,
    "thing_color": 0.02,
    "animal": 0.03,
    "kind": 0.04,
    "place": 0.02,
    "opposite": 0.04,
    "spelling": 0.04,
    "letter": 0.04,
    "yes_no": 0.08,
    "phrase": 0.06,
    "say": 0.04,
}
"""How often a question is of each kind, relative to the others."""

FIXED = ("phrase",)
"""Kinds whose texts are in every split: they are learned as they are."""

CORE_SENTENCES, CORE_DIALOGUES = 0.5, 0.5
"""Shares that are from the core."""


def _further() -> Iterator[tuple[str, Iterator[Turn]]]:
    yield "large_sum", numbers.sums()
    yield "difference", numbers.differences()
    yield "product", numbers.products()
    yield "large_neighbor", numbers.neighbors()
    yield "long_count", numbers.counts()
    yield "comparison", numbers.comparisons()
    yield "date", calendar.neighbors()
    yield "length", calendar.lengths()
    yield "season", calendar.parts()
    yield "clock", calendar.clock()
    yield "thing_color", things.colors()
    yield "animal", things.animals()
    yield "kind", things.what_they_are()
    yield "place", things.places()
    yield "opposite", things.opposites()
    yield "spelling", letters.spelling()
    yield "letter", letters.letters()
    for asked in (choices.kinds, choices.colors, choices.numbers, choices.abilities):
        yield "yes_no", asked()
    yield "phrase", talk.phrases()
    yield "say", talk.say()


@cache
def questions(split: str) -> dict[str, tuple[Turn, ...]]:
    """All questions of ``split`` by their kind, each with its answer."""
    found = {kind: list(turns) for kind, turns in core.questions(split).items()}
    for kind, turns in _further():
        some = [t for t in turns if kind in FIXED or split_of(t.user) == split]
        found.setdefault(kind, []).extend(some)
    return {kind: tuple(turns) for kind, turns in found.items()}


def question(chance: random.Random, split: str) -> Turn:
    """A random question of ``split`` with its answer."""
    kind = chance.choices(list(QUESTIONS), list(QUESTIONS.values()))[0]
    return chance.choice(questions(split)[kind])


def dialogue(chance: random.Random, split: str) -> Dialogue:
    """A random dialogue of ``split`` whose last question needs the earlier turns."""
    if chance.random() < CORE_DIALOGUES:
        return core.dialogue(chance, split)
    while True:
        turns = chance.choices(list(dialogues.MAKERS), list(dialogues.MAKERS.values()))[0](chance)
        if split_of_dialogue(turns) == split:
            return turns


def sentence(chance: random.Random, split: str) -> str:
    """A random sentence of ``split``; templates are equally likely."""
    if chance.random() < CORE_SENTENCES:
        return core.sentence(chance, split)
    while True:
        text = core.fill(chance.choice(SENTENCES), lambda slot: chance.choice(SLOTS[slot]))
        if split_of(text) == split:
            return text


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word of the world, in alphabetical order."""
    words = {*core.vocabulary(), *unknown.ANSWER.split()}
    words.update(word for text in (*sounds.CLASSES, *sounds.ASKED) for word in text.split())
    words.update(w for template in SENTENCES for w in template.split() if "{" not in w)
    words.update(w for values in SLOTS.values() for value in values for w in value.split())
    for split in SPLITS:
        for turns in questions(split).values():
            words.update(w for turn in turns for w in f"{turn.user} {turn.answer}".split())
    chance = random.Random(0)
    for _ in range(3000):
        turns = chance.choice(list(dialogues.MAKERS))(chance)
        words.update(w for turn in turns for w in f"{turn.user} {turn.answer}".split())
    return tuple(sorted(words))
