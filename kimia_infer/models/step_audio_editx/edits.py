"""Kinds of edits, what each can be asked for, and how it is put to the model.

Command lines offer what is listed here, so this module imports nothing that has to be installed.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from kimia_infer.utils.errors import RequestError

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
