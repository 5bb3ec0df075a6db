"""The parameters of a request, declared once: types, bounds, defaults and help texts.

The library, the service, the command lines and the evaluation take their parameters from these
models. The module imports neither PyTorch nor anything else that is slow, so that a command line
can check its arguments before the model's code is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kimia_infer.utils.errors import RequestError, suggest

if TYPE_CHECKING:
    from kimia_infer.layers.sampler import Sampling

BUDGETS = {"both": 1500, "text": 7500}
"""Positions that prompt and answer may fill together, as published: 120 s at 12.5 codes per
second with speech, and a fixed number of tokens without."""

MAX_SLOTS = 32
"""Requests that can run at a time."""

CONTEXT = 8192
"""Positions of the model (published configuration)."""

CODES_PER_SECOND = 12.5
UNLIMITED = -1

OutputType = Annotated[
    Literal["text", "both"],
    Field(
        description="Answer with text only, or with text and speech; transcripts are always text"
    ),
]
AudioTemperature = Annotated[
    float, Field(ge=0, description="Randomness of the speech; 0 always takes the most likely code")
]
AudioTopK = Annotated[int, Field(description="Speech codes to choose from at each step; 0 for all")]
TextTemperature = Annotated[
    float, Field(ge=0, description="Randomness of the text; 0 always takes the most likely token")
]
TextTopK = Annotated[int, Field(description="Text tokens to choose from at each step; 0 for all")]
AudioPenalty = Annotated[
    float, Field(description="Makes recent speech codes less likely; 1 for no penalty")
]
AudioWindow = Annotated[int, Field(ge=0, description="Speech codes that count as recent")]
TextPenalty = Annotated[
    float, Field(description="Makes recent text tokens less likely; 1 for no penalty")
]
TextWindow = Annotated[int, Field(ge=0, description="Text tokens that count as recent")]
MaxNewTokens = Annotated[
    int,
    Field(
        ge=UNLIMITED,
        description="Maximum steps (12.5 per second of speech); -1 for no limit, 0 is refused",
    ),
]
HIGHEST_SEED = 4294967295
"""``MAX_SEED`` of ``layers.sampler``, whose import takes PyTorch."""
Seed = Annotated[
    int | None,
    Field(
        ge=0,
        le=HIGHEST_SEED,
        description="Makes an answer repeatable; if unset, one is drawn and returned as a metric",
    ),
]
Speaker = Annotated[
    str,
    Field(
        max_length=300,
        description="Kokoro's voice for the answer, as kokoro:af_heart; the model's own if unset",
    ),
]
Speed = Annotated[
    float, Field(ge=0.25, le=4.0, description="How fast a speaker of Kokoro speaks; 1 is normal")
]
Preset = Annotated[
    Literal["low_latency", "quality"],
    Field(description="Speak early with small chunks first, or use the published chunk sizes"),
]


def whole_float(value: Any) -> Any:
    """``value``, or the integer that it is (``3.0``), as JSON clients send them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Parameters(BaseModel):
    """What a call of the library asks for besides its messages, with the published defaults.

    As published, a ``top_k`` of 0 or less draws from the whole vocabulary, and a repetition
    penalty of 1 or less does nothing. Integers may arrive as whole floats (``3.0``), as JSON
    clients send them.

    Use :func:`parse_parameters` to create one: its errors are RequestErrors.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    output_type: OutputType = "text"
    audio_temperature: AudioTemperature = 0.0
    audio_top_k: AudioTopK = 5
    text_temperature: TextTemperature = 0.0
    text_top_k: TextTopK = 5
    audio_repetition_penalty: AudioPenalty = 1.0
    audio_repetition_window_size: AudioWindow = 64
    text_repetition_penalty: TextPenalty = 1.0
    text_repetition_window_size: TextWindow = 16
    max_new_tokens: MaxNewTokens = UNLIMITED
    seed: Seed = None
    preset: Preset = "quality"
    speaker: Speaker = ""
    speed: Speed = 1.0
    stop_repetition: bool = Field(
        False, description="End an answer whose text repeats itself endlessly; one copy is kept"
    )
    timeout_seconds: float | None = Field(
        None,
        gt=0,
        description="Maximum seconds that the answer may take; none for no limit",
        json_schema_extra={"unit": "seconds"},
    )

    @field_validator(
        "audio_top_k",
        "audio_repetition_window_size",
        "text_top_k",
        "text_repetition_window_size",
        "max_new_tokens",
        "seed",
        mode="before",
    )
    @classmethod
    def _whole_float(cls, value: Any) -> Any:
        return whole_float(value)

    @field_validator("max_new_tokens")
    @classmethod
    def _at_least_one(cls, value: int) -> int:
        if value == 0:
            raise ValueError("expected -1 (no limit) or at least 1")
        return value

    @property
    def sampling(self) -> Sampling:
        """How the tokens of both tracks are chosen."""
        # Only a process that generates needs PyTorch.
        from kimia_infer.layers.sampler import Sampling, TrackSampling

        audio = TrackSampling(
            self.audio_temperature,
            max(self.audio_top_k, 0),
            self.audio_repetition_penalty,
            self.audio_repetition_window_size,
        )
        text = TrackSampling(
            self.text_temperature,
            max(self.text_top_k, 0),
            self.text_repetition_penalty,
            self.text_repetition_window_size,
        )
        return Sampling(audio=audio, text=text)

    @property
    def max_audio_seconds(self) -> float:
        """Length of audio that fills the budget alone; longer audio need not be decoded."""
        return BUDGETS[self.output_type] / CODES_PER_SECOND

    @property
    def budget_explained(self) -> str:
        return (
            f"prompt and answer together may fill {BUDGETS[self.output_type]} of the model's "
            f"{CONTEXT} positions with output_type={self.output_type!r}; one second of audio "
            f"fills {CODES_PER_SECOND}"
        )

    def step_limit(self, prompt_length: int) -> int:
        """Steps that may be generated; raises RequestError if the prompt leaves none."""
        budget = BUDGETS[self.output_type]
        left = budget - prompt_length
        if left <= 0:
            raise RequestError(
                f"chats: the prompt needs {prompt_length} positions ({self.budget_explained}); "
                "shorten audio or history, or transcribe a long recording in segments"
            )
        return left if self.max_new_tokens == UNLIMITED else min(self.max_new_tokens, left)


class ServiceParameters(Parameters):
    """The same parameters as a service offers them: defaults for speech, and upper bounds."""

    output_type: OutputType = "both"
    audio_temperature: Annotated[AudioTemperature, Field(le=2.0)] = 0.8
    audio_top_k: Annotated[AudioTopK, Field(ge=0, le=1000)] = 10
    text_temperature: Annotated[TextTemperature, Field(le=2.0)] = 0.0
    text_top_k: Annotated[TextTopK, Field(ge=0, le=1000)] = 5
    audio_repetition_penalty: Annotated[AudioPenalty, Field(ge=1.0, le=2.0)] = 1.0
    audio_repetition_window_size: Annotated[AudioWindow, Field(ge=1, le=1500)] = 64
    text_repetition_penalty: Annotated[TextPenalty, Field(ge=1.0, le=2.0)] = 1.0
    text_repetition_window_size: Annotated[TextWindow, Field(ge=1, le=7500)] = 16
    max_new_tokens: Annotated[MaxNewTokens, Field(le=7500)] = UNLIMITED


Model = TypeVar("Model", bound=BaseModel)


def parse_parameters(**values: Any) -> Parameters:
    """Check the arguments of ``generate``.

    Raises:
        RequestError: naming the parameter, what is expected and what was found; for an unknown
            name, the real names that resemble it.
    """
    return parse_as(Parameters, values)


def parse_as(model: type[Model], values: Mapping[str, Any]) -> Model:
    """``values`` as ``model``; raises RequestError as :func:`parse_parameters` does."""
    for name in values.keys() - model.model_fields.keys():
        raise RequestError(f"{name}: unknown parameter{suggest(name, model.model_fields)}")
    try:
        return model(**values)
    except ValidationError as error:
        raise RequestError(explain(model, error)) from None


def explain(model: type[BaseModel], error: ValidationError) -> str:
    """The first problem in one line: ``seed: expected a whole number of at least 0, found -1``."""
    first = error.errors(include_url=False)[0]
    name, *rest = first["loc"]
    where = f"{name}" + "".join(f"[{index}]" for index in rest if isinstance(index, int))
    if first["type"] == "value_error":
        expected = str(first["ctx"]["error"])
    else:
        field = model.model_json_schema()["properties"][name]
        expected = f"expected {describe(field['items'] if rest else field)}"
    length = first.get("ctx", {}).get("actual_length")
    return f"{where}: {expected}, found {show(first['input']) if length is None else length}"


def describe(schema: Mapping[str, Any]) -> str:
    """The values that a JSON schema allows: ``a number of at least 0 and at most 2.0``."""
    if "anyOf" in schema:  # a type, or null
        return describe(schema["anyOf"][0] | {"unit": schema.get("unit")})
    if "enum" in schema:
        return "one of " + ", ".join(map(repr, schema["enum"]))
    if "const" in schema:
        return repr(schema["const"])
    if schema.get("format") == "path":
        return "an uploaded file (a data URI or an http(s) URL; paths on the server are not opened)"
    nouns = {
        "string": "text",
        "integer": "a whole number",
        "number": "a finite number",
        "boolean": "true or false",
        "array": "a list",
    }
    bounds = [
        f"{words} {schema[key]}"
        for key, words in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "more than"),
            ("maximum", "at most"),
            ("maxLength", "at most"),
            ("maxItems", "at most"),
        )
        if key in schema
    ]
    if not bounds:
        return nouns[schema["type"]]
    unit = schema.get("unit") or {"string": "characters", "array": "items"}.get(schema["type"])
    return f"{nouns[schema['type']]} of {' and '.join(bounds)}{f' {unit}' if unit else ''}"


def show(value: Any) -> str:
    """A value as an error message quotes it, in at most 60 characters."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
