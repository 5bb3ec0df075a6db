"""Settings of a training run, from one YAML file and ``name=value`` arguments.

The module imports neither PyTorch nor anything else that is slow: a command reports everything
that is wrong with its settings before that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kimia_infer.utils.errors import ConfigurationError, explain

Trainable = Literal["embedding", "trunk", "mimo", "adaptor", "heads", "whisper"]
"""What can be trained or frozen."""

ADAPTED: tuple[Trainable, ...] = ("trunk", "mimo", "adaptor", "heads")
"""What has adapters by default, as published."""

Item = TypeVar("Item")
Items = Annotated[tuple[Item, ...], Field(strict=False, min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


Kind = TypeVar("Kind", bound=Config)


class TrainingConfig(Config):
    """Settings of every training run."""

    title: ClassVar[str] = "a model"
    """What a run makes, for its card."""

    data: str
    output: str = Field(description="directory of the run: checkpoints, logs, final model")
    seed: int = Field(0, ge=0, description="of data order, dropout and new weights")
    device: Literal["cpu"] | None = Field(None, description="the accelerator if any; or cpu")
    precision: Literal["bf16", "fp32"] | None = Field(
        None,
        description="of activations and frozen weights; bf16 on accelerators, fp32 on the CPU. "
        "Trained weights are always fp32",
    )
    epochs: int = Field(5, ge=1, description="passes over the training data")
    max_steps: int | None = Field(None, ge=1, description="end after this many steps instead")
    batch_size: int = Field(1, ge=1, description="samples per process and forward pass")
    accumulation: int = Field(1, ge=1, description="forward passes per step")
    learning_rate: float = Field(1e-5, ge=0, description="largest of the schedule")
    warmup_ratio: Share = Field(0.01, description="share of the steps over which the rate rises")
    weight_decay: float = Field(0.1, ge=0, description="of matrices; biases and norms have none")
    beta1: float = Field(0.9, ge=0, lt=1, description="of AdamW")
    beta2: float = Field(0.95, ge=0, lt=1, description="of AdamW")
    epsilon: float = Field(1e-8, ge=0, description="of AdamW")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="gradients are scaled down to this norm"
    )
    gradient_checkpointing: bool = Field(
        True, description="recompute activations; less memory, slower"
    )
    workers: int = Field(2, ge=0, description="processes that read data, per training process")
    eval_every: int | None = Field(
        None, ge=1, description="steps between validations; by default an epoch"
    )
    save_every: int | None = Field(
        None, ge=1, description="steps between checkpoints; by default an epoch"
    )
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept; older ones are deleted")
    eval_data: str | None = Field(
        None, description="validation data; by default the first lines or recordings of data"
    )
    eval_ratio: float = Field(
        0.05, ge=0, le=0.9, description="share of data for validation, at least one item; 0: none"
    )
    audio_root: str = Field(".", description="directory that relative audio paths start from")
    bad_lines: Literal["stop", "skip"] = Field(
        "stop", description="if lines or recordings cannot be used"
    )

    def summary(self) -> dict[str, str]:
        """What a run starts from and how it trains, for its card."""
        return {}

    def usage(self) -> str:
        """How to serve what a run made, for its card."""
        return ""


class AdapterConfig(Config):
    """Adapters of low rank (LoRA)."""

    rank: int = Field(8, ge=1, description="of the adapters")
    alpha: float = Field(16.0, ge=0, description="adapters are scaled by alpha / rank")
    dropout: Share = Field(0.05, description="of the inputs of an adapter")
    layers: Items[Literal["attention", "feed_forward"]] = Field(
        ("attention", "feed_forward"),
        description="which linear layers of the trunk, MIMO branch and Whisper",
    )


Times = Annotated[int, Field(ge=0)]


class MixConfig(Config):
    """How often a document is learned for each task of pre-training; the report's weights."""

    audio: Times = Field(1, description="speech codes alone")
    text: Times = Field(7, description="texts alone")
    transcription: Times = Field(1, description="a text after each heard segment")
    speech: Times = Field(1, description="speech codes after each text")
    audio_to_audio: Times = Field(1, description="heard and spoken segments in turn")
    audio_to_text: Times = Field(1, description="heard and written segments in turn")
    audio_to_both: Times = Field(2, description="heard, and spoken with written segments in turn")

    def weights(self) -> dict[str, int]:
        return self.model_dump()


class FinetuneConfig(TrainingConfig):
    """Fine-tuning of the language model, and of Whisper if ``parts`` names it."""

    title: ClassVar[str] = "Kimi-Audio, fine-tuned"

    model: str = Field(
        description="checkpoint directory, or owner/name[@revision] on the Hugging Face hub"
    )
    data: str = Field(description="training data, JSON Lines in the published format")
    spoken_answers: bool = Field(
        False, description="learn audio-text messages of the assistant; published: never"
    )
    pretrain: bool = Field(
        False, description="data are documents of make-data, learned in the tasks of mix"
    )
    mix: MixConfig = Field(MixConfig(), description="tasks of pretrain")
    max_length: int = Field(
        4096, ge=1, description="longest sample in positions, 12.5 for a second of audio"
    )
    group_by_length: bool = Field(
        False, description="samples of similar length share a step; less padding"
    )
    feature_cache: str | None = Field(
        None, description="directory that keeps Whisper features; Whisper must be frozen"
    )
    feature_dropout: Share = Field(
        0.0, description="share of the recordings, drawn in every step, without Whisper features"
    )
    code_dropout: Share = Field(
        0.0, description="share of the recordings, drawn in every step, without speech codes"
    )
    method: Literal["full", "lora", "qlora"] = Field(
        "full", description="train the weights, or adapters; qlora: on a decoder in 4 bits"
    )
    parts: Items[Trainable] | None = Field(
        None,
        description=f"what is trained, of {', '.join(get_args(Trainable))}; by default all, or "
        f"{', '.join(ADAPTED)} with adapters",
    )
    lora: AdapterConfig = Field(AdapterConfig(), description="adapters of lora and qlora")

    @model_validator(mode="after")
    def _agrees(self) -> FinetuneConfig:
        if self.feature_cache is not None and "whisper" in self.trained_components:
            raise ValueError(
                "feature_cache: features change with a trained Whisper; leave whisper out of parts"
            )
        if not self.pretrain and self.mix != MixConfig():
            raise ValueError("mix: weighs the tasks of pretrain=true only")
        if self.pretrain and self.spoken_answers:
            raise ValueError("spoken_answers: documents have none; leave it out with pretrain")
        if self.pretrain and not any(self.mix.weights().values()):
            raise ValueError("mix: every task is learned 0 times; give one of them a weight")
        if self.feature_dropout + self.code_dropout > 1:
            raise ValueError("feature_dropout: more than 1 together with code_dropout")
        return self

    @property
    def trained_components(self) -> tuple[Trainable, ...]:
        """``parts``, or the published choice of the method."""
        if self.parts is not None:
            return self.parts
        return get_args(Trainable) if self.method == "full" else ADAPTED

    def summary(self) -> dict[str, str]:
        method = self.method if self.method == "full" else f"{self.method}, rank {self.lora.rank}"
        trained = f"{method}: {', '.join(self.trained_components)}"
        held_out = f"the first {self.eval_ratio:.0%} of the training data"
        validation = self.eval_data or (held_out if self.eval_ratio else "none")
        return {"base model": self.model, "trained": trained, "validation data": validation}

    def usage(self) -> str:
        if self.method == "full":
            return "    scripts/serve --weights THIS_DIRECTORY"
        return f"    scripts/serve --weights {self.model} --adapter THIS_DIRECTORY"


def read_config(
    kind: type[Kind],
    path: Path | None,
    assignments: Sequence[str] = (),
    check: Callable[[Mapping[str, Any]], Iterable[str]] = lambda values: (),
) -> Kind:
    """Settings from a YAML file and ``name=value`` texts, which win; values are YAML too.

    Args:
        check: further faults of the values, which may be incomplete or wrong.

    Raises:
        ConfigurationError: naming every setting that is unknown, missing, of the wrong type or
            out of range.
    """
    values, faults = _read(path, assignments)
    config = None
    try:
        config = kind(**values)
    except ValidationError as error:
        faults += explain(error, kind)
    faults += check(values)
    raise_faults(faults)
    assert config is not None, "or there is a fault"
    return config


def raise_faults(faults: Sequence[str]) -> None:
    """Raise ConfigurationError with all of ``faults``, if there are any."""
    if len(faults) > 1:
        raise ConfigurationError("\n  ".join([f"{len(faults)} settings are wrong:", *faults]))
    if faults:
        raise ConfigurationError(faults[0])


def describe(group: type[Config], prefix: str = "") -> list[str]:
    """A line for every setting: name, default, bounds and meaning."""
    lines = []
    for name, field in group.model_fields.items():
        if isinstance(field.default, Config):
            lines += describe(type(field.default), f"{prefix}{name}.")
            continue
        default: Any = "required" if field.is_required() else field.default
        if isinstance(default, tuple):
            default = ", ".join(map(str, default))
        facts = [f"{prefix}{name} [{'-' if default is None else default}]"]
        for kind in (field.annotation, *get_args(field.annotation)):
            if get_origin(kind) is Literal:
                facts.append("one of " + ", ".join(map(str, get_args(kind))))
        for key, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
            facts += [f"{sign} {getattr(m, key)}" for m in field.metadata if hasattr(m, key)]
        lines.append(f"{', '.join(facts)}: {field.description}")
    return lines


def _read(path: Path | None, assignments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What the file and the arguments give, and what is wrong with their form."""
    values: dict[str, Any] = {}
    faults: list[str] = []
    if path is not None:
        try:
            found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
            if not isinstance(found, dict):
                raise ValueError("expected settings as name: value")
            values = found
        except (OSError, ValueError, yaml.YAMLError) as error:
            faults.append(f"{path}: cannot be read ({error})")
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        *groups, leaf = name.split(".")
        if not equals:
            faults.append(f"{assignment!r}: expected name=value")
            continue
        try:
            group = values
            for part in groups:
                group = group.setdefault(part, {})
            group[leaf] = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            faults.append(f"{name}: not valid YAML ({error})")
        except (AttributeError, TypeError):
            faults.append(f"{name}: {'.'.join(groups)} is not a group of settings")
    return values, faults


class _Loader(yaml.SafeLoader):
    """Reads 1e-5, without a point, as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+|\d*\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
