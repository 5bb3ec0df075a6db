"""What a client can set about its session and about one response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from kimia_infer.serving.openai.errors import unsupported
from kimia_infer.serving.realtime.schema import SAMPLE_RATE, Strict, parse
from kimia_infer.utils.errors import explain

LONGEST_TEXT = 100_000
"""Characters of a text: more than any prompt of the model can hold."""

Modality = Literal["audio", "text"]
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]


def _one_modality(value: Any) -> Any:
    if isinstance(value, list | tuple) and list(value) in (["audio"], ["text"]):
        return tuple(value)
    raise ValueError("expected ['audio'], which includes its transcript, or ['text']")


def _token_limit(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value != "inf" and not (whole and 1 <= value <= 7500):
        raise ValueError("expected 'inf' or a whole number from 1 to 7500")
    return value


def _truncation(value: Any) -> Any:
    if value in ("auto", "disabled"):
        return value
    if not isinstance(value, dict):
        raise ValueError("expected 'auto', 'disabled' or {'type': 'retention_ratio', ...}")
    try:
        return Retention.model_validate(value).model_dump()
    except ValidationError as error:
        raise ValueError(explain(error, Retention)[0]) from None


def _metadata(value: dict[str, str]) -> dict[str, str]:
    fits = all(len(name) <= 64 and len(text) <= 512 for name, text in value.items())
    if len(value) > 16 or not fits:
        raise ValueError("expected at most 16 names of up to 64 characters, texts of up to 512")
    return value


Modalities = Annotated[tuple[Modality], BeforeValidator(_one_modality)]
TokenLimit = Annotated[Any, BeforeValidator(_token_limit)]


class TokenLimits(Strict):
    """How long a conversation may become before its oldest items are left out."""

    post_instructions: int = Field(ge=1)


class Retention(Strict):
    """Leave out more than has to be, so that it happens less often."""

    type: Literal["retention_ratio"]
    retention_ratio: float = Field(ge=0, le=1)
    token_limits: TokenLimits | None = None


class Pcm(Strict):
    """16 bit, little endian, one channel."""

    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[24_000] = SAMPLE_RATE


EAGERNESS_MS = {"low": 1_000, "medium": 500, "auto": 500, "high": 300}
"""Silence that ends a turn, in milliseconds, where OpenAI's model would judge by what was said."""


class ServerVad(Strict):
    """Turns begin and end where a voice does.

    ``semantic_vad``, the default of some clients, is taken for this with the silence of its
    eagerness; the session then says ``server_vad``.
    """

    type: Literal["server_vad"] = "server_vad"
    threshold: float = Field(0.5, ge=0, le=1)
    prefix_padding_ms: int = Field(300, ge=0, le=5_000)
    silence_duration_ms: int = Field(500, ge=30, le=10_000)
    create_response: bool = True
    interrupt_response: bool = True
    idle_timeout_ms: int | None = Field(None, ge=1_000, le=60_000)

    @model_validator(mode="before")
    @classmethod
    def _by_silence(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("type") != "semantic_vad":
            return value
        eagerness = value.get("eagerness", "auto")
        if eagerness not in EAGERNESS_MS:
            raise ValueError(f"eagerness: expected {', '.join(EAGERNESS_MS)}, found {eagerness!r}")
        given = {name: item for name, item in value.items() if name != "eagerness"}
        return given | {"type": "server_vad", "silence_duration_ms": EAGERNESS_MS[eagerness]}


class Transcription(Strict):
    """Write down what the user says. ``prompt`` goes before the request for a transcript."""

    model: str | None = None
    language: Literal["en", "zh"] | None = None
    prompt: Annotated[str, Field(max_length=2_000)] | None = None


class Input(Strict):
    """Sound of the user."""

    format: Pcm = Pcm()
    transcription: Transcription | None = None
    noise_reduction: None = None
    turn_detection: ServerVad | None = ServerVad()


class Output(Strict):
    """Speech of the model."""

    format: Pcm = Pcm()
    voice: Any = "default"
    speed: float = Field(1.0, ge=0.25, le=4, description="Of a voice of Kokoro")


class Audio(Strict):
    input: Input = Input()
    output: Output = Output()


class SessionConfig(Strict):
    """The session as clients see it; see :func:`updated`."""

    type: Literal["realtime"]
    model: str
    instructions: Text = ""
    output_modalities: Modalities = ("audio",)
    audio: Audio = Audio()
    max_output_tokens: TokenLimit = "inf"
    truncation: Annotated[Any, BeforeValidator(_truncation)] = "auto"
    tools: list[Any] = Field(default_factory=list, max_length=0)
    tool_choice: str = "auto"
    tracing: None = None
    prompt: None = None


Rules = Mapping[str, tuple[Sequence[Any], str]]
"""By the path of a field: the values that change nothing here, and what to do instead of others."""

NO_TOOLS = "the model calls no tools"
COMMON_RULES: Rules = {
    "tools": ([[]], f"{NO_TOOLS}; send an empty list"),
    "tool_choice": (["auto", "none"], f"{NO_TOOLS}; send 'auto'"),
    "parallel_tool_calls": ([None, True, False], "leave it out"),
    "reasoning": ([None], "leave it out"),
    "prompt": ([None], "send its text as instructions"),
    "audio.output.format.type": (["audio/pcm"], "use 'audio/pcm'"),
}
RESPONSE_RULES = COMMON_RULES
SESSION_RULES: Rules = {
    **COMMON_RULES,
    "type": (["realtime"], "use 'realtime' with audio.input.transcription"),
    "include": ([None, []], "leave it out"),
    "audio.input.format.type": (["audio/pcm"], "use 'audio/pcm'"),
    "audio.input.noise_reduction": ([None], "send null"),
    "audio.input.turn_detection.type": (
        ["server_vad", "semantic_vad"],
        "use 'server_vad' or null",
    ),
    "audio.input.transcription.keywords": ([None], "name them in prompt"),
    "audio.input.transcription.languages": ([None], "name one in language"),
    "audio.input.transcription.delay": ([None], "leave it out"),
}
MEANINGLESS = ("parallel_tool_calls", "reasoning", "include")


class ResponseOutput(Strict):
    format: Pcm = Pcm()
    voice: Any = None


class ResponseAudio(Strict):
    output: ResponseOutput = ResponseOutput()


class ResponseConfig(Strict):
    """What ``response.create`` says of one response; None is as in the session."""

    instructions: Text | None = None
    output_modalities: Modalities | None = None
    audio: ResponseAudio = ResponseAudio()
    max_output_tokens: TokenLimit | None = None
    conversation: Literal["auto", "none"] = "auto"
    input: list[dict[str, Any]] | None = None
    metadata: Annotated[dict[str, str], AfterValidator(_metadata)] | None = None
    tools: list[Any] = Field(default_factory=list, max_length=0)
    tool_choice: str = "auto"
    prompt: None = None


def updated(config: SessionConfig, change: Mapping[str, Any]) -> SessionConfig:
    """``config`` with the fields that ``change`` has; objects are changed field by field.

    ``tracing`` stays null: nobody collects traces here, and conversations are the same without.
    Raises ApiError that names the field for anything wrong or unsupported.
    """
    _refuse_unsupported(change, SESSION_RULES, "session")
    merged = _merged(config.model_dump(), _known(change)) | {"tracing": None}
    if "type" not in change:
        del merged["type"]
    return parse(SessionConfig, merged, "session")


def response_config(value: Any) -> ResponseConfig:
    """What ``response.create`` carries; raises ApiError that names the field."""
    if not isinstance(value, dict):
        return parse(ResponseConfig, {} if value is None else value, "response")
    _refuse_unsupported(value, RESPONSE_RULES, "response")
    return parse(ResponseConfig, _known(value), "response")


def _refuse_unsupported(value: Mapping[str, Any], rules: Rules, where: str) -> None:
    for path, (accepted, advice) in rules.items():
        *groups, name = path.split(".")
        found: Any = value
        for group in groups:
            found = found.get(group) if isinstance(found, dict) else None
        if isinstance(found, dict) and name in found and found[name] not in accepted:
            raise unsupported(f"{where}.{path}", advice)


def _known(value: Mapping[str, Any]) -> dict[str, Any]:
    """Without what means nothing here."""
    return {name: item for name, item in value.items() if name not in MEANINGLESS}


def _merged(old: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for name, value in change.items():
        before = old.get(name)
        both = isinstance(before, dict) and isinstance(value, dict) and name != "truncation"
        merged[name] = _merged(before, value) if both else value
    return merged
