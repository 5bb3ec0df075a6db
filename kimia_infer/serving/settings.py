"""How a service runs the model, from environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import AliasGenerator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from kimia_infer.api.parameters import MAX_SLOTS, explain
from kimia_infer.utils.errors import ConfigurationError

MODEL_FIELDS = {
    *("device", "dtype", "head_rows", "attention", "adapter", "quantization", "kv_cache"),
    *("offload", "slots", "speech_device", "kokoro", "kokoro_adapter"),
}
"""The settings that are arguments of KimiAudio, under the same names."""

Kind = TypeVar("Kind", bound="Settings")


class Settings(BaseModel):
    """The variables ``KIMI_AUDIO_DEVICE``, ``KIMI_AUDIO_DTYPE`` and so on, one per field.

    None leaves the choice to KimiAudio.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
        alias_generator=AliasGenerator(validation_alias=lambda name: f"KIMI_AUDIO_{name.upper()}"),
    )

    device: str | None = Field(None, description="Device of PyTorch, such as cpu or cuda:1")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Type of the language model's and the encoder's weights"
    )
    head_rows: Literal["track", "full"] = Field(
        "track", description="Compute only the logits that each track can use, or all of them"
    )
    attention: Literal["triton", "sdpa"] | None = Field(
        None, description="Attention kernels; the best available ones if unset"
    )
    timeout: float | None = Field(
        None,
        gt=0,
        description="Maximum seconds that a prediction may take; unset for no limit",
        json_schema_extra={"unit": "seconds"},
    )
    adapter: str | None = Field(None, description="Directory of an adapter to add to the weights")
    quantization: Literal["none", "fp8", "int8", "int4"] | None = Field(
        None, description="How the matrices of the language model's layers are stored"
    )
    kv_cache: Literal["none", "fp8"] | None = Field(
        None, description="How keys and values of attention are stored"
    )
    offload: Literal["encoders"] | None = Field(
        None, description="Components kept in host memory while they are not used"
    )
    slots: int | None = Field(
        None, ge=1, le=MAX_SLOTS, description="Requests at a time; as many as fit if unset"
    )
    speech_device: str | None = Field(
        None, description="Device of encoders, detokenizer and vocoder, such as cuda:1"
    )
    kokoro: str | None = Field(
        None,
        description="Directory of Kokoro, whose voices can then be chosen, or auto: the one in "
        "the cache, fetched if it is not there",
    )
    kokoro_adapter: str | None = Field(
        None, description="Adapter of Kokoro's prosody: a name in its directory, or a directory"
    )
    output: Literal["text", "both"] = Field(
        "both", description="With text, no detokenizer is loaded and there is no speech"
    )

    @field_validator("adapter")
    @classmethod
    def _directory(cls, value: str | None) -> str | None:
        return is_directory(value)

    @field_validator("kokoro")
    @classmethod
    def _directory_or_auto(cls, value: str | None) -> str | None:
        if value is None or value == "auto" or os.path.isdir(value):
            return value
        raise ValueError("expected a local directory, or auto")

    @field_validator("device", "speech_device")
    @classmethod
    def _available(cls, value: str | None) -> str | None:
        if value is None or value == "cpu":
            return value
        # Imports PyTorch, which is slow; the CPU alone is known without.
        from kimia_infer.api.devices import available_devices

        available = available_devices()
        if value not in available:
            raise ValueError(f"expected one of the devices here ({', '.join(available)})")
        return value

    def model_arguments(self) -> dict[str, Any]:
        """The arguments of KimiAudio besides its weights."""
        return self.model_dump(include=MODEL_FIELDS) | {"load_detokenizer": self.output == "both"}

    def transcriber_arguments(self) -> dict[str, Any]:
        """Those of a KimiAudio that only writes down what others are to speak."""
        silent = {"load_detokenizer": False, "kokoro": None, "kokoro_adapter": None}
        return self.model_arguments() | silent | {"slots": self.slots or 1}


def is_directory(value: str | None) -> str | None:
    """``value``; raises ValueError if it is no directory of this machine, unless it is unset."""
    if value is not None and not os.path.isdir(value):
        raise ValueError("expected a local directory")
    return value


def read_settings(kind: type[Kind], environment: Mapping[str, str]) -> Kind:
    """The settings of a service in ``environment``; unset and empty variables mean the default.

    Raises:
        ConfigurationError: naming the variable, what is expected and what was found.
    """
    names = (f"KIMI_AUDIO_{name.upper()}" for name in kind.model_fields)
    given = {name: value for name in names if (value := environment.get(name))}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise ConfigurationError(explain(kind, error)) from None
