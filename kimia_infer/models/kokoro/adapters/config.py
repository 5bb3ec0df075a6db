"""What an adapter of Kokoro's prosody is; the module imports nothing slow."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Seam = Literal[
    "text_encoder.lstms.0", "text_encoder.lstms.2", "text_encoder.lstms.4", "lstm", "shared"
]
"""The LSTMs of the prosody predictor by their published names. The first four run once for each
phoneme, the fourth gives the durations; the last runs once for each frame of 25 ms and gives pitch
and energy."""

SEAMS: tuple[Seam, ...] = get_args(Seam)

DEFAULT_WIDTHS = {"residual": 64, "replace": 192}

MAMBA_HEAD = 32
"""Channels of a head of a Mamba block, which has twice as many channels as its input."""


class AdapterConfig(BaseModel):
    """Which LSTMs are changed, and how."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    method: Literal["lora", "residual", "replace"] = Field(
        "lora",
        description="lora: matrices of low rank and vectors, added to weights and biases; residual:"
        " a cell beside each LSTM; replace: a cell instead of it",
    )
    cell: Literal["cfc", "ltc", "mamba"] | None = Field(
        None, description="of residual and replace: CfC, LTC, or a Mamba-2 block"
    )
    seams: Annotated[tuple[Seam, ...], Field(strict=False, min_length=1)] = Field(
        SEAMS, description=f"LSTMs that are changed, of {', '.join(SEAMS)}"
    )
    rank: int = Field(8, ge=1, description="of lora")
    alpha: float = Field(16.0, gt=0, description="of lora, which is scaled by alpha / rank")
    width: int | None = Field(
        None, ge=1, description="channels of a cell in each direction; by default 64, or 192 where "
        "it replaces the LSTM"
    )  # fmt: skip

    @model_validator(mode="after")
    def _agrees(self) -> AdapterConfig:
        if (self.method == "lora") != (self.cell is None):
            expected = "no cell" if self.method == "lora" else "a cell: cfc, ltc or mamba"
            raise ValueError(f"cell: {self.method} takes {expected}")
        if self.method == "lora" and self.width is not None:
            raise ValueError("width: lora has a rank instead")
        if self.cell == "mamba" and 2 * self.cell_width % MAMBA_HEAD:
            raise ValueError(f"width: of mamba, a multiple of {MAMBA_HEAD // 2}")
        if len(set(self.seams)) < len(self.seams):
            raise ValueError("seams: one of them is named twice")
        return self

    @property
    def cell_width(self) -> int:
        """``width``, or the default of the method."""
        return self.width or DEFAULT_WIDTHS[self.method]
