"""The core of the small world, in 84 words: numbers to twelve, colors, objects, places and names.

Sentences combine a few templates with open slots; questions have one right answer each. A text
belongs to one split, chosen by its checksum, so that training and held-out texts are disjoint.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

from scripts.miniature.world.splits import SPLITS, Dialogue, Turn, split_of, split_of_dialogue

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve",
)  # fmt: skip
COLORS = ("red", "blue", "green", "yellow", "black", "white", "brown")
OBJECTS = ("cup", "book", "lamp", "key", "ball", "hat", "box", "chair")
PLACES = ("kitchen", "garden", "office", "market", "station", "school")
NAMES = ("tom", "anna", "peter", "mary")
COLOR_OF = {
    "sky": "blue",
    "grass": "green",
    "snow": "white",
    "sun": "yellow",
    "night": "black",
    "fire": "red",
}

SLOTS = {
    "number": NUMBERS[1:],
    "digit": NUMBERS[:10],
    "color": COLORS,
    "object": OBJECTS,
    "place": PLACES,
    "name": NAMES,
    "carry": ("bring", "take"),
    "switch": ("on", "off"),
    "move": ("open", "close"),
    "lid": ("box", "book"),
}
"""Words for the slots of templates."""

SENTENCES = (
    "{carry} the {color} {object} to the {place}",
    "please {carry} the {object} to the {place}",
    "put the {color} {object} in the {place}",
    "{name} has a {color} {object}",
    "{name} is in the {place}",
    "the {color} {object} is in the {place}",
    "turn {switch} the lamp in the {place}",
    "please {move} the {color} {lid}",
    "call {name} at {number}",
    "the number is {digit} {digit} {digit}",
    "a {color} {object} and a {color} {object}",
)
"""Templates of sentences to transcribe, repeat and read aloud: four to seven words."""

SUMS = ("what is {}", "how much is {}", "tell me {}", "{}")
NEIGHBORS = ("what comes {}", "which number comes {}", "tell me what comes {}")
COLOR_QUESTIONS = ("what color is the {}", "which color is the {}", "tell me the color of the {}")
COUNTS = ("count {}", "please count {}")
MY_COLOR = ("what color is my {}", "which color is my {}", "tell me the color of my {}")
WHERE = ("where is {}", "tell me where {} is")

LONGEST_COUNT = 4

KINDS = {"transcription": 0.3, "question": 0.27, "dialogue": 0.2, "repeat": 0.13, "read": 0.1}
"""Shares of the kinds of conversations."""

POOLED = False
"""Whether what is repeated and read is from a pool of sentences, each of which is spoken once."""


def sentence(chance: random.Random, split: str) -> str:
    """A random sentence of ``split``; templates are equally likely."""
    while True:
        text = fill(chance.choice(SENTENCES), lambda slot: chance.choice(SLOTS[slot]))
        if split_of(text) == split:
            return text


def fill(template: str, choose: Callable[[str], str]) -> str:
    """The sentence of a template; ``choose`` gives the word for a slot's name."""
    words = template.split()
    return " ".join(choose(w.strip("{}")) if w.startswith("{") else w for w in words)


@cache
def questions(split: str) -> dict[str, tuple[Turn, ...]]:
    """All questions of ``split`` by their kind, each with its answer."""
    kinds = {
        "sum": _sums,
        "neighbor": _neighbors,
        "count": _counts,
        "color": _colors,
    }
    return {
        kind: tuple(turn for turn in ask() if split_of(turn.user) == split)
        for kind, ask in kinds.items()
    }


def _sums() -> Iterator[Turn]:
    for form, (a, b) in product(SUMS, product(range(len(NUMBERS)), repeat=2)):
        if a + b < len(NUMBERS) and a and b:
            yield Turn(form.format(f"{NUMBERS[a]} plus {NUMBERS[b]}"), NUMBERS[a + b])
        if a >= b > 0:
            yield Turn(form.format(f"{NUMBERS[a]} minus {NUMBERS[b]}"), NUMBERS[a - b])


def _neighbors() -> Iterator[Turn]:
    for form, n in product(NEIGHBORS, range(len(NUMBERS))):
        if n + 1 < len(NUMBERS):
            yield Turn(form.format(f"after {NUMBERS[n]}"), NUMBERS[n + 1])
        if n > 0:
            yield Turn(form.format(f"before {NUMBERS[n]}"), NUMBERS[n - 1])


def _counts() -> Iterator[Turn]:
    for form, first in product(COUNTS, range(len(NUMBERS))):
        for last in range(first + 1, min(first + LONGEST_COUNT, len(NUMBERS))):
            counted = " ".join(NUMBERS[first : last + 1])
            yield Turn(form.format(f"from {NUMBERS[first]} to {NUMBERS[last]}"), counted)
            if first == 1:
                yield Turn(form.format(f"to {NUMBERS[last]}"), counted)


def _colors() -> Iterator[Turn]:
    for form, (thing, color) in product(COLOR_QUESTIONS, COLOR_OF.items()):
        yield Turn(form.format(thing), color)


QUESTION_SHARES = {"sum": 0.5, "neighbor": 0.2, "count": 0.2, "color": 0.1}


def question(chance: random.Random, split: str) -> Turn:
    """A random question of ``split`` with its answer."""
    kind = chance.choices(list(QUESTION_SHARES), list(QUESTION_SHARES.values()))[0]
    return chance.choice(questions(split)[kind])


def dialogue(chance: random.Random, split: str) -> Dialogue:
    """A random dialogue of ``split`` whose last question needs the earlier turns."""
    makers = (_color_dialogue, _late_color, _place_dialogue, _sum_dialogue, _next_dialogue)
    while True:
        turns = chance.choices(makers, (3, 3, 2, 3, 1))[0](chance)
        if split_of_dialogue(turns) == split:
            return turns


def _color_fact(item: str, color: str) -> Turn:
    return Turn(f"my {item} is {color}", f"okay {color} {item}")


def _color_dialogue(chance: random.Random) -> Dialogue:
    item, color = chance.choice(OBJECTS), chance.choice(COLORS)
    return _color_fact(item, color), Turn(chance.choice(MY_COLOR).format(item), color)


def _late_color(chance: random.Random) -> Dialogue:
    """With another question between the fact and the question about it."""
    fact, asked = _color_dialogue(chance)
    return fact, chance.choice(questions("train")["sum"]), asked


def _place_dialogue(chance: random.Random) -> Dialogue:
    name, place = chance.choice(NAMES), chance.choice(PLACES)
    return (
        Turn(f"{name} is in the {place}", f"okay {place}"),
        Turn(chance.choice(WHERE).format(name), f"in the {place}"),
    )


def _sum_dialogue(chance: random.Random) -> Dialogue:
    a, b = chance.randint(1, 6), chance.randint(1, 5)
    more = a + b + 1 < len(NUMBERS) and chance.random() < 0.5
    step = chance.randint(1, min(3, len(NUMBERS) - 1 - a - b if more else a + b))
    result = a + b + step if more else a + b - step
    return (
        Turn(f"{NUMBERS[a]} plus {NUMBERS[b]}", NUMBERS[a + b]),
        Turn(f"and {NUMBERS[step]} {'more' if more else 'less'}", NUMBERS[result]),
    )


def _next_dialogue(chance: random.Random) -> Dialogue:
    n = chance.randrange(len(NUMBERS) - 2)
    first = chance.choice(NEIGHBORS).format(f"after {NUMBERS[n]}")
    return Turn(first, NUMBERS[n + 1]), Turn("and then", NUMBERS[n + 2])


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word of the world, in alphabetical order."""
    words: set[str] = {
        word for template in SENTENCES for word in template.split() if "{" not in word
    }
    words.update(*SLOTS.values(), ("okay", "my", "where", "and", "then", "more", "less"))
    for split in SPLITS:
        for turns in questions(split).values():
            words.update(w for turn in turns for w in f"{turn.user} {turn.answer}".split())
    return tuple(sorted(words))
