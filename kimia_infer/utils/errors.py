"""Errors that a caller can correct; the message says what is wrong and what to do."""

from __future__ import annotations

import contextlib
import difflib
import reprlib
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


class ConfigurationError(ValueError):
    """The model cannot be set up as asked, or the device lacks what that takes."""


class RequestError(ValueError):
    """A request cannot be served; the message names the field, the rule and the fix."""


class RequestTimeout(RequestError):
    """An answer was not complete within the ``seconds`` that the request allowed."""

    def __init__(self, seconds: float):
        super().__init__(
            f"timeout_seconds: the answer was not complete within {seconds:g} s; allow more time, "
            "or ask for less (max_new_tokens, shorter audio or text)"
        )
        self.seconds = seconds


class RequestCancelled(RequestError):
    """The caller gave the request up while it was answered."""


class RequestOutOfMemory(RequestError):
    """A request needed more memory than the device has left; the next one can be served."""


class NoSpeech(RequestError):
    """There is nothing to say in a text, or the model did not speak any of it."""


class ServiceBusy(RequestError):
    """Too many requests wait; ``retry_ms`` is when to try again."""

    def __init__(self, waiting: int, retry_ms: int):
        super().__init__(f"busy: {waiting} requests are waiting; try again in {retry_ms} ms")
        self.retry_ms = retry_ms


def renamed(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """``error`` with the name that its message begins with replaced by that in ``names``."""
    field, _, reason = str(error).partition(": ")
    return type(error)(f"{names[field]}: {reason}") if reason and field in names else error


@contextlib.contextmanager
def renamed_as(names: Mapping[str, str]) -> Iterator[None]:
    """Let RequestErrors of the block begin with the names that a caller knows fields by."""
    try:
        yield
    except RequestError as error:
        raise renamed(error, names) from error


class WeightsError(RuntimeError):
    """The weights cannot be found, fetched or prepared; the message says what to do."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file, the tensor and the reason."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed, which on the CPU only the message says."""
    import torch  # slow, and commands raise errors without it

    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "DefaultCPUAllocator:" in str(error)


def as_request_error(error: BaseException) -> BaseException:
    """RequestOutOfMemory for a lack of memory, which is freed first; else ``error`` itself.

    The frames of the failed call let go of their tensors, and the allocator's idle memory goes
    back to the device for the next request.
    """
    if isinstance(error, RequestOutOfMemory) or not is_out_of_memory(error):
        return error
    import torch

    reason = (str(error).splitlines() or ["MemoryError"])[0]
    # Every frame on the way refers to tensors, and the traceback to the frames.
    traceback.clear_frames(error.__traceback__)
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    return RequestOutOfMemory(
        f"out of memory while answering ({reason}); send less audio, text or history, or a "
        "smaller max_new_tokens. The memory is free again for other requests"
    )


def explain(error: ValidationError, model: type[BaseModel] | None = None) -> list[str]:
    """Each fault that pydantic found, as ``field: what is expected, found ...``.

    With ``model``, a missing field comes with its description and an unknown one with a known
    name that resembles it.
    """
    return [explain_fault(fault, model) for fault in error.errors(include_url=False)]


_EXPECTED = {
    "tuple_type": "expected a list such as [a, b]",
    "too_short": "expected a list such as [a, b]",
    "model_type": "expected an object such as {name: value}",
    "string_too_short": "expected some text",
}


def place_of(fault: Mapping[str, Any], within: str = "") -> str:
    """Where a fault that pydantic found is, such as ``messages[0].role``, below ``within``."""
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in fault["loc"])
    return f"{within}{path}" if within else path.removeprefix(".")


def explain_fault(fault: Mapping[str, Any], model: type[BaseModel] | None, within: str = "") -> str:
    """One of :func:`explain`, in a value that is the field ``within`` of a larger one."""
    *groups, leaf = fault["loc"] or ("",)
    for group in groups:
        if isinstance(group, str):  # not a place in a list
            field = getattr(model, "model_fields", {}).get(group)
            model = next(_models_in(field and field.annotation), None)
    known = getattr(model, "model_fields", {})
    where = place_of(fault, within)
    if fault["type"] == "missing":
        means = leaf in known and known[leaf].description
        text = f"missing ({means})" if means else "missing"
    elif fault["type"] == "extra_forbidden":
        text = f"unknown field{suggest(str(leaf), known, where.removesuffix(str(leaf)))}"
    elif "error" in fault.get("ctx", {}):  # raised by a validator, which says everything
        text = str(fault["ctx"]["error"])
    else:
        message = fault["msg"].replace("Input should be", "expected", 1)
        text = f"{_EXPECTED.get(fault['type'], message)}, found {reprlib.repr(fault['input'])}"
    return f"{where}: {text}" if where else text


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in the type of a field, such as an optional one or a list."""
    if hasattr(annotation, "model_fields"):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def suggest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """``; did you mean audio_top_k or text_top_k?`` for ``top_k``; empty without a candidate.

    ``prefix`` goes before each.
    """
    known = list(known)
    similar = [candidate for candidate in known if candidate.endswith(f"_{name}")]
    similar = similar or difflib.get_close_matches(name, known, n=2)
    return f"; did you mean {' or '.join(prefix + s for s in similar)}?" if similar else ""
