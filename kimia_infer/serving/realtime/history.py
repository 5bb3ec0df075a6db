"""Conversations as prompts of the model: what is said to it, and how much of it fits."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import BUDGETS
from kimia_infer.audio.files import SAMPLE_RATE as MODEL_RATE
from kimia_infer.models.kimi_audio.encoders import code_count
from kimia_infer.models.kimi_audio.prompt import EncodedMessage
from kimia_infer.serving.openai.errors import ApiError
from kimia_infer.serving.realtime.conversation import Item, Part
from kimia_infer.serving.realtime.schema import SAMPLE_RATE

ANSWER_SHARE = 1 / 3
"""Part of the model's positions that is kept for the answer, unless its length is limited."""

LETTERS_PER_SECOND = 15.0
"""How fast English is spoken. It says how long the rest of an answer would have been."""

SYLLABLES_PER_SECOND = 5.0
"""The same for writing in which a character is a syllable."""

WHOLE_SYLLABLES = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")


@dataclass
class Prompt:
    """The chat to answer. ``audio_tokens`` are positions of sound, ``left_out`` items."""

    chats: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    audio_tokens: int = 0
    left_out: int = 0


@dataclass(frozen=True)
class Message:
    """A message of the model, and how many speech codes its sound has."""

    role: str
    kind: str
    text: str = ""
    sound: bytes = b""

    @property
    def codes(self) -> int:
        samples = len(self.sound) // 2
        return code_count(math.ceil(samples * MODEL_RATE / SAMPLE_RATE)) if samples else 0

    def chat(self) -> dict[str, Any]:
        wave = (np.frombuffer(self.sound, "<i2"), SAMPLE_RATE)
        content: Any = {"text": self.text, "audio": wave, "audio-text": [wave, self.text]}
        return {"role": self.role, "message_type": self.kind, "content": content[self.kind]}


def messages_of(item: Item) -> list[Message]:
    """An item as messages; those of the system are the user's, since the model has no other."""
    role = "assistant" if item.role == "assistant" else "user"
    found = []
    for part in item.parts:
        if not part.is_sound:
            found.append(Message(role, "text", part.text or ""))
        elif not part.sound:
            continue  # forgotten, or nothing of it was heard
        elif role == "user":
            found.append(Message(role, "audio", sound=part.sound))
        else:
            found.append(Message(role, "audio-text", part.text or "", part.sound))
    return [message for message in found if message.sound or message.text.strip()]


def build_prompt(
    model: KimiAudio,
    items: Sequence[Item],
    instructions: str,
    output_type: str,
    max_tokens: int | None,
    truncation: Any,
) -> Prompt:
    """The chat of ``items`` after ``instructions``, without the oldest ones if it is too long.

    What is left out begins with the oldest item and ends before one of the user. Raises ApiError
    if it would be too long and ``truncation`` is "disabled".
    """
    opening = [Message("user", "text", instructions)] if instructions.strip() else []
    turns = [[_fitted(model, message) for message in messages_of(item)] for item in items]
    costs = [_positions(model, turn) for turn in turns]
    budget = BUDGETS[output_type]
    reserve = min(max_tokens or math.ceil(budget * ANSWER_SHARE), budget - 1)
    limit = budget - reserve - _positions(model, opening) - 1
    first = 0
    if sum(costs) > limit and truncation == "disabled":
        raise ApiError(
            400,
            f"conversation: its {sum(costs)} positions are more than the {limit} that are left "
            "beside instructions and answer; delete items, or set session.truncation to 'auto'",
            "conversation",
            "context_length_exceeded",
        )
    if isinstance(truncation, dict):
        own = (truncation["token_limits"] or {}).get("post_instructions", limit)
        limit = min(limit, own)
        if sum(costs) > limit:
            limit = int(limit * truncation["retention_ratio"])
    while first < len(items) - 1 and sum(costs[first:]) > limit:
        first += 1
        while first < len(items) - 1 and items[first].role == "assistant":
            first += 1
    kept = [message for turn in turns[first:] for message in turn]
    return Prompt(
        [message.chat() for message in [*opening, *kept]],
        _positions(model, [*opening, *kept]) + 1,
        sum(message.codes for message in kept),
        first,
    )


def _positions(model: KimiAudio, messages: Sequence[Message]) -> int:
    """Length of the prompt of ``messages`` without the token that invites to answer."""
    if not messages:
        return 0
    encode = model.text_tokenizer.encode
    encoded = [EncodedMessage(m.role, m.kind, encode(m.text), [0] * m.codes) for m in messages]
    return len(model.prompt_builder.build(encoded, "both", add_assistant_start=False))


def _fitted(model: KimiAudio, message: Message) -> Message:
    """``message`` without last words for which its sound has no room."""
    if message.kind != "audio-text":
        return message
    text, room = message.text, message.codes + model.prompt_builder.audio_delay
    while len(model.text_tokenizer.encode(text)) > room:
        text = text[:-1].rpartition(" ")[0] if " " in text else text[: len(text) // 2]
    return Message(message.role, message.kind, text, message.sound)


def cut_to_heard(part: Part, samples: int, whole: bool, speed: float = 1.0) -> None:
    """Forget what is after the first ``samples`` of speech, and the words that belong to it.

    The model does not say when it speaks which word. The text is cut at the same share as the
    sound, before a word that is cut. Unless the sound is the ``whole`` answer's, the answer counts
    as long as its text takes at ``speed`` times the usual speed of speech.
    """
    text = part.text or ""
    syllables = len(WHOLE_SYLLABLES.findall(text))
    seconds = syllables / SYLLABLES_PER_SECOND + (len(text) - syllables) / LETTERS_PER_SECOND
    length = part.samples if whole else max(part.samples, round(seconds / speed * SAMPLE_RATE))
    part.sound = part.sound[: samples * 2]
    part.text = first_words(text, samples / length) if length else ""


def first_words(text: str, share: float) -> str:
    """The first ``share`` (0 to 1) of ``text``, in whole words."""
    end = int(len(text) * share)
    if end >= len(text):
        return text
    within = not (text[end - 1 : end] + text[end]).count(" ")
    if within and not WHOLE_SYLLABLES.match(text[end]):
        end = text.rfind(" ", 0, end) + 1
    return text[:end].rstrip()
