"""One memory of clients for all replicas: an actor that holds the State of their server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import ray
from ray.actor import ActorHandle

from kimia_infer.serving.openai import voice_store
from kimia_infer.serving.openai.state import State
from kimia_infer.serving.realtime import secret_store

NAME, NAMESPACE = "kimi-audio-state", "kimi-audio"

HEAD = {"node:__internal_head__": 0.001}
"""A resource that the head node alone has: others come and go with the load."""

RETRIES = 3


class Holder:
    """What the actor runs: one call after another, so that nothing needs a lock."""

    def __init__(self) -> None:
        self._state = State()

    def created(self) -> int:
        return self._state.created

    def call(self, part: str, method: str, args: tuple[Any, ...]) -> tuple[Any, Exception | None]:
        """What a method of a part of the State returns, or the error that it raises."""
        try:
            return getattr(getattr(self._state, part), method)(*args), None
        except Exception as error:
            return None, error


class _Part:
    """The methods of one part of the State, which wait for the actor: about a millisecond.

    ``find`` looks only for names that begin with ``prefix``.
    """

    def __init__(self, holder: ActorHandle, name: str, prefix: str = ""):
        self._holder, self._name, self._prefix = holder, name, prefix

    def find(self, name: str, *args: Any) -> Any:
        return self._call("find", name, *args) if name.startswith(self._prefix) else None

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *args: self._call(method, *args)

    def _call(self, method: str, *args: Any) -> Any:
        # Not ray.get, which warns of waiting in a thread that has an event loop.
        answer = self._holder.call.remote(self._name, method, args).future().result()
        value, error = answer
        if error is not None:
            raise error
        return value


def shared_state() -> State:
    """The State of the cluster, which lasts as long as it does; made by whoever is first."""
    holder = (
        ray.remote(Holder)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            resources=HEAD,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        .remote()
    )
    return State(
        replies=cast(Any, _Part(holder, "replies")),
        voices=cast(Any, _Part(holder, "voices", voice_store.PREFIX)),
        secrets=cast(Any, _Part(holder, "secrets", secret_store.PREFIX)),
        limiter=cast(Any, _Part(holder, "limiter")),
        created=holder.created.remote().future().result(),
    )
