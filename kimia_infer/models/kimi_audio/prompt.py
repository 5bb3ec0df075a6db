"""Chat messages, validated, and the two token tracks of equal length that they become.

Every position holds an audio id and a text id; a track without a token there holds the blank.
Positions that carry continuous Whisper features are marked, and the positions that an assistant's
answer is trained on are marked in two loss masks.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kimia_infer.audio.files import AudioError
from kimia_infer.audio.memory import FORMS, is_sound, wav_content
from kimia_infer.models.kimi_audio.text_tokenizer import SpecialTokens
from kimia_infer.utils.errors import RequestError

ROLES = ("user", "assistant")

AudioSource = str | os.PathLike | bytes
"""A path, or the content of a file."""

AudioInput = AudioSource | Mapping | tuple
"""What callers may send: an AudioSource, or sound in memory."""


@dataclass(frozen=True)
class Message:
    """One validated message; ``text`` and ``audio`` are set as its type demands.

    ``message_type`` None is a message without content, as the published format allows.
    """

    role: str
    message_type: str | None
    text: str | None = None
    audio: AudioSource | None = None


def parse_messages(chats: Any) -> list[Message]:
    """Validate the published message format: dictionaries with role, message_type, content.

    Content is a string for ``text``, audio as :func:`parse_audio` takes it for ``audio``, and
    ``[audio, text]`` for ``audio-text``. Raises RequestError naming message and field.
    """
    if isinstance(chats, str | bytes | dict) or not isinstance(chats, Sequence):
        raise RequestError("chats: expected a list of messages")
    return [_parse(f"chats[{index}]", message) for index, message in enumerate(chats)]


def _parse(where: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise RequestError(f"{where}: expected a dictionary with role, message_type and content")
    role = message.get("role")
    if role not in ROLES:
        hint = " (Kimi-Audio has no system role)" if role == "system" else ""
        raise RequestError(
            f"{where}.role: expected 'user' or 'assistant', found {reprlib.repr(role)}{hint}"
        )
    if "message_type" not in message:
        raise RequestError(f"{where}.message_type: missing; use 'text', 'audio' or 'audio-text'")
    kind, content = message["message_type"], message.get("content")
    if kind is None:
        return Message(role, None)
    if kind == "text":
        return Message(role, kind, text=parse_text(f"{where}.content", content))
    if kind == "audio":
        return Message(role, kind, audio=parse_audio(f"{where}.content", content))
    if kind == "audio-text":
        if not isinstance(content, list | tuple) or len(content) != 2:
            raise RequestError(f"{where}.content: expected [audio, text] for 'audio-text'")
        audio = parse_audio(f"{where}.content[0]", content[0])
        return Message(role, kind, text=parse_text(f"{where}.content[1]", content[1]), audio=audio)
    raise RequestError(
        f"{where}.message_type: expected 'text', 'audio' or 'audio-text', "
        f"found {reprlib.repr(kind)}"
    )


def require_content(messages: Sequence[Message]) -> None:
    """Raise RequestError unless a message has audio or text to answer."""
    if not any(m.audio is not None or (m.text or "").strip() for m in messages):
        found = "no message" if not messages else "only messages without content"
        raise RequestError(f"chats: nothing to answer ({found}); send audio or text")


def parse_text(where: str, value: Any) -> str:
    """``value`` if it is text; else RequestError naming ``where``."""
    if not isinstance(value, str):
        raise RequestError(f"{where}: expected text, found {type(value).__name__}")
    return value


def parse_audio(where: str, value: Any) -> AudioSource:
    """An audio file, given by path or as its content, or sound in memory, as a file.

    Raises RequestError naming ``where``; AudioError for sound in memory that cannot be used.
    """
    if isinstance(value, AudioSource):
        return value
    if not is_sound(value):
        raise RequestError(
            f"{where}: expected an audio file path, the bytes of a file, or sound in memory "
            f"({FORMS}), found {type(value).__name__}"
        )
    try:
        return wav_content(value)
    except AudioError as error:
        raise AudioError(f"{where}: {error}") from error


@dataclass(frozen=True)
class EncodedMessage:
    """A message with its text as token ids and its audio as speech codes (from 0)."""

    role: str
    message_type: str | None
    text_ids: Sequence[int] = ()
    codes: Sequence[int] = ()


@dataclass
class Prompt:
    """Two tracks and their masks, all of equal length.

    ``feature_messages`` lists the indices of the messages whose Whisper features fill the
    continuous positions, in order.
    """

    audio_ids: list[int] = field(default_factory=list)
    text_ids: list[int] = field(default_factory=list)
    is_continuous: list[bool] = field(default_factory=list)
    audio_loss_mask: list[bool] = field(default_factory=list)
    text_loss_mask: list[bool] = field(default_factory=list)
    feature_messages: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.audio_ids)

    def add(
        self,
        audio_id: int,
        text_id: int,
        continuous: bool = False,
        audio_loss: bool = False,
        text_loss: bool = False,
    ) -> None:
        self.audio_ids.append(audio_id)
        self.text_ids.append(text_id)
        self.is_continuous.append(continuous)
        self.audio_loss_mask.append(audio_loss)
        self.text_loss_mask.append(text_loss)


@dataclass(frozen=True)
class PromptBuilder:
    """Turns messages into a :class:`Prompt`.

    Speech code c is the id ``token_offset`` + c. In ``audio-text`` messages, as in generated
    answers, the audio track starts ``audio_delay`` positions after the text track.
    """

    tokens: SpecialTokens
    token_offset: int
    audio_delay: int

    def build(
        self,
        messages: Sequence[EncodedMessage],
        output_type: str,
        add_assistant_start: bool = True,
    ) -> Prompt:
        """The prompt that asks for ``output_type`` ("text" or "both").

        ``add_assistant_start`` ends it with the token that invites the assistant to answer;
        training samples end without. Raises RequestError when an ``audio-text`` message has
        more text than its audio leaves room for, or when there is nothing at all.
        """
        tokens, blank = self.tokens, self.tokens.text_blank
        prompt = Prompt()
        for index, message in enumerate(messages):
            opens = index == 0 or messages[index - 1].role != message.role
            closes = index + 1 == len(messages) or messages[index + 1].role != message.role
            if opens:
                user = message.role == "user"
                start = tokens.user_msg_start if user else tokens.assistant_msg_start
                prompt.add(start, blank)
            if message.message_type == "text":
                self._add_text(prompt, message)
            elif message.message_type == "audio":
                self._add_audio(prompt, message)
                prompt.feature_messages.append(index)
                if closes:
                    asks_text = output_type == "text"
                    prompt.add(tokens.speech_ct if asks_text else tokens.speech_ctd, blank)
            elif message.message_type == "audio-text":
                self._add_audio_text(prompt, message, index)
            if closes:
                prompt.add(tokens.msg_end, blank)
        if add_assistant_start:
            prompt.add(tokens.assistant_msg_start, blank)
        if not len(prompt):
            raise RequestError("chats: a training sample needs at least one message")
        return prompt

    def _add_text(self, prompt: Prompt, message: EncodedMessage) -> None:
        answers = message.role == "assistant"
        for text_id in message.text_ids:
            prompt.add(self.tokens.text_blank, text_id, text_loss=answers)
        if answers:
            prompt.add(self.tokens.text_blank, self.tokens.text_eos, text_loss=True)

    def _add_audio(self, prompt: Prompt, message: EncodedMessage) -> None:
        blank, answers = self.tokens.text_blank, message.role == "assistant"
        prompt.add(self.tokens.media_begin, blank)
        for code in message.codes:
            prompt.add(self.token_offset + code, blank, continuous=True, audio_loss=answers)
        prompt.add(self.tokens.media_end, blank, audio_loss=answers)

    def _add_audio_text(self, prompt: Prompt, message: EncodedMessage, index: int) -> None:
        blank = self.tokens.text_blank
        audio = [blank] * self.audio_delay + [self.token_offset + c for c in message.codes]
        text = list(message.text_ids)
        if len(text) > len(audio):
            raise RequestError(
                f"chats[{index}].content: {len(text)} text tokens do not fit beside "
                f"{len(message.codes)} speech codes ({len(audio)} positions); shorten the text "
                "or send text and audio as separate messages"
            )
        text += [blank] * (len(audio) - len(text))
        for audio_id, text_id in zip(audio, text, strict=True):
            prompt.add(audio_id, text_id)
