"""Text to token ids and back: byte pair encoding with the published special tokens.

The text of ids that arrive one by one grows with them, and may end where a sequence begins.
"""

from __future__ import annotations

import base64
import codecs
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from kimia_infer.utils.errors import CheckpointError
from kimia_infer.weights.component import read_json

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where a text is split before merging (published tokenizer: Qwen's, single digits)."""

WINDOW_CHARS = 400_000
"""Characters encoded at a time (published tokenizer)."""

RUN_CHARS = 25_000
"""Longest run of characters without, or of nothing but, whitespace (published tokenizer)."""

_RUN = re.compile(r"\s+|\S+")

NAMED_SPECIALS = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_msg_end|>",
    3: "<|im_user_msg_start|>",
    4: "<|im_assistant_msg_start|>",
    9: "[EOT]",
    18: "<|im_media_begin|>",
    20: "<|im_media_end|>",
    23: "<|im_kimia_text_blank|>",
    24: "<|im_kimia_text_eos|>",
    27: "<|im_kimia_user_msg_start|>",
    28: "<|im_kimia_assistant_msg_start|>",
    32: "<|im_kimia_speech_ct_id|>",
    33: "<|im_kimia_speech_ctd_id|>",
}
"""Special tokens with a meaning, by position; all others are reserved and numbered."""

SPECIAL_COUNT = 421
"""Number of special tokens (published tokenizer configuration)."""


def special_names() -> list[str]:
    """The published special tokens in order; their ids follow the base vocabulary."""
    reserved = (f"<|reserved_token_{number}|>" for number in itertools.count())
    return [NAMED_SPECIALS.get(position) or next(reserved) for position in range(SPECIAL_COUNT)]


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens that prompts and the token loop use.

    The defaults are their positions among the special tokens, see ``NAMED_SPECIALS``.
    """

    msg_end: int = 2
    user_msg_start: int = 27
    assistant_msg_start: int = 28
    media_begin: int = 18
    media_end: int = 20
    text_blank: int = 23
    text_eos: int = 24
    speech_ct: int = 32
    speech_ctd: int = 33
    pad: int = SPECIAL_COUNT - 1

    @classmethod
    def after(cls, base_tokens: int) -> SpecialTokens:
        """The ids that follow a base vocabulary of ``base_tokens`` ids."""
        return cls(*(base_tokens + position for position in astuple(cls())))


class TextTokenizer:
    """The published byte pair encoding of a checkpoint directory.

    Reads ``tiktoken.model`` and checks the special tokens of ``tokenizer_config.json``
    against the published list; without that file, or without its ``added_tokens_decoder``,
    the published list is used.

    Attributes:
        special: ids of the special tokens that the model uses.
        base_tokens: number of ordinary tokens; special ids follow.
        vocab_size: ordinary and special tokens together. Audio tokens come after them.

    Raises:
        CheckpointError: a file is missing or damaged, or the special tokens differ.
    """

    def __init__(self, directory: Path):
        import tiktoken

        ranks = _read_ranks(directory / "tiktoken.model")
        names = special_names()
        _check_special_names(directory / "tokenizer_config.json", names, len(ranks))
        self.base_tokens = len(ranks)
        self.vocab_size = len(ranks) + len(names)
        self.special = SpecialTokens.after(self.base_tokens)
        self._encoding = tiktoken.Encoding(
            name=str(directory),
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={name: len(ranks) + i for i, name in enumerate(names)},
        )

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``. Names of special tokens in it are ordinary characters.

        Lone surrogates, which no UTF-8 text contains, become U+FFFD.
        """
        return [i for piece in pieces(text) for i in self._encoding.encode_ordinary(piece)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``: special ids give their names, invalid UTF-8 gives U+FFFD.

        Raises:
            ValueError: an id that is neither an ordinary nor a special token.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """UTF-8 of ``ids``, which may begin or end within a character; else like ``decode``."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token id {token} is not a text token; they are 0 to {self.vocab_size - 1}"
                )
        return self._encoding.decode_bytes(list(ids))


class TextStream:
    """Text of ids that arrive one by one; the parts joined are ``decode`` of all of them.

    A character whose bytes are incomplete is held back.
    """

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """Text that the next ids add; ValueError for an id that is not a text token."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """The incomplete character at the end, as U+FFFD; else nothing."""
        return self._decoder.decode(b"", final=True)


class StopText:
    """Gives out a text as it grows, up to the first of ``sequences`` in it.

    ``found`` says that there was one; nothing is given out afterwards. Text that may be the
    beginning of a sequence is held back until that is known.
    """

    def __init__(self, sequences: Sequence[str]):
        self.found = False
        self._sequences = sequences
        self._held = ""

    def push(self, text: str) -> str:
        """Take the next piece of the text; return what certainly precedes a sequence."""
        if self.found:
            return ""
        self._held += text
        places = [self._held.find(sequence) for sequence in self._sequences]
        if hits := [place for place in places if place >= 0]:
            self.found = True
            return self._release(min(hits))
        return self._release(len(self._held) - max(map(self._begun, self._sequences), default=0))

    def finish(self) -> str:
        """The text is complete: the rest of it."""
        return "" if self.found else self._release(len(self._held))

    def _begun(self, sequence: str) -> int:
        """How many of the last characters are the first ones of ``sequence``."""
        longest = min(len(sequence) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(sequence[:n])), 0)

    def _release(self, end: int) -> str:
        released, self._held = self._held[:end], self._held[end:]
        return released


def pieces(text: str) -> Iterator[str]:
    """Cut a text in windows, and those so that no run exceeds the permitted length."""
    for start in range(0, len(text), WINDOW_CHARS):
        window = text[start : start + WINDOW_CHARS]
        cuts = [
            cut
            for run in _RUN.finditer(window)
            for cut in range(run.start() + RUN_CHARS, run.end(), RUN_CHARS)
        ]
        for begin, end in itertools.pairwise([0, *cuts, len(window)]):
            yield window[begin:end]


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes to rank, from lines of ``base64 rank``."""
    try:
        fields = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in fields}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: file missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a tiktoken rank file ({error})") from error
    if sorted(ranks.values()) != list(range(len(fields))):
        raise CheckpointError(
            f"{path}: damaged, its ranks are not 0 to {len(fields) - 1} once each; "
            "download it again"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(f"{path}: damaged, no token for byte {missing[0]}; download it again")
    return ranks


def _check_special_names(path: Path, names: list[str], first_id: int) -> None:
    if not path.is_file():
        return
    added = read_json(path).get("added_tokens_decoder")
    if added is None:
        return
    try:
        found = {int(token): entry["content"] for token, entry in added.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: added_tokens_decoder is not a map of ids to tokens; download it again"
        ) from error
    expected = dict(enumerate(names, start=first_id))
    if found == expected:
        return
    token = min(t for t in found.keys() | expected.keys() if found.get(t) != expected.get(t))
    raise CheckpointError(
        f"{path}: special token {token} is {found.get(token)!r}, expected "
        f"{expected.get(token)!r} (the {len(names)} published special tokens follow the "
        f"{first_id} tokens of tiktoken.model); use the file of the same checkpoint"
    )
