"""The prompts of both tasks: sentences that the model was trained on, and their ids."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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

REMOVE = "remove"
EMOTIONS = (
    *("happy", "angry", "sad", "humour", "confusion", "disgusted", "empathy", "embarrass"),
    *("fear", "surprised", "excited", "depressed", "coldness", "admiration", REMOVE),
)
STYLES = (
    *("serious", "arrogant", "child", "older", "girl", "pure", "sister", "sweet", "ethereal"),
    *("whisper", "gentle", "recite", "generous", "act_coy", "warm", "shy", "comfort"),
    *("authority", "chat", "radio", "soulful", "story", "vivid", "program", "news"),
    *("advertising", "roar", "murmur", "shout", "deeply", "loudly", REMOVE, "exaggerated"),
)
SPEEDS = ("faster", "slower", "more faster", "more slower")

OPTIONS = {
    "emotion": EMOTIONS,
    "style": STYLES,
    "speed": SPEEDS,
    "denoise": (),
    "vad": (),
    "paralinguistic": (),
}
"""Kinds of edits, and what each can be asked for."""

PARALINGUISTIC_TAGS = (
    *("Breathing", "Laughter", "Surprise-oh", "Confirmation-en", "Uhm", "Surprise-ah"),
    *("Surprise-wa", "Sigh", "Question-ei", "Dissatisfaction-hnn"),
)
"""Stand in square brackets in the new text of a paralinguistic edit."""

NO_TEXT = ("denoise", "vad")
"""Edits whose prompt has no text of the recording."""

_KEEP = (
    "from the given audio while preserving the voice content clearly. Ensure that the speech "
    "quality remains intact with minimal distortion, and eliminate all"
)
_MORE = "Make the following audio more {option}. The text corresponding to the audio is: {text}\n"
_INSTRUCTIONS = {
    "emotion": _MORE,
    "speed": _MORE,
    "style": (
        "Make the following audio more {option} style. "
        "The text corresponding to the audio is: {text}\n"
    ),
    "denoise": f"Remove any noise {_KEEP} noise from the audio.\n",
    "vad": f"Remove any silent portions {_KEEP} silence from the audio.\n",
    "paralinguistic": (
        "Add some non-verbal sounds to make the audio more natural, the new text is : {new_text}\n"
        "  The text corresponding to the audio is: {text}\n"
    ),
}
_REMOVALS = {
    "emotion": "Remove any emotion in the following audio and the reference text is: {text}\n",
    "style": (
        "Remove any speaking styles in the following audio and the reference text is: {text}\n"
    ),
}


@dataclass(frozen=True)
class Edit:
    """A change to a recording.

    ``kind`` is one of OPTIONS and ``option`` one of its values, empty where it has none. ``text``
    is what is said in the recording; ``new_text``, for a paralinguistic edit, the same with tags.
    """

    kind: str
    option: str = ""
    text: str = ""
    new_text: str = ""

    def check(self) -> None:
        """Raises RequestError naming the field that is missing, unknown or not used."""
        _require_choice("kind", self.kind, tuple(OPTIONS))
        options = OPTIONS[self.kind]
        if options:
            _require_choice("option", self.option, options)
        elif self.option:
            raise RequestError(f"option: {self.kind} has none, found {self.option!r}")
        if self.kind not in NO_TEXT and not self.text.strip():
            raise RequestError(f"text: {self.kind} needs the words of the recording")
        if self.kind == "paralinguistic" and not self.new_text.strip():
            raise RequestError(
                f"new_text: expected the text with tags such as [{PARALINGUISTIC_TAGS[0]}]"
            )
        if self.kind != "paralinguistic" and self.new_text:
            raise RequestError(f"new_text: only paralinguistic has one, and not {self.kind}")

    def instruction(self) -> str:
        template = _INSTRUCTIONS[self.kind]
        if self.option == REMOVE:
            template = _REMOVALS[self.kind]
        return template.format(option=self.option, text=self.text.strip(), new_text=self.new_text)


def _require_choice(field: str, value: str, known: Sequence[str]) -> None:
    if value in known:
        return
    near = difflib.get_close_matches(value, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RequestError(f"{field}: expected one of {', '.join(known)}, found {value!r}{hint}")


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
