"""Voices by name: the model's own, recordings of the server, Kokoro's, and uploaded ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Form, UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.requests import Request

from kimia_infer.api.request import Deadline
from kimia_infer.api.spoken import PREFIX, speakers, voice_of
from kimia_infer.api.voice import check_recording
from kimia_infer.models.kimi_audio.prompt import AudioInput
from kimia_infer.models.step_audio_editx.reference import load_reference
from kimia_infer.serving.openai.answers import while_connected
from kimia_infer.serving.openai.errors import ApiError, unsupported
from kimia_infer.serving.openai.service import Service, Serving
from kimia_infer.serving.openai.settings import OpenAISettings
from kimia_infer.serving.openai.voice_store import LARGEST, LONGEST_WORDS, require_size
from kimia_infer.utils.errors import ConfigurationError, RequestError, renamed_as

DEFAULT = "default"
STOCK_NAMES = {
    *("alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx"),
    *("sage", "shimmer", "verse"),
}
"""OpenAI's voices. Clients send one of them where their users chose none: the model's own speaks,
unless there is a recording of that name."""

routes = APIRouter()


class VoiceId(BaseModel):
    id: str


def _name_of(value: Any) -> Any:
    """The name in an object that has nothing else."""
    return value["id"] if isinstance(value, dict) and set(value) == {"id"} else value


VoiceName = Annotated[str, BeforeValidator(_name_of, json_schema_input_type=str | VoiceId)]
"""A field of a body: the name of a voice, or an object with it as ``id``."""


@dataclass(frozen=True)
class Voice:
    """A recording whose timbre is asked for, or a speaker of Kokoro; neither is the model's own."""

    recording: AudioInput | None = None
    speaker: str = ""


@routes.get("/audio/voices")
async def voices(request: Request, service: Serving) -> dict[str, Any]:
    """The model's own voice, recordings, Kokoro's voices, and what the caller has uploaded."""
    own = {} if service.model.detokenizer is None else {DEFAULT: service.created}
    usable = own or service.editor is not None
    for name, path in recordings(service.settings).items() if usable else ():
        own[name] = int(path.stat().st_mtime)
    entries = [described(name, t, type="audio_sample") for name, t in own.items()]
    if (kokoro := service.model.kokoro) is not None:
        entries += [
            described(name, service.created, type="kokoro", language=language)
            for name, language in speakers(kokoro).items()
        ]
    entries += [voice.described for voice in service.voices.owned_by(service.caller(request))]
    return {"object": "list", "data": entries}


class VoiceForm(BaseModel):
    model_config = ConfigDict(extra="forbid")

    audio_sample: Annotated[UploadFile, Field(description="0.5 to 30 s of one person, 16 kHz up")]
    name: str = Field(min_length=1, max_length=100)
    consent: str = Field("", description="Of OpenAI's API; not looked at")
    type: str = "audio_sample"
    ref_text: str = Field(
        "",
        max_length=LONGEST_WORDS,
        description="What is said in audio_sample; the model writes it down if it is left out",
    )


@routes.post("/audio/voices")
async def upload(
    request: Request,
    service: Serving,
    form: Annotated[VoiceForm, Form(media_type="multipart/form-data")],
) -> dict[str, Any]:
    """Keep a recording as a voice for Step-Audio-EditX and the model."""
    if service.editor is None:
        raise unsupported("audio_sample", "this server has no Step-Audio-EditX (--editx)")
    if form.type != "audio_sample":
        raise unsupported("type", "voices are made from recordings; send audio_sample")
    content = await form.audio_sample.read(LARGEST + 1)
    require_size("audio_sample", len(content))

    def check(deadline: Deadline) -> None:
        with renamed_as({"audio": "audio_sample"}):
            load_reference(content, check=deadline.check)

    await while_connected(request, service.answers.call(check))
    owner, words = service.caller(request), form.ref_text.strip()
    return service.voices.add(owner, form.name, content, words).described


@routes.delete("/audio/voices/{name}")
async def remove(request: Request, service: Serving, name: str) -> dict[str, Any]:
    if not service.voices.remove(service.caller(request), name):
        raise ApiError(404, f"there is no uploaded voice {name[:60]!r} of yours", None, "not_found")
    return {"id": name, "object": "audio.voice.deleted", "deleted": True}


def described(name: str, created: int, **fields: str) -> dict[str, Any]:
    return {"id": name, "object": "audio.voice", "name": name, "created_at": created, **fields}


def read_voice(service: Service, value: Any, param: str) -> Voice:
    """The voice that is asked for.

    ``value`` is a name, an object with a name as its ``id``, or None. Raises ApiError naming
    ``param`` for anything else, and for a voice that there is not.
    """
    if value is None:
        return Voice()
    name = value.get("id") if isinstance(value, dict) else value
    own = recordings(service.settings)
    if not isinstance(name, str):
        text = f"{param}: expected the name of a voice, or an object with it as id"
        raise ApiError(400, text, param, "invalid_value")
    if name in own:
        return Voice(recording=str(own[name]))
    if uploaded := service.voices.find(name):
        return Voice(recording=uploaded.content)
    if name == DEFAULT or name in STOCK_NAMES:
        return Voice()
    kokoro = service.model.kokoro
    if name.startswith(PREFIX):
        try:
            voice_of(kokoro, name)
        except RequestError as error:
            text = f"{param}: {str(error).removeprefix('speaker: ')}"
            raise ApiError(400, text, param, "invalid_value") from error
        return Voice(speaker=name)
    known = [DEFAULT, *own, f"OpenAI's names for {DEFAULT}"]
    if kokoro is not None:
        near = name if name in kokoro.voices.names else "af_heart"
        known.append(f"those of Kokoro, such as {PREFIX}{near}")
    *others, last = known
    text = f"{param}: there is no voice {name[:60]!r} here; this server has "
    raise ApiError(400, f"{text}{', '.join(others)}, and {last}", param, "invalid_value")


def recordings(settings: OpenAISettings) -> dict[str, Path]:
    """The files of KIMI_AUDIO_VOICES, by their names without ``.wav``."""
    if settings.voices is None:
        return {}
    return {path.stem: path for path in sorted(Path(settings.voices).glob("*.wav"))}


def check_voices(settings: OpenAISettings) -> None:
    """Raise ConfigurationError if a file of KIMI_AUDIO_VOICES is no recording of a voice."""
    for path in recordings(settings).values():
        try:
            check_recording(path)
        except RequestError as error:
            raise ConfigurationError(f"KIMI_AUDIO_VOICES: {error}") from error
