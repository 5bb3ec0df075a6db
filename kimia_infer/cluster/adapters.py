"""Several adapters on one replica: the model with each is loaded when it is asked for.

Ray sends a request to a replica that has the adapter already, if there is one, by a header that
says which: ``serve_multiplexed_model_id: NAME``.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterator
from pathlib import Path

from ray import serve
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.serving.openai.app import create_app
from kimia_infer.serving.openai.errors import ApiError, response_to
from kimia_infer.serving.openai.service import Service, presented_key
from kimia_infer.serving.openai.state import State
from kimia_infer.utils.errors import ConfigurationError

HEADER = "serve_multiplexed_model_id"
"""Ray's name; with dashes it means the same."""


def names_of(directory: str | None) -> tuple[str, ...]:
    """Names of the adapters in ``directory``, those of its directories; None has none.

    Raises ConfigurationError if it has none, or is no directory.
    """
    if directory is None:
        return ()
    found = Path(directory).glob("*/adapter_config.json")
    names = tuple(sorted(path.parent.name for path in found))
    if not names:
        raise ConfigurationError(
            f"adapters: expected a directory of adapters (NAME/adapter_config.json), found "
            f"{directory!r}"
        )
    return names


class AdaptedApps:
    """The servers of a replica that are loaded at the moment, one for each adapter.

    They share the files, voices and Kokoro of ``service``, and ``state``.
    """

    def __init__(
        self, service: Service, weights: str, directory: str | None, loaded: int, state: State
    ):
        self.names = names_of(directory)
        self._service, self._weights, self._state = service, weights, state
        self._directory = directory
        self._loaded: weakref.WeakSet[Service] = weakref.WeakSet()

        # Of a function: where Ray keeps what is loaded, a bound method has no place for it.
        async def load(name: str) -> ASGIApp:
            return await asyncio.to_thread(self._create, name)

        self._app = serve.multiplexed(max_num_models_per_replica=loaded)(load)

    @property
    def services(self) -> Iterator[Service]:
        return iter(self._loaded)

    def _create(self, name: str) -> ASGIApp:
        assert self._directory is not None
        settings = self._service.settings.model_copy(
            update={
                "adapter": str(Path(self._directory) / name),
                "model_names": (name, *self._service.settings.model_names),
            }
        )
        arguments = settings.model_arguments() | {"kokoro": self._service.model.kokoro}
        model = KimiAudio(self._weights, **arguments)
        service = Service(model, settings, None, self._state, self._service.uploads)
        self._loaded.add(service)
        return create_app(service)

    def _known(self, connection: HTTPConnection) -> bool:
        """Whether a request has a key of this server or a client secret, if it takes any."""
        try:
            self._service.caller(connection)
        except ApiError:
            return self._service.secrets.find(presented_key(connection)) is not None
        return True

    def beside(self, app: ASGIApp) -> ASGIApp:
        """``app`` for requests that name no adapter, and else that of the adapter.

        Nothing is loaded for those that may not be made: ``app`` refuses them.
        """

        async def choose(scope: Scope, receive: Receive, send: Send) -> None:
            name = "" if scope["type"] == "lifespan" else serve.get_multiplexed_model_id()
            if not name or not self._known(HTTPConnection(scope)):
                await app(scope, receive, send)
            elif name not in self.names:
                known = ", ".join(self.names)
                text = f"{HEADER}: there is no adapter {name[:60]!r} here; there are {known}"
                error = ApiError(404, text, HEADER, "model_not_found")
                await response_to(error)(scope, receive, send)
            else:
                await (await self._app(name))(scope, receive, send)

        return choose
