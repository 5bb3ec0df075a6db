"""Sizes of the networks, read from the published configuration files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kimia_infer.utils.errors import CheckpointError, explain
from kimia_infer.weights.component import read_json

Size = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", populate_by_name=True)


class LanguageModelConfig(_Part):
    """``config.json``."""

    model_type: Literal["step1"]
    width: Size = Field(alias="hidden_size")
    inner: Size = Field(alias="intermediate_size")
    layers: Size = Field(alias="num_hidden_layers")
    heads: Size = Field(alias="num_attention_heads")
    groups: Size = Field(alias="num_attention_groups")
    vocabulary: Size = Field(alias="vocab_size")
    norm_eps: float = Field(alias="rms_norm_eps")
    begin: int = Field(alias="bos_token_id")
    end: int = Field(alias="eos_token_id")

    @model_validator(mode="after")
    def _fits(self) -> LanguageModelConfig:
        if self.width % self.heads or self.heads % self.groups:
            raise ValueError("hidden_size must be a multiple of heads, and heads of groups")
        return self

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @classmethod
    def from_directory(cls, directory: Path) -> LanguageModelConfig:
        """Raises CheckpointError naming the file and the field."""
        path = directory / "config.json"
        return _validated(cls, read_json(path), path)


Part = TypeVar("Part", bound=_Part)


def _validated(kind: type[Part], values: Any, path: Path) -> Part:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {explain(error, kind)[0]}") from error
