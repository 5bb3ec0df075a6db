"""The words of a recording that Step-Audio-EditX is given, where the caller does not know them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kimia_infer.models.step_audio_editx.reference import LONGEST_SECONDS, Source, load_reference
from kimia_infer.utils.errors import RequestError

if TYPE_CHECKING:
    from kimia_infer.api.kimia import KimiAudio
    from kimia_infer.api.request import Deadline


def words_of(model: KimiAudio | None, audio: Source, deadline: Deadline | None = None) -> str:
    """What is said in a recording, as ``model`` writes it down.

    Raises:
        AudioError: naming ``audio``, for what is no recording of a voice.
        RequestError: naming ``text``, where there is no model, or it hears no words.
    """
    load_reference(audio)
    if model is None:
        raise RequestError("text: expected what is said in the recording, found none")
    heard = model.transcribe(audio, max_seconds=LONGEST_SECONDS, deadline=deadline)
    if not heard.text.strip():
        raise RequestError(
            "text: Kimi-Audio heard no words in the recording; give what is said in it"
        )
    return heard.text.strip()
