"""Settings of a training run: one YAML file and ``name=value`` arguments, checked strictly."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

Part = Literal["embedding", "trunk", "mimo", "adaptor", "heads", "whisper"]
LinearLayers = Literal["attention", "feed_forward"]
Settings = TypeVar("Settings")


class ConfigError(ValueError):
    """A setting is unknown, missing or out of range; the message names it."""


def option(
    help: str, default: Any = MISSING, least: float | None = None, most: float | None = None
) -> Any:
    """A field with a help text and the inclusive range of its values."""
    return field(default=default, metadata={"help": help, "least": least, "most": most})


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What every training run has."""

    output: str = option("directory of the run: checkpoints, logs, final model")
    seed: int = option("of data order, dropout and new weights", 0, 0)
    device: Literal["cpu"] | None = option("the accelerator if there is one; or cpu", None)
    precision: Literal["bf16", "fp32"] | None = option(
        "of the computation; bf16 on accelerators, fp32 on the CPU. Weights that are trained "
        "are always kept in fp32",
        None,
    )
    epochs: int = option("passes over the training data", 5, 1)
    max_steps: int | None = option("end after this many steps instead", None, 1)
    batch_size: int = option("samples per process and forward pass", 1, 1)
    accumulation: int = option("forward passes per step", 1, 1)
    learning_rate: float = option("largest of the schedule", 1e-5, 0.0)
    warmup_ratio: float = option("part of the steps over which the rate rises", 0.01, 0.0, 1.0)
    weight_decay: float = option("of matrices; biases and norms have none", 0.1, 0.0)
    beta1: float = option("of AdamW", 0.9, 0.0, 0.9999)
    beta2: float = option("of AdamW", 0.95, 0.0, 0.9999)
    epsilon: float = option("of AdamW", 1e-8, 0.0)
    max_grad_norm: float | None = option("gradients are scaled down to this norm", 1.0, 1e-6)
    gradient_checkpointing: bool = option("recompute activations; less memory, slower", True)
    workers: int = option("processes that read data, per training process; 0: none", 2, 0)
    eval_every: int | None = option("steps between evaluations; an epoch", None, 1)
    save_every: int | None = option("steps between checkpoints; an epoch", None, 1)
    keep_checkpoints: int = option("checkpoints kept; older ones are deleted", 2, 1)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Adapters of low rank."""

    rank: int = option("of the adapters", 8, 1)
    alpha: float = option("adapters are scaled by alpha / rank", 16.0, 0.0)
    dropout: float = option("of what enters an adapter", 0.05, 0.0, 1.0)
    layers: tuple[LinearLayers, ...] = option(
        "which linear layers of the trunk, MIMO branch and Whisper", ("attention", "feed_forward")
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TrainingSettings):
    """Fine-tuning of the language model, and of Whisper if its part is named."""

    model: str = option("checkpoint directory, or owner/name[@revision] on the hub")
    data: str = option("training data, JSONL in the published format")
    eval_data: str | None = option("evaluation data; without, the first lines of data", None)
    eval_ratio: float = option(
        "lines of data that are for evaluation, at least one", 0.05, 0.0, 0.9
    )
    audio_root: str = option("relative audio paths begin here", ".")
    bad_lines: Literal["stop", "skip"] = option("what to do if lines cannot be used", "stop")
    spoken_answers: bool = option(
        "learn audio-text messages of the assistant as they are generated; published: never", False
    )
    max_length: int = option("longest sample in positions (12.5 per second)", 4096, 1)
    group_by_length: bool = option("samples of similar length share a step; less padding", False)
    feature_cache: str | None = option(
        "directory for the Whisper features of all sounds, computed once; Whisper has to be frozen",
        None,
    )
    feature_dropout: float = option(
        "part of the sounds, drawn in every step, whose Whisper features are zeroed", 0.0, 0.0, 1.0
    )
    code_dropout: float = option(
        "part of the sounds, drawn in every step, whose speech codes are blanked", 0.0, 0.0, 1.0
    )
    method: Literal["full", "lora", "qlora"] = option(
        "train the weights themselves, or adapters; qlora: the decoder is frozen in 4 bits", "full"
    )
    parts: tuple[Part, ...] | None = option(
        "what is trained, the rest is frozen; full: everything, else: trunk, mimo, adaptor, heads",
        None,
    )
    lora: LoraSettings = field(
        default_factory=LoraSettings, metadata={"help": "adapters of methods lora and qlora"}
    )

    def __post_init__(self) -> None:
        if self.feature_cache is not None and "whisper" in self.trained_parts:
            raise ConfigError(
                "feature_cache: features change with a trained Whisper; leave whisper out of parts"
            )
        if self.feature_dropout + self.code_dropout > 1:
            raise ConfigError("feature_dropout: more than 1 together with code_dropout")

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """``parts``, or the published choice of the method."""
        if self.parts is not None:
            return self.parts
        return typing.get_args(Part) if self.method == "full" else LORA_PARTS


LORA_PARTS = ("trunk", "mimo", "adaptor", "heads")


def read_settings(
    kind: type[Settings], path: Path | None, assignments: Sequence[str] = ()
) -> Settings:
    """Settings from a YAML file and ``name=value`` texts, which win; values are YAML too.

    Raises:
        ConfigError: naming the setting that is unknown, missing, of the wrong type or out of
            range.
    """
    values = _read_yaml(path) if path is not None else {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{assignment!r}: expected name=value")
        place = values
        *groups, leaf = name.split(".")
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{name}: {group} is not a group of settings")
        place[leaf] = _parse_yaml(text, name)
    return from_dict(kind, values)


def from_dict(kind: type[Settings], values: dict, prefix: str = "") -> Settings:
    """The dataclass ``kind`` from plain values. Raises ConfigError."""
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ConfigError(f"{prefix}{name}: unknown setting{hint}")
    hints = typing.get_type_hints(kind)
    settings = {}
    for name, entry in known.items():
        if name in values:
            settings[name] = _convert(hints[name], values[name], f"{prefix}{name}")
            _check_range(entry, settings[name], f"{prefix}{name}")
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise ConfigError(f"{prefix}{name}: missing ({entry.metadata['help']})")
    return kind(**settings)


def to_dict(settings: Any) -> dict:
    """Plain values that :func:`from_dict` turns back."""
    values = {}
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        values[entry.name] = list(value) if isinstance(value, tuple) else value
    return values


def describe(kind: type, prefix: str = "") -> list[str]:
    """One line for every setting: name, default and meaning."""
    lines, hints = [], typing.get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        name = f"{prefix}{entry.name}"
        if dataclasses.is_dataclass(hints[entry.name]):
            lines += describe(hints[entry.name], f"{name}.")
            continue
        default = "required" if entry.default is MISSING else _show(entry.default)
        lines.append(f"{name} [{default}]: {entry.metadata['help']}")
    return lines


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _read_yaml(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected settings as name: value")
    return values


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML ({error})") from error


def _convert(hint: Any, value: Any, name: str) -> Any:
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = [choice for choice in choices if choice is not types.NoneType]
        return _convert(hint, value, name)
    if origin is Literal:
        if value in choices:
            return value
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, found {value!r}")
    if origin is tuple:
        if not isinstance(value, list) or not value:
            raise ConfigError(f"{name}: expected a list such as [a, b], found {value!r}")
        return tuple(_convert(choices[0], item, name) for item in value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{name}: expected a group of settings, found {value!r}")
        return from_dict(hint, value, f"{name}.")
    return _convert_plain(hint, value, name)


def _convert_plain(hint: type, value: Any, name: str) -> Any:
    if hint is float and not isinstance(value, bool):
        try:  # YAML reads 1e-5, without a point, as text
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif type(value) is hint:
        return value
    raise ConfigError(f"{name}: expected {hint.__name__}, found {value!r}")


def _check_range(entry: Field, value: Any, name: str) -> None:
    least, most = entry.metadata.get("least"), entry.metadata.get("most")
    if value is None or (least is None and most is None):
        return
    if least is not None and value < least:
        raise ConfigError(f"{name}: {value} is less than {least}")
    if most is not None and value > most:
        raise ConfigError(f"{name}: {value} is more than {most}")
