"""What is asked of the model, and what its answer is compared with."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

WER, CER, ACCURACY, MATCH, NONE = "wer", "cer", "accuracy", "match", "none"

METRICS = {
    WER: "word error rate",
    CER: "character error rate",
    ACCURACY: "one of several choices, right or wrong",
    MATCH: "whether the reference is found in the answer",
    NONE: "no score; answers are written down for a judge",
}
"""How an answer can be scored; manifests use these names."""

Key = tuple[str, str, str]


class EvaluationError(ValueError):
    """An evaluation cannot be run; the message names file or setting and the fix."""


@dataclass(frozen=True)
class Item:
    """One question of a data set.

    ``messages`` is the chat as ``KimiAudio.generate`` takes it. ``choices`` are the possible
    answers of an item scored by accuracy, and ``reference`` is one of them. ``span`` cuts the
    sound of the chat, from and to which second; None takes it whole.
    """

    dataset: str
    subset: str
    id: str
    metric: str
    messages: list[dict[str, Any]]
    reference: str
    language: str | None = None
    choices: tuple[str, ...] = ()
    span: tuple[float, float] | None = None

    @property
    def key(self) -> Key:
        """What tells the item from all others of a run."""
        return self.dataset, self.subset, self.id

    @property
    def question(self) -> str:
        """The text of the user's last turn."""
        texts: list[str] = []
        for message in reversed(self.messages):
            if message["role"] != "user":
                break
            if message["message_type"] == "text":
                texts.insert(0, message["content"])
            elif message["message_type"] == "audio-text":
                texts.insert(0, message["content"][1])
        return "\n".join(texts)

    @property
    def sounds(self) -> dict[int, str]:
        """The sound files of the chat by the index of their message."""
        return {
            index: os.fspath(sound)
            for index, message in enumerate(self.messages)
            if (sound := sound_of(message)) is not None
        }


def sound_of(message: dict[str, Any]) -> str | None:
    """The sound file that a message in the published format names."""
    if message["message_type"] == "audio":
        return message["content"]
    return message["content"][0] if message["message_type"] == "audio-text" else None


def parse_language(code: str) -> str:
    """The language of a code such as ``en``, ``zh-CN`` or ``cmn_hans_cn``, in two or three letters.

    Raises EvaluationError for anything else.
    """
    match = re.fullmatch(r"([a-z]{2,3})([-_].+)?", code.strip().lower())
    if match is None:
        raise EvaluationError(f"language: expected a code such as 'en' or 'zh', found {code!r}")
    return "zh" if match[1] == "cmn" else match[1]
