"""What all endpoints share: the model, its settings, and who may use it how often."""

from __future__ import annotations

import hmac
import time
from typing import Annotated

from fastapi import Depends
from limits import RateLimitItemPerMinute
from limits.strategies import MovingWindowRateLimiter
from starlette.requests import HTTPConnection

from kimia_infer.api.editx import EditX
from kimia_infer.api.editx_request import Editor
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.engine.scheduler import LONGEST_QUEUE
from kimia_infer.serving.openai.answers import Answers
from kimia_infer.serving.openai.errors import ApiError, too_many, unsupported
from kimia_infer.serving.openai.metrics import Meters
from kimia_infer.serving.openai.settings import OpenAISettings
from kimia_infer.serving.openai.state import State
from kimia_infer.serving.process import Uploads

EDITX_NAME = "step-audio-editx"
"""What requests call Step-Audio-EditX."""


class Service:
    """A loaded model and what its server remembers and stores, which it may share with others."""

    def __init__(
        self,
        model: KimiAudio,
        settings: OpenAISettings,
        editx: EditX | None = None,
        state: State | None = None,
        uploads: Uploads | None = None,
    ):
        self.model, self.settings = model, settings
        self.answers = Answers(model.scheduler.slots + LONGEST_QUEUE, settings.timeout)
        self.uploads = uploads or Uploads()
        self.meters = Meters(model.scheduler)
        self.editor = None if editx is None else Editor(editx, model)
        state = state or State()
        self.created = state.created
        self.replies, self.voices, self.secrets = state.replies, state.voices, state.secrets
        self._access = Access(settings, state.limiter)

    @property
    def name(self) -> str:
        """What answers call the model."""
        return self.settings.model_names[0]

    def admit(self, connection: HTTPConnection) -> None:
        """Raise ApiError unless a request may be made: a wrong key, or too many in a minute."""
        self._access.admit(connection)

    @property
    def speaking(self) -> tuple[str, ...]:
        """Names of the models that make speech of texts."""
        own = self.settings.model_names
        return own if self.editor is None else (*own, EDITX_NAME)

    def caller(self, connection: HTTPConnection) -> str:
        """Who has sent an admitted request: a key, or an address where there are no keys."""
        return self._access.caller(connection)

    def check_model(self, name: str | None, param: str = "model", speech: bool = False) -> None:
        """Raise ApiError, naming ``param``, unless ``name`` is one of the model's; None is.

        For ``speech`` it may be Step-Audio-EditX.
        """
        known = self.speaking if speech else self.settings.model_names
        if name is not None and name not in known:
            raise ApiError(
                404,
                f"{param}: there is no {name!r} here; this server has {' and '.join(known)}",
                param,
                "model_not_found",
            )

    def check_speech(self, param: str, speaker: str) -> None:
        """Raise ApiError, naming ``param``, if the server was started without speech.

        A ``speaker`` of Kokoro speaks all the same.
        """
        if self.model.detokenizer is None and not speaker:
            advice = "this server writes only, as KIMI_AUDIO_OUTPUT=text says"
            if self.model.kokoro is not None:
                advice += "; choose a voice of Kokoro (/v1/audio/voices)"
            raise unsupported(param, advice)


class Access:
    """Checks keys, and counts requests by key, or by address where there are no keys."""

    def __init__(self, settings: OpenAISettings, limiter: MovingWindowRateLimiter):
        self._keys = [key.encode() for key in settings.api_keys]
        per_minute = settings.requests_per_minute
        self._rate = None if per_minute is None else RateLimitItemPerMinute(per_minute)
        self._limiter = limiter

    def admit(self, connection: HTTPConnection) -> None:
        caller = self.caller(connection)
        if self._rate is None or self._limiter.hit(self._rate, caller):
            return
        reset = self._limiter.get_window_stats(self._rate, caller).reset_time
        raise too_many(
            f"more than {self._rate.amount} requests in a minute",
            max(round(1000 * (reset - time.time())), 1),
            "rate_limit_exceeded",
        )

    def caller(self, connection: HTTPConnection) -> str:
        if not self._keys:
            return connection.client.host if connection.client else ""
        given = presented_key(connection)
        # All keys are compared, so that the time tells nothing.
        if not any([hmac.compare_digest(given.encode(), key) for key in self._keys]):
            raise ApiError(
                401,
                "Authorization: expected 'Bearer KEY' with a key of this server"
                + ("" if given else "; none was sent"),
                code="invalid_api_key",
            )
        return given


BROWSER_KEY = "openai-insecure-api-key."
"""Prefix of the WebSocket subprotocol in which browsers send the key, as OpenAI names it."""


def presented_key(connection: HTTPConnection) -> str:
    """The key in the Authorization header or, of a browser's WebSocket, among its subprotocols."""
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    for protocol in connection.scope.get("subprotocols", ()):
        if protocol.startswith(BROWSER_KEY):
            return protocol.removeprefix(BROWSER_KEY)
    return ""


def service_of(connection: HTTPConnection) -> Service:
    return connection.app.state.service


Serving = Annotated[Service, Depends(service_of)]
"""The type of a route's parameter that is the service."""
