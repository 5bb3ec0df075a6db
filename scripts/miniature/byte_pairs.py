"""A small text tokenizer: byte pairs merged by their frequency, in tiktoken's file format."""

from __future__ import annotations

import base64
import re
from collections import Counter
from itertools import pairwise


def ranks_of(corpus: str, merges: int) -> str:
    """The lines of ``tiktoken.model``: all bytes, then what ``merges`` merges in a text make."""
    tokens = byte_order() + train_merges(corpus, merges)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    return "".join(lines)


def train_merges(text: str, count: int) -> list[bytes]:
    """The tokens that ``count`` merges of the most frequent neighbors in ``text`` make."""
    pieces = Counter(re.findall(r" ?[A-Za-z]+| ?[^\sA-Za-z]+", text))
    words = {tuple(bytes([b]) for b in piece.encode()): n for piece, n in pieces.items()}
    merged: list[bytes] = []
    while len(merged) < count:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        words = {_merge(word, best): times for word, times in words.items()}
        if best[0] + best[1] not in merged:
            merged.append(best[0] + best[1])
    return merged


def _merge(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    result: list[bytes] = []
    for token in word:
        if result and (result[-1], token) == pair:
            result[-1] += token
        else:
            result.append(token)
    return tuple(result)


def byte_order() -> list[bytes]:
    """The 256 bytes in the order of their published ranks: printable ones first, from "!"."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [bytes([byte]) for byte in printable + others]
