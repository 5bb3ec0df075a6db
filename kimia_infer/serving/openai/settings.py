"""The settings of the OpenAI server, from environment variables."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from kimia_infer.api.transcription import MAX_SECONDS
from kimia_infer.serving.settings import Settings, is_directory


class OpenAISettings(Settings):
    """Settings of every service, who may use this one, and how much of it a request may take."""

    api_keys: tuple[str, ...] = Field(
        (),
        repr=False,
        description="Keys, one of which clients must send; none if unset",
    )
    model_names: tuple[str, ...] = Field(
        ("kimi-audio",),
        min_length=1,
        description="Names that requests may call the model by, the first in answers",
    )
    max_megabytes: int = Field(
        200,
        ge=1,
        description="Maximum size of the body of a request",
        json_schema_extra={"unit": "MB"},
    )
    max_seconds: float = Field(
        MAX_SECONDS,
        gt=0,
        description="Longest recording that is transcribed",
        json_schema_extra={"unit": "seconds"},
    )
    requests_per_minute: int | None = Field(
        None, ge=1, description="Requests of a key, or of an address without keys; unset for any"
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="Origins whose pages may use the server, such as https://example.org, or *"
    )
    voices: str | None = Field(
        None, description="Directory of recordings of voices, NAME.wav, 1 to 30 s each"
    )
    editx: str | None = Field(
        None,
        description="Step-Audio-EditX, which is then offered, too: a directory, owner/name on the "
        "hub, or auto",
    )
    max_sessions: int = Field(64, ge=1, description="Realtime sessions at a time")
    session_seconds: float = Field(
        3600,
        gt=0,
        description="Longest realtime session",
        json_schema_extra={"unit": "seconds"},
    )
    session_idle_seconds: float = Field(
        600,
        gt=0,
        description="Time after which a realtime session ends whose client sends nothing",
        json_schema_extra={"unit": "seconds"},
    )

    @field_validator("voices")
    @classmethod
    def _directory_of_voices(cls, value: str | None) -> str | None:
        return is_directory(value)

    @field_validator("api_keys", "model_names", "cors_origins", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """The items of a list that is separated by commas."""
        if not isinstance(value, str):
            return value
        return tuple(item.strip() for item in value.split(",") if item.strip())
