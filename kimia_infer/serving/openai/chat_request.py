"""The body of a chat completion: its fields, and which of OpenAI's the model cannot honour."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from kimia_infer.api.parameters import HIGHEST_SEED, Parameters, ServiceParameters, parse_as
from kimia_infer.audio.encode import SpeechFormat
from kimia_infer.serving.openai.errors import ApiError, unsupported
from kimia_infer.serving.openai.messages import Message
from kimia_infer.serving.openai.voices import VoiceName
from kimia_infer.utils.errors import suggest

AudioFormat = Literal["wav", "aac", "mp3", "flac", "opus", "pcm16"]

EXTENSIONS = {
    *("audio_temperature", "audio_top_k", "text_top_k", "stop_repetition"),
    *("audio_repetition_penalty", "audio_repetition_window_size"),
    *("text_repetition_penalty", "text_repetition_window_size"),
}
"""The model's own parameters, which clients may add to a body; see ServiceParameters."""

NAMES = {
    "output_type='text'": "modalities ['text']",
    "output_type='both'": "modalities ['text', 'audio']",
    "output_type": "modalities",
    "text_temperature": "temperature",
    "max_new_tokens": "max_completion_tokens",
    "voice": "audio.voice",
}
"""Fields of the body by the model's names of them."""

HARMLESS = {
    *("user", "metadata", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
}
"""Fields that would change no answer."""

INDIFFERENT: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "ask once for each answer"),
    "top_p": ((1,), "text_top_k limits the choice of tokens"),
    "frequency_penalty": ((0,), "use text_repetition_penalty"),
    "presence_penalty": ((0,), "use text_repetition_penalty"),
    "logit_bias": (({},), "the model's choice of tokens cannot be steered"),
    "logprobs": ((False,), "probabilities of tokens are not kept"),
    "top_logprobs": ((0,), "probabilities of tokens are not kept"),
    "response_format": (({"type": "text"},), "the model answers in plain text"),
    "tools": (([],), "the model calls no tools"),
    "tool_choice": (("none", "auto"), "the model calls no tools"),
    "functions": (([],), "the model calls no tools"),
    "function_call": (("none", "auto"), "the model calls no tools"),
    "store": ((False,), "nothing is stored"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "reasoning_effort": (("none",), "the model does not reason before it answers"),
    "verbosity": (("medium",), "say in a message how long answers should be"),
    "prediction": ((), "leave it out"),
    "web_search_options": ((), "the model does not search the web"),
    "moderation": ((), "answers are not moderated"),
}
"""Fields that the model cannot honour, the values that change nothing, and what to do instead."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = False
    include_obfuscation: bool | None = Field(False, description="Not used")


class AudioOptions(BaseModel):
    """The speech of an answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: AudioFormat
    voice: VoiceName | None = None


def _as_list(value: Any) -> Any:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1000)]],
    Field(max_length=4),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str] | None),
]


class ChatRequest(BaseModel):
    """The fields that are honoured. Others are checked by :meth:`check_others`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str
    messages: list[Message] = Field(min_length=1, max_length=2048)
    modalities: list[Literal["text", "audio"]] | None = Field(
        None, min_length=1, description='["text"] if unset; ["text", "audio"] for speech'
    )
    audio: AudioOptions | None = Field(None, description="What speech is asked for")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Most steps, each of a text token and, with speech, 0.08 s of it"
    )
    max_tokens: int | None = Field(None, ge=1, description="The same, by its old name")
    temperature: float | None = Field(
        None, ge=0, le=2, description="Randomness of the text; if unset 0, the likeliest tokens"
    )
    seed: int | None = Field(None, ge=0, le=HIGHEST_SEED, description="Makes an answer repeatable")
    stop: Stop = Field(default_factory=list, description="Texts that end an answer before them")

    @property
    def speaks(self) -> bool:
        return "audio" in (self.modalities or ())

    @property
    def form(self) -> SpeechFormat:
        """The format of the speech, as encoders call it."""
        assert self.audio is not None, "checked"
        return "pcm" if self.audio.format == "pcm16" else self.audio.format

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Raise ApiError for fields that contradict each other, or are not honoured."""
        self._check_others()
        if self.speaks and self.audio is None:
            raise ApiError(400, "audio: missing; say {format, voice} of the speech", "audio")
        if self.audio is not None and not self.speaks:
            text = 'audio: only with modalities ["text", "audio"]; leave it out'
            raise ApiError(400, text, "audio")
        if self.speaks and self.stop:
            raise unsupported("stop", "speech cannot be cut at a word; leave it out")
        if self.stream and self.audio is not None and self.audio.format != "pcm16":
            text = "audio.format: expected 'pcm16' when stream is true"
            raise ApiError(400, text, "audio.format")
        if self.stream_options is not None and not self.stream:
            text = "stream_options: only when stream is true; leave it out"
            raise ApiError(400, text, "stream_options")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            text = "max_tokens: leave it out beside max_completion_tokens, its other name"
            raise ApiError(400, text, "max_tokens")

    def _check_others(self) -> None:
        for name, value in (self.model_extra or {}).items():
            if value is None or name in HARMLESS | EXTENSIONS:
                continue
            if name not in INDIFFERENT:
                known = [*ChatRequest.model_fields, *EXTENSIONS, *HARMLESS, *INDIFFERENT]
                raise ApiError(400, f"{name}: unknown field{suggest(name, known)}", name)
            allowed, advice = INDIFFERENT[name]
            # True is 1 and False is 0 to Python, not to JSON.
            if not any(value == v and type(value) in (type(v), float) for v in allowed):
                raise unsupported(name, advice)

    def parameters(self, timeout: float | None, speaker: str) -> Parameters:
        """The model's parameters. Raises RequestError for extensions out of bounds."""
        longest = self.max_completion_tokens or self.max_tokens
        given = {
            "text_temperature": self.temperature,
            "seed": self.seed,
            # What exceeds the model's own limit limits nothing.
            "max_new_tokens": longest and min(longest, 7500),
            **{name: (self.model_extra or {}).get(name) for name in EXTENSIONS},
        }
        return parse_as(
            ServiceParameters,
            {name: value for name, value in given.items() if value is not None}
            | {
                "output_type": "both" if self.speaks else "text",
                "speaker": speaker,
                "preset": "low_latency" if self.stream else "quality",
                "timeout_seconds": timeout,
            },
        )
