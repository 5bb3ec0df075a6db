"""Dialogues of two and three turns, whose last question needs what was said before."""

from __future__ import annotations

import random

from scripts.miniature.world.calendar import DAYS
from scripts.miniature.world.core import NAMES
from scripts.miniature.world.numbers import number
from scripts.miniature.world.splits import Dialogue, Turn
from scripts.miniature.world.things import ANIMALS, DRINKS, FRUIT

MORE_NAMES = (*NAMES, "lucy", "jack", "emma", "paul")
OWNED = ("dog", "cat", "horse", "bird", "book", "cup", "key", "hat")
MY_NAME = ("what is my name", "who am i", "do you know my name", "tell me my name")


def name_dialogue(chance: random.Random) -> Dialogue:
    name = chance.choice(MORE_NAMES)
    fact = Turn(f"my name is {name}", f"hello {name}")
    return fact, Turn(chance.choice(MY_NAME), f"your name is {name}")


def count_dialogue(chance: random.Random) -> Dialogue:
    count, thing = chance.randint(2, 10), chance.choice([t for t in OWNED if t != "box"])
    fact = Turn(f"i have {number(count)} {thing}s", f"okay {number(count)} {thing}s")
    asked = chance.choice(("how many {}s do i have", "tell me how many {}s i have"))
    return fact, Turn(asked.format(thing), number(count))


def taste_dialogue(chance: random.Random) -> Dialogue:
    liked = chance.choice([*DRINKS, *(f"{fruit}s" for fruit in FRUIT if fruit != "cherry")])
    fact = Turn(f"i like {liked}", f"okay you like {liked}")
    return fact, Turn(chance.choice(("what do i like", "tell me what i like")), liked)


def day_dialogue(chance: random.Random) -> Dialogue:
    place = chance.randrange(len(DAYS))
    step, asked = chance.choice(((1, "what day is tomorrow"), (-1, "what day was yesterday")))
    fact = Turn(f"today is {DAYS[place]}", f"okay {DAYS[place]}")
    return fact, Turn(asked, DAYS[(place + step) % len(DAYS)])


def sound_dialogue(chance: random.Random) -> Dialogue:
    first, second = chance.sample(list(ANIMALS), 2)
    return (
        Turn(f"what does a {first} say", ANIMALS[first]),
        Turn(f"and a {second}", ANIMALS[second]),
    )


def sum_dialogue(chance: random.Random) -> Dialogue:
    tens, unit, step = 10 * chance.randint(2, 9), chance.randint(1, 5), chance.randint(1, 4)
    more = chance.random() < 0.5 or step > unit
    total = tens + unit + (step if more else -step)
    return (
        Turn(f"{number(tens)} plus {number(unit)}", number(tens + unit)),
        Turn(f"and {number(step)} {'more' if more else 'less'}", number(total)),
    )


MAKERS = {
    name_dialogue: 3,
    count_dialogue: 3,
    taste_dialogue: 2,
    day_dialogue: 2,
    sound_dialogue: 1,
    sum_dialogue: 2,
}
"""How often each is drawn."""
