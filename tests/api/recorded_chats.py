"""The recorded chats of a complete tiny checkpoint: messages, options, draws and answers."""

from __future__ import annotations

import json

import torch

from kimia_infer.api.parameters import Parameters, parse_parameters
from tests.paths import GOLDEN
from tests.randomness import RecordedRandomness

SET = GOLDEN / "e2e"
RECORDED = json.loads((SET / "cases.json").read_text())
CASES = {case["name"]: case for case in RECORDED["cases"]}
DEFAULTS = {
    f"{track}_{name}": value
    for track, window in (("audio", 64), ("text", 16))
    for name, value in (
        ("temperature", 0.0),
        ("top_k", 5),
        ("repetition_penalty", 1.0),
        ("repetition_window_size", window),
    )
}


def chat_of(case: dict) -> list[dict]:
    """The recorded messages with audio names turned into paths."""

    def content(message: dict):
        value = message["content"]
        if message["message_type"] == "audio":
            return str(SET / "audio" / value)
        if message["message_type"] == "audio-text":
            return [str(SET / "audio" / value[0]), value[1]]
        return value

    return [message | {"content": content(message)} for message in case["messages"]]


def options_of(case: dict) -> Parameters:
    return parse_parameters(**DEFAULTS | case["arguments"])


def randomness_of(case: dict, tensors: dict[str, torch.Tensor]) -> RecordedRandomness:
    uniforms = {(d["stream"], d["step"]): d["u"] for d in case.get("draws", [])}
    prefix = f"{case['name']}.noise."
    noise = {int(k[len(prefix) :]): v for k, v in tensors.items() if k.startswith(prefix)}
    return RecordedRandomness(uniforms, noise)
