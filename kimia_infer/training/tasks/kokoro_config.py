"""Settings of the training of Kokoro's prosody."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from kimia_infer.models.kokoro.adapters.config import AdapterConfig
from kimia_infer.training.config import Config, Items, Share, TrainingConfig
from kimia_infer.training.tasks.config import Weight


class AdapterSettings(AdapterConfig, Config):
    """The adapter that is trained."""


class ProsodyWeights(Config):
    """Weights of the losses; all but the last from the second stage of StyleTTS2."""

    logits: Weight = Field(20.0, description="of the logits of durations")
    durations: Weight = Field(1.0, description="of the L1 of durations, in frames of 25 ms")
    pitch: Weight = Field(1.0, description="of the smooth L1 of pitch, in units of 10 Hz")
    energy: Weight = Field(1.0, description="of the smooth L1 of energy")
    encoded: Weight = Field(
        10.0, description="of the squared error of encoded phonemes, where teacher and student "
        "have the same voice"
    )  # fmt: skip


class KokoroTrainingConfig(TrainingConfig):
    """An adapter learns how recordings are spoken; or, without them, how a teacher speaks strings
    of phonemes (distillation).
    """

    title: ClassVar[str] = "Kokoro's prosody, an adapter"

    model: str = Field(description="directory of Kokoro, the teacher and what is adapted")
    data: str | None = Field(  # pyrefly: ignore[bad-override]
        None, description="recordings and their texts, as .csv, .tsv or .jsonl with the columns "
        "audio and text; or a text file with a string of phonemes per line; by default strings "
        "that resemble English are made up"
    )  # fmt: skip
    language: str | None = Field(
        None, description="of the texts of recordings, en-us or en-gb; by default that of the voice"
    )
    feature_cache: str | None = Field(
        None, description="directory that keeps what was measured of recordings; by default "
        "features in output"
    )  # fmt: skip
    strings: int = Field(2000, ge=2, description="how many are made up, where there is no data")
    voices: Items[str] = Field(
        ("af_heart",), description="that speak with the adapter; the strings are dealt to them"
    )
    teacher_voice: str | None = Field(
        None, description="voice, or mixture, whose prosody is learned; by default each its own"
    )
    objective: Literal["prosody", "outputs"] = Field(
        "prosody", description="what is to be as the teacher's: durations, pitch and energy; or the"
        " output of each LSTM alone, which is much faster, for cells that replace it"
    )  # fmt: skip
    adapter: AdapterSettings = Field(AdapterSettings(), description="what is trained")
    weights: ProsodyWeights = Field(ProsodyWeights(), description="of the losses")
    learning_rate: float = Field(1e-3, ge=0, description="largest of the schedule")
    weight_decay: float = Field(0.0, ge=0, description="of matrices; biases have none")
    batch_size: int = Field(8, ge=1, description="strings per step")
    warmup_ratio: Share = Field(0.03, description="share of the steps over which the rate rises")
    cache_gigabytes: float = Field(
        2.0, ge=0, description="memory for what the teacher said, about 0.3 MB a string"
    )
    workers: int = Field(0, ge=0, le=0, description="none: the teacher runs with the training")
    gradient_checkpointing: bool = Field(False, description="not here: activations are small")

    @model_validator(mode="after")
    def _agrees(self) -> KokoroTrainingConfig:
        if self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing: activations are small here; leave it out")
        if self.objective == "outputs" and (self.adapter.method != "replace" or self.teacher_voice):
            raise ValueError(
                "objective: outputs are learned by adapter.method=replace, without teacher_voice"
            )
        if self.recordings and (len(self.voices) > 1 or self.teacher_voice):
            raise ValueError(
                "voices: recordings teach one voice, or mixture, and there is no teacher_voice"
            )
        if self.recordings and self.objective == "outputs":
            raise ValueError("objective: recordings have no outputs of LSTMs; leave it out")
        if self.eval_data and self.recordings != is_list(self.eval_data):
            raise ValueError(
                "eval_data: expected recordings, or strings of phonemes, like the training data"
            )
        if self.precision == "bf16":
            raise ValueError("precision: prosody is computed in float32; leave it out")
        return self

    @property
    def recordings(self) -> bool:
        """Whether it is recordings that are learned from."""
        return self.data is not None and is_list(self.data)

    def summary(self) -> dict[str, str]:
        adapter = self.adapter
        size = f"rank {adapter.rank}" if adapter.cell is None else f"width {adapter.cell_width}"
        return {
            "base model": self.model,
            "adapter": f"{adapter.method} {adapter.cell or ''}".strip() + f", {size}",
            "seams": ", ".join(adapter.seams),
            "voices": ", ".join(self.voices),
            "teacher": "recordings"
            if self.recordings
            else self.teacher_voice or "the model itself",
        }

    def usage(self) -> str:
        return f"    cp -r THIS_DIRECTORY {self.model}/adapters/NAME"


def is_list(data: str) -> bool:
    """Whether a file is a list of recordings, by its name."""
    return Path(data).suffix.lower() in (".csv", ".tsv", ".jsonl")
