"""What the model is trained to predict at every position of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

from kimia_infer.models.kimi_audio.prompt import Prompt


@dataclass(frozen=True)
class Labels:
    """The next id of each track and whether predicting it counts; as long as the prompt."""

    audio_ids: list[int]
    text_ids: list[int]
    audio_loss_mask: list[bool]
    text_loss_mask: list[bool]


def next_token_labels(prompt: Prompt, pad: int) -> Labels:
    """Both tracks and their loss masks shifted left by one; the last position predicts ``pad``.

    ``pad`` never counts. As in the published fine-tuning code.
    """
    return Labels(
        [*prompt.audio_ids[1:], pad],
        [*prompt.text_ids[1:], pad],
        [*prompt.audio_loss_mask[1:], False],
        [*prompt.text_loss_mask[1:], False],
    )
