"""Checking what clients send: one clear error that names the field."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from kimia_infer.serving.openai.errors import ApiError, as_api_error
from kimia_infer.serving.openai.messages import decode_base64
from kimia_infer.utils.errors import RequestError, explain_fault, place_of

log = logging.getLogger(__name__)

SAMPLE_RATE = 24_000
"""Samples per second of sound in both directions."""

SAMPLE_BYTES = 2
"""Sound is 16 bit, little endian, one channel."""

CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
"""OpenAI's words for kinds of faults."""


class Strict(BaseModel):
    """An object of the protocol: nothing is converted, and unknown fields are faults."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], value: Any, where: str = "") -> Model:
    """``value`` as ``model``; raises ApiError that names the field below ``where``."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        text, param = explain_fault(fault, model, where), place_of(fault, where) or None
        raise ApiError(400, text, param, CODES.get(fault["type"], "invalid_value")) from None


def as_failure(error: Exception, names: Mapping[str, str] | None = None) -> ApiError:
    """``error`` as clients are told it; ``names`` are those of ``as_api_error``.

    What is the server's fault is logged.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return as_api_error(error, names)
    log.error("A realtime session failed to do something", exc_info=error)
    return ApiError(500, "the server failed; its log says why")


def decode_sound(value: str, where: str) -> bytes:
    """The samples in base64; raises ApiError that names the field ``where``."""
    sound = decode_base64(value, where)
    if len(sound) % SAMPLE_BYTES:
        raise ApiError(
            400,
            f"{where}: expected whole samples of {SAMPLE_BYTES} bytes, found {len(sound)} bytes",
            where,
            "invalid_value",
        )
    return sound


def milliseconds(samples: int) -> int:
    return samples * 1000 // SAMPLE_RATE


def samples_in(milliseconds: int) -> int:
    return milliseconds * SAMPLE_RATE // 1000
