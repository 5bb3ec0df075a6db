"""What a client can set about its session and about one response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from kimia_infer.serving.openai.errors import unsupported
from kimia_infer.serving.realtime.schema import SAMPLE_RATE, Strict, parse

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
    return Retention.model_validate(value).model_dump()


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


class ServerVad(Strict):
    """Turns begin and end where a voice does."""

    type: Literal["server_vad"] = "server_vad"
    threshold: float = Field(0.5, ge=0, le=1)
    prefix_padding_ms: int = Field(300, ge=0, le=5_000)
    silence_duration_ms: int = Field(500, ge=30, le=10_000)
    create_response: bool = True
    interrupt_response: bool = True
    idle_timeout_ms: int | None = Field(None, ge=1_000, le=600_000)


class Transcription(Strict):
    """Write down what the user says."""

    model: str | None = None
    language: str | None = None
    prompt: str | None = None


class Input(Strict):
    """Sound of the user."""

    format: Pcm = Pcm()
    transcription: Transcription | None = None
    noise_reduction: Any = None
    turn_detection: ServerVad | None = ServerVad()


class Output(Strict):
    """Speech of the model."""

    format: Pcm = Pcm()
    voice: Any = "default"
    speed: float = 1.0


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
    tools: tuple[()] = ()
    tool_choice: Any = "auto"
    tracing: Any = None
    include: list[Any] | None = None
    prompt: Any = None


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
    metadata: dict[str, str] | None = None
    tools: tuple[()] = ()
    tool_choice: Any = "auto"
    prompt: Any = None


def updated(config: SessionConfig, change: Mapping[str, Any]) -> SessionConfig:
    """``config`` with the fields that ``change`` has; objects are changed field by field.

    Raises ApiError that names the field for anything wrong or unsupported.
    """
    _refuse_unsupported(change, "session")
    detection = _at(change, "audio", "input").get("turn_detection")
    if isinstance(detection, dict) and detection.get("type") == "semantic_vad":
        raise unsupported("session.audio.input.turn_detection.type", "use 'server_vad' or null")
    if _at(change, "audio", "input").get("noise_reduction") is not None:
        raise unsupported("session.audio.input.noise_reduction", "send null")
    speed = _at(change, "audio", "output").get("speed", 1)
    if speed != 1:
        raise unsupported("session.audio.output.speed", "the model speaks at 1.0")
    if change.get("type") == "transcription":
        raise unsupported("session.type", "use 'realtime' with audio.input.transcription")
    if change.get("include"):
        raise unsupported("session.include", "leave it out")
    merged = _merged(config.model_dump(), change)
    return parse(SessionConfig, merged | {"type": change.get("type"), "tracing": None}, "session")


def response_config(value: Any) -> ResponseConfig:
    """What ``response.create`` carries; raises ApiError that names the field."""
    if isinstance(value, dict):
        _refuse_unsupported(value, "response")
    return parse(ResponseConfig, {} if value is None else value, "response")


def _refuse_unsupported(value: Mapping[str, Any], where: str) -> None:
    if value.get("tools"):
        raise unsupported(f"{where}.tools", "the model calls no tools; send an empty list")
    if value.get("tool_choice", "auto") not in ("auto", "none"):
        raise unsupported(f"{where}.tool_choice", "the model calls no tools; send 'auto'")
    if value.get("prompt") is not None:
        raise unsupported(f"{where}.prompt", "send its text as instructions")
    for name in ("reasoning", "parallel_tool_calls"):
        if value.get(name) is not None:
            raise unsupported(f"{where}.{name}", "leave it out")


def _at(value: Any, *names: str) -> Mapping[str, Any]:
    """The object below ``names``; an empty one where there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _merged(old: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for name, value in change.items():
        before = old.get(name)
        both = isinstance(before, dict) and isinstance(value, dict) and name != "truncation"
        merged[name] = _merged(before, value) if both else value
    return merged
