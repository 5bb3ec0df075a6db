"""Spoken answers as they are generated: text and speech side by side.

The published fine-tuning never learns messages of type ``audio-text``. Here an assistant's
message of that type becomes what the token loop makes: the text ends with its end token, the
speech, which begins ``audio_delay`` positions later, with the end of the message.
"""

from __future__ import annotations

from collections.abc import Sequence

from kimia_infer.data.conversations import DataError
from kimia_infer.models.kimi_audio.prompt import EncodedMessage, Prompt
from kimia_infer.models.kimi_audio.text_tokenizer import SpecialTokens


def learn_spoken_answers(
    prompt: Prompt, messages: Sequence[EncodedMessage], tokens: SpecialTokens, audio_delay: int
) -> None:
    """Mark the answers of ``prompt``, laid out from ``messages``, and end their texts.

    What the token loop decides by itself is not learned: the blanks before the speech and those
    after the text.

    Raises:
        DataError: an answer is not the end of its turn, or its text leaves no room for the end.
    """
    position = 0
    for index, message in enumerate(messages):
        opens = index == 0 or messages[index - 1].role != message.role
        closes = index + 1 == len(messages) or messages[index + 1].role != message.role
        position += opens
        length = _length(message, closes, audio_delay)
        if message.role == "assistant" and message.message_type == "audio-text":
            if not closes:
                raise DataError(f"conversation[{index}]: a spoken answer has to end its turn")
            end = position + len(message.text_ids)
            if end == position + length:
                raise DataError(
                    f"conversation[{index}].content[1]: {len(message.text_ids)} text tokens and "
                    f"their end do not fit beside {len(message.codes)} speech codes; shorten it"
                )
            prompt.text_ids[end] = tokens.text_eos
            prompt.text_loss_mask[position : end + 1] = [True] * (end + 1 - position)
            speech, close = position + audio_delay, position + length
            prompt.audio_loss_mask[speech : close + 1] = [True] * (close + 1 - speech)
        position += length + closes


def _length(message: EncodedMessage, closes: bool, audio_delay: int) -> int:
    """Positions of a message between the tokens that open and close its turn."""
    if message.message_type == "text":
        return len(message.text_ids) + (message.role == "assistant")
    if message.message_type == "audio":
        return len(message.codes) + 2 + closes
    if message.message_type == "audio-text":
        return len(message.codes) + audio_delay
    return 0
