"""The body of a request for speech."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from kimia_infer.api.editx_request import Task
from kimia_infer.api.parameters import HIGHEST_SEED
from kimia_infer.audio.encode import SpeechFormat
from kimia_infer.serving.openai.service import EDITX_NAME
from kimia_infer.serving.openai.voice_store import LONGEST_WORDS
from kimia_infer.serving.openai.voices import VoiceName

LONGEST_INPUT = 4096
"""Characters, as in OpenAI's API."""

LONGEST_INSTRUCTIONS = 500
"""Characters: every sentence has them before it, and they leave less room for its speech."""


class SpeechRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    input: Annotated[str, Field(min_length=1, max_length=LONGEST_INPUT)]
    voice: Annotated[VoiceName, Field(description="One of /v1/audio/voices")]
    instructions: str = Field(
        "", max_length=LONGEST_INSTRUCTIONS, description="Goes before the request to read, in words"
    )
    response_format: SpeechFormat = "mp3"
    speed: float = Field(
        1.0, ge=0.25, le=4, description="Of a voice of Kokoro; the model itself has one"
    )
    stream_format: Literal["audio", "sse"] = "audio"
    seed: int | None = Field(
        None, ge=0, le=HIGHEST_SEED, description="Repeats the same sound; not in OpenAI's API"
    )
    task: Task = Field("clone", description=f"Of {EDITX_NAME}: clone, or the kind of an edit")
    option: str = Field("", max_length=100, description="Of the edit, such as happy")
    ref_audio: str = Field(
        "", description=f"The recording for {EDITX_NAME}, a data URI, in the place of a voice"
    )
    ref_text: str = Field(
        "",
        max_length=LONGEST_WORDS,
        description="What is said in the recording; written down by the model if it is left out",
    )
