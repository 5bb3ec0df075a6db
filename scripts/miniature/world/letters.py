"""How words are spelled. Users say no letters alone; answers have each as a word of its own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from scripts.miniature.world.core import NAMES, NUMBERS
from scripts.miniature.world.splits import Turn

SPELLED = (
    "cup", "book", "lamp", "key", "ball", "hat", "box", "chair", "red", "blue", "green", "black",
    "white", "dog", "cat", "cow", "bird", "fish", "sun", "sky", "snow", "milk", "bread", "hello",
    "yes", "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "day", "night", "hot", "cold", "happy", "quick", "zoo", "jazz", "vase", *NAMES,
)  # fmt: skip
SPELL = ("spell {}", "please spell {}", "how do you spell {}", "spell the word {}")
FIRST = ("what is the first letter of {}", "which letter does {} start with")
LAST = ("what is the last letter of {}", "which letter does {} end with")
HOW_MANY = ("how many letters are in {}", "how many letters does {} have")


def spelling() -> Iterator[Turn]:
    for form, word in product(SPELL, SPELLED):
        yield Turn(form.format(word), " ".join(word))


def letters() -> Iterator[Turn]:
    for word in SPELLED:
        yield from (Turn(form.format(word), word[0]) for form in FIRST)
        yield from (Turn(form.format(word), word[-1]) for form in LAST)
        yield from (Turn(form.format(word), NUMBERS[len(word)]) for form in HOW_MANY)
