"""Texts to the sentences that are spoken one by one, also while they are still being written."""

from __future__ import annotations

import re
from collections.abc import Iterator

LONGEST_PIECE = 250
"""Characters that are spoken at a time: about 20 s in English and 60 s in Chinese, of the 120 s
that prompt and answer of the model may last."""

SENTENCES = re.compile(
    r"""[^\n]+?(?:[.?!…]+["'”’)]*(?=\s|$)|[。？！]+[”’」』）]*|(?=\n)|$)""",
)
TITLES = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|e\.g|i\.e)\.$")
"""Words whose full stop does not end a sentence."""

MARKS = re.compile(r"[,;:—](?=\s)|[，；：、]")
"""Where a sentence that is too long is cut, if there are any in its last two thirds."""


class SentenceStream:
    """The sentences of a text that grows, those of more than 250 characters in pieces.

    A line ends a sentence, too. What has no letter or digit is left out. The pieces are the same
    however the text was divided when it came.
    """

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> list[str]:
        """The pieces that are known to be complete with ``text``."""
        self._held = (self._held + text).lstrip()
        return list(self._complete(final=False))

    def finish(self) -> list[str]:
        """The rest, as there is no more text."""
        return list(self._complete(final=True))

    def _complete(self, final: bool) -> Iterator[str]:
        while self._held and (end := self._first_end(final)) is not None:
            piece, self._held = self._held[:end].strip(), self._held[end:].lstrip()
            if any(letter.isalnum() for letter in piece):
                yield piece

    def _first_end(self, final: bool) -> int | None:
        """Where the first piece ends, None if what follows may belong to it."""
        text = self._held[: LONGEST_PIECE + 2]  # an end after it makes no difference
        final = final and text == self._held
        # A sentence at the very end may go on: "3." may be the beginning of "3.5".
        ends = (match.end() for match in SENTENCES.finditer(text))
        whole = (e for e in ends if e < len(text) and not TITLES.search(text[:e]))
        end = next(whole, len(text) if final else None)
        if min(len(text), end or len(text)) <= LONGEST_PIECE:
            return end
        marks = [mark.end() for mark in MARKS.finditer(text[:LONGEST_PIECE])]
        place = marks[-1] if marks and marks[-1] > LONGEST_PIECE // 3 else 0
        return place or text.rfind(" ", 1, LONGEST_PIECE) + 1 or LONGEST_PIECE


def split_text(text: str) -> list[str]:
    """The pieces of a whole text, as :class:`SentenceStream` makes them."""
    stream = SentenceStream()
    return [*stream.push(text), *stream.finish()]
