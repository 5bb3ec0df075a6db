"""Lines of training data."""

from __future__ import annotations

ANSWER = {"role": "assistant", "message_type": "text", "content": "fine"}


def user(**changes: object) -> dict:
    return {"role": "user", "message_type": "text", "content": "hello", **changes}


def spoken(**changes: object) -> dict:
    return user(**{"message_type": "audio", "content": "a.wav", **changes})


def line(*messages: dict, **changes: object) -> dict:
    return {"task_type": "understanding", "conversation": list(messages), **changes}
