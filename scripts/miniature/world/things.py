"""Things, animals, food and places: what they are, look like, are for, and their opposites."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from scripts.miniature.world.core import COLOR_QUESTIONS
from scripts.miniature.world.splits import Turn

ANIMALS = {
    "dog": "woof", "cat": "meow", "cow": "moo", "sheep": "baa", "duck": "quack", "pig": "oink",
    "lion": "roar", "mouse": "squeak", "bee": "buzz", "snake": "hiss",
}  # fmt: skip
"""What they say."""

QUIET_ANIMALS = ("horse", "bird", "fish", "spider", "elephant", "rabbit")
FRUIT = ("apple", "banana", "cherry", "lemon", "orange", "pear")
FOOD = ("bread", "cheese", "rice", "soup", "cake", "egg")
DRINKS = ("milk", "water", "tea", "coffee", "juice")
COLOR_OF = {
    "banana": "yellow", "cherry": "red", "lemon": "yellow", "tomato": "red", "milk": "white",
    "coffee": "black", "chocolate": "brown", "leaf": "green", "sea": "blue", "coal": "black",
    "elephant": "gray", "pig": "pink", "frog": "green", "carrot": "orange", "cloud": "white",
}  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("good", "bad"), ("fast", "slow"),
    ("happy", "sad"), ("old", "new"), ("long", "short"), ("high", "low"), ("full", "empty"),
    ("left", "right"), ("wet", "dry"), ("dark", "light"), ("loud", "quiet"), ("early", "late"),
    ("hard", "soft"), ("day", "night"), ("yes", "no"), ("open", "closed"), ("in", "out"),
)  # fmt: skip
USES = {
    "cup": "for drinking", "knife": "for cutting", "pen": "for writing", "bed": "for sleeping",
    "book": "for reading", "chair": "for sitting", "oven": "for cooking", "broom": "for cleaning",
    "phone": "for calling", "spoon": "for eating", "clock": "for telling the time",
    "lamp": "for light", "car": "for driving", "ball": "for playing",
}  # fmt: skip
WHERE = {
    "where do you cook": "in the kitchen",
    "where do you sleep": "in the bedroom",
    "where do you buy food": "at the market",
    "where do children learn": "at school",
    "where do you take the train": "at the station",
    "where do flowers grow": "in the garden",
    "where do people work": "in the office",
    "where do fish live": "in the water",
    "where do you read books": "in the library",
    "where do you see a doctor": "in the hospital",
    "where do you see a film": "in the cinema",
    "where do birds fly": "in the sky",
}
LEGS = {
    "dog": "four", "cat": "four", "horse": "four", "cow": "four", "bird": "two", "duck": "two",
    "spider": "eight", "bee": "six", "fish": "zero", "snake": "zero", "chair": "four",
    "elephant": "four",
}  # fmt: skip
SAYS = ("what does a {} say", "which sound does a {} make", "what sound does a {} make")
LEG_QUESTIONS = ("how many legs does a {} have", "tell me how many legs a {} has")
FOR = ("what is a {} for", "what do you use a {} for", "tell me what a {} is for")
OPPOSITE = ("what is the opposite of {}", "tell me the opposite of {}", "the opposite of {}")


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def kinds() -> dict[str, str]:
    """What things are, with the article of both."""
    members = {"animal": (*ANIMALS, *QUIET_ANIMALS), "fruit": FRUIT}
    found = {article(one): article(kind) for kind, ones in members.items() for one in ones}
    food = {article(one) if one in ("cake", "egg") else one: "food" for one in FOOD}
    return found | food | dict.fromkeys(DRINKS, "a drink")


def colors() -> Iterator[Turn]:
    for form, (thing, color) in product(COLOR_QUESTIONS, COLOR_OF.items()):
        yield Turn(form.format(thing), color)


def animals() -> Iterator[Turn]:
    for form, (animal, sound) in product(SAYS, ANIMALS.items()):
        yield Turn(form.format(animal), sound)
    for form, (animal, legs) in product(LEG_QUESTIONS, LEGS.items()):
        yield Turn(form.format(animal), legs)


def what_they_are() -> Iterator[Turn]:
    for form, (thing, kind) in product(("what is {}", "tell me what {} is"), kinds().items()):
        yield Turn(form.format(thing), kind)
    for form, (thing, use) in product(FOR, USES.items()):
        yield Turn(form.format(thing), use)


def places() -> Iterator[Turn]:
    for question, place in WHERE.items():
        yield Turn(question, place)
        yield Turn(f"tell me {question}", place)
        yield Turn(f"please tell me {question}", place)


def opposites() -> Iterator[Turn]:
    for form, pair in product(OPPOSITE, OPPOSITES):
        yield Turn(form.format(pair[0]), pair[1])
        yield Turn(form.format(pair[1]), pair[0])
