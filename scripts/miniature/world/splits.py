"""Which texts are for training and which are held out."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

MINE = ("my ", "i ", "today is ")
"""Beginnings of facts that only dialogues contain."""

SPLITS = ("train", "validation", "held_out")


@dataclass(frozen=True)
class Turn:
    """A user's message and its answer."""

    user: str
    answer: str


Dialogue = tuple[Turn, ...]


def split_of(text: str) -> str:
    """The split a text belongs to: 8 % validation, 12 % held out, the rest for training."""
    place = zlib.crc32(text.encode()) % 100
    return SPLITS[0 if place < 80 else 1 if place < 88 else 2]


def split_of_dialogue(turns: Dialogue) -> str:
    """The split of a dialogue; of its first message if that also occurs alone."""
    opening = turns[0].user
    alone = not opening.startswith(MINE)
    return split_of(opening if alone else " | ".join(turn.user for turn in turns))
