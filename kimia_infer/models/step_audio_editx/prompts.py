"""The prompts of both tasks: sentences that the model was trained on, and their ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from kimia_infer.models.step_audio_editx.edits import Edit
from kimia_infer.models.step_audio_editx.text_tokenizer import TextTokenizer, audio_name
from kimia_infer.utils.errors import RequestError

BEGIN_ID = 1
"""Stands before every prompt."""

CLONE_SYSTEM = """Generate audio with the following timbre, prosody and speaking style

[speaker_start]
speaker name: {speaker}
speaker prompt text: 
{text}
speaker audio tokens: 
{audio}
[speaker_end]
"""

EDIT_SYSTEM = (
    "As a highly skilled audio editing and tuning specialist, you excel in interpreting user "
    "instructions and applying precise adjustments to meet their needs. Your expertise spans a "
    "wide range of enhancement capabilities, including but not limited to:\n"
    "# Emotional Enhancement\n# Speaking Style Transfer\n# Non-linguistic Adjustments\n"
    "# Audio Tuning & Editing\n"
    "Note: You will receive instructions in natural language and are expected to accurately "
    "interpret and execute the most suitable audio edits and enhancements.\n"
)


def speaker_name(text: str, wave: np.ndarray) -> str:
    """The name that a clone's prompt gives the speaker of ``wave``, float32 of all channels.

    It is a hash of the text and of the first and last 1000 samples.
    """
    samples = wave.flatten()
    if len(samples) > 2000:
        samples = np.concatenate([samples[:1000], samples[-1000:]])
    digest = hashlib.sha256(text.encode() + samples.astype("<f4").tobytes()).hexdigest()
    return f"clone_{digest[:16]}"


class PromptBuilder:
    """Makes prompts of one tokenizer."""

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer

    def clone(self, speaker: str, text: str, audio: Sequence[int], target: str) -> list[int]:
        """Ids that ask for ``target``, in the voice in which ``audio`` says ``text``.

        Raises RequestError naming the text that is empty or holds tokens of the model.
        """
        self._require_text("text", text)
        self._require_text("target", target)
        encode = self._tokenizer.encode
        system = CLONE_SYSTEM.format(speaker=speaker, text=text, audio=_names(audio))
        # So that no mark of a word's begin stands before the target.
        spoken = encode("\n" + target)[len(encode("\n")) :]
        return self._turns(system, spoken)

    def edit(self, edit: Edit, audio: Sequence[int]) -> list[int]:
        """Ids that ask for an edit of ``audio``.

        Raises RequestError naming the field that is missing, unknown or holds tokens.
        """
        edit.check()
        for field in ("text", "new_text"):
            self._tokenizer.require_plain(field, getattr(edit, field))
        human = f"{edit.instruction()}\n{_names(audio)}\n"
        return self._turns(EDIT_SYSTEM, self._tokenizer.encode(human))

    def _require_text(self, field: str, text: str) -> None:
        if not text.strip():
            raise RequestError(f"{field}: expected some text, found none")
        self._tokenizer.require_plain(field, text)

    def _turns(self, system: str, human: list[int]) -> list[int]:
        """A turn of the system, one of the human, and the begin of the assistant's."""
        encode = self._tokenizer.encode
        begin, end = self._tokenizer.turn_begin, self._tokenizer.turn_end
        return [
            *(BEGIN_ID, begin, *encode(f"system\n{system}"), end),
            *(begin, *encode("human\n"), *human, end),
            *(begin, *encode("assistant\n")),
        ]


def _names(audio: Sequence[int]) -> str:
    return "".join(audio_name(token) for token in audio)
