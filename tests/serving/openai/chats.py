"""Messages that tests of chat completions send."""

from __future__ import annotations

import base64
from typing import Any

from tests.serving.openai.sounds import spoken
from tests.serving.questions import QUESTION

MODEL = "kimi-audio"

SPEECH: Any = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}
STREAMED_SPEECH: Any = SPEECH | {"audio": {"voice": "alloy", "format": "pcm16"}, "stream": True}


def sound(content: bytes, form: str = "wav") -> dict[str, Any]:
    """The part of a message that holds a file with sound."""
    data = base64.b64encode(content).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": form}}


def asked(*parts: bytes | str) -> Any:
    """A message of the user: files with sound, and texts."""
    content = [
        sound(part) if isinstance(part, bytes) else {"type": "text", "text": part} for part in parts
    ]
    return {"role": "user", "content": content}


def said(*texts: str) -> list[Any]:
    """A message of the user for each text, spoken."""
    return [asked(spoken(text)) for text in texts]


ASKED: list[Any] = [asked(QUESTION.read_bytes())]
"""To which the miniature says "nine"."""

LONG: list[Any] = [
    {"role": "user", "content": "Please read aloud: take the red ball to the school"}
]

SLOW: Any = {
    "messages": [
        {
            "role": "user",
            "content": f"Please read aloud: {'take the red ball to the school and ' * 5}",
        }
    ],
    "temperature": 2,
    "seed": 12,
    "extra_body": {
        **{"text_top_k": 0, "audio_temperature": 2, "audio_top_k": 1000},
        **{"text_repetition_penalty": 2, "audio_repetition_penalty": 2},
        "audio_repetition_window_size": 1500,
    },
}
"""A request for speech, drawn so wildly that the miniature needs seconds for it."""
