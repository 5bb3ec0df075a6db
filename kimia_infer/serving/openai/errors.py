"""Errors in OpenAI's form."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse, Response

from kimia_infer.utils.errors import (
    RequestCancelled,
    RequestError,
    RequestOutOfMemory,
    RequestTimeout,
    ServiceBusy,
)

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(HTTPException):
    """An answer with an HTTP status and OpenAI's error object.

    ``param`` names the field of the request, ``code`` is a word for programs. The client tries
    408, 409, 429 and 5xx again unless ``retry`` is False.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        *,
        retry: bool = True,
        headers: Mapping[str, str] | None = None,
    ):
        again = {} if retry else {"x-should-retry": "false"}
        super().__init__(status, _sendable(message), {**(headers or {}), **again})
        self.param, self.code = param and _sendable(param), code

    def __str__(self) -> str:
        return str(self.detail)

    @property
    def error(self) -> dict[str, Any]:
        """The value of ``error`` in the body, which events of streams have, too."""
        kind = KINDS.get(self.status_code, "invalid_request_error")
        return {"message": self.detail, "type": kind, "param": self.param, "code": self.code}


def _sendable(text: str) -> str:
    """``text`` with the halves of surrogate pairs, which UTF-8 cannot have, as ``?``."""
    return text.encode(errors="replace").decode()


def response_to(error: ApiError) -> Response:
    return JSONResponse({"error": error.error}, error.status_code, error.headers)


def too_many(message: str, retry_ms: int, code: str) -> ApiError:
    """The refusal of a request that can be made again in ``retry_ms`` milliseconds."""
    headers = {"retry-after-ms": str(retry_ms), "retry-after": str(math.ceil(retry_ms / 1000))}
    return ApiError(429, message, code=code, headers=headers)


def no_room(error: OSError) -> ApiError:
    """The refusal of a body that cannot be stored."""
    text = f"the server cannot store what was sent ({error.strerror})"
    return ApiError(503, text, code="no_room")


def unsupported(param: str, advice: str) -> ApiError:
    """The refusal of a field that OpenAI's API has and this model cannot honour."""
    return ApiError(400, f"{param}: not supported; {advice}", param, "unsupported_parameter")


def as_api_error(error: RequestError, names: Mapping[str, str] | None = None) -> ApiError:
    """``error`` with its HTTP status; ``names`` are fields of the request by the model's names.

    Messages begin with the model's name of a field, ``text_temperature: expected ...``.
    """
    message = str(error)
    for own, name in (names or {}).items():
        message = re.sub(rf"(?<!\w){re.escape(own)}(?!\w)", name, message)
    match error:
        case ServiceBusy():
            return too_many(message, error.retry_ms, "server_busy")
        case RequestTimeout():
            text = (
                f"the answer was not complete within {error.seconds:g} s, the limit of this "
                "server; send shorter audio or text, or ask for fewer tokens"
            )
            return ApiError(408, text, code="timeout", retry=False)
        case RequestOutOfMemory():
            return ApiError(503, message, code="out_of_memory")
        case RequestCancelled():
            return ApiError(499, message, code="cancelled", retry=False)
    field = re.match(r"([\w.\[\]-]+): ", message)
    return ApiError(400, message, field and field[1], "invalid_value")
