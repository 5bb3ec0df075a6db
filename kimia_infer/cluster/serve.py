"""The OpenAI server on Ray Serve: replicas that have a model each and remember clients together.

``import_path: kimia_infer.cluster.serve:application`` of a Serve config (serve.yaml beside this
file), or ``kimi-audio serve --ray``. The model and its server are set with the variables
``KIMI_AUDIO_...``, as everywhere.
"""

from __future__ import annotations

import os
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve import Application

from kimia_infer.cluster.adapters import AdaptedApps
from kimia_infer.cluster.gathering import Gathered, Report
from kimia_infer.cluster.state import shared_state
from kimia_infer.engine.scheduler import LONGEST_QUEUE
from kimia_infer.models.kimi_audio.checkpoint import weights_from_environment
from kimia_infer.serving.openai.app import create_app
from kimia_infer.serving.openai.models import state_of
from kimia_infer.serving.openai.server import load_service
from kimia_infer.serving.openai.settings import OpenAISettings
from kimia_infer.serving.openai.voices import check_voices
from kimia_infer.serving.process import show_log
from kimia_infer.serving.settings import read_settings
from kimia_infer.utils.errors import ConfigurationError, explain

NAME = "kimi-audio"
"""Of the application and its deployment."""

ATTEMPTS = 3
"""To start a replica, before the application counts as failed."""

HEALTH_SECONDS = 10.0
HEALTH_TIMEOUT = 30.0

MOST_REQUESTS = 2 * LONGEST_QUEUE
"""Requests and sessions of a replica, which itself refuses what is too much for its queue."""


class Scale(BaseModel):
    """How many replicas there are, and what each one takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(1, ge=0, description="Replicas without any load")
    max_replicas: int = Field(1, ge=1, description="Replicas under load")
    requests: float = Field(
        8, gt=0, description="Running requests and sessions of a replica before there is another"
    )
    upscale_seconds: float = Field(
        30, ge=0, description="How long there must be more of them, before there is another"
    )
    downscale_seconds: float = Field(
        600, ge=0, description="How long there must be fewer of them, before there is one less"
    )
    cpus: float = Field(1, gt=0, description="CPU cores of a replica")
    gpus: float | None = Field(
        None, ge=0, description="GPUs of a replica; 1 if unset and the cluster has one, else none"
    )
    drain_seconds: float = Field(
        60,
        ge=0,
        description="How long answers and sessions of a replica that is stopped may still take",
        json_schema_extra={"unit": "seconds"},
    )
    adapters: str | None = Field(
        None, description="Directory of adapters, each a directory, which clients name in a header"
    )
    adapters_per_replica: int = Field(
        1, ge=1, description="Adapters that a replica has loaded at a time, each with a model"
    )


class Replica:
    """One model and its server, an ASGI application."""

    def __init__(self, adapters: str | None, loaded: int):
        show_log()
        settings = read_settings(OpenAISettings, os.environ)
        check_voices(settings)
        self._weights, state = weights_from_environment(), shared_state()
        self._service = load_service(self._weights, settings, state)
        self._adapters = AdaptedApps(self._service, self._weights, adapters, loaded, state)

    def __serve_build_asgi_app__(self) -> Any:
        app = create_app(self._service)
        app = self._adapters.beside(app) if self._adapters.names else app
        return Gathered(app, self.report)

    def report(self) -> Report:
        """What ``/health`` and ``/metrics`` say of this replica, without those of adapters."""
        return state_of(self._service), self._service.meters.exposition().decode()

    def check_health(self) -> None:
        """Raise RuntimeError once an engine has failed; Ray then starts another replica."""
        for service in (self._service, *self._adapters.services):
            if reason := service.model.scheduler.stopped:
                raise RuntimeError(reason)


def application(arguments: dict[str, Any]) -> Application:
    """The application of a Serve config, whose ``args`` are the fields of :class:`Scale`.

    Raises ConfigurationError naming what is wrong with them.
    """
    try:
        scale = Scale.model_validate(arguments)
    except ValidationError as error:
        raise ConfigurationError("; ".join(explain(error, Scale))) from None
    if scale.min_replicas > scale.max_replicas:
        raise ConfigurationError(
            f"min_replicas: expected at most max_replicas ({scale.max_replicas}), found "
            f"{scale.min_replicas}"
        )
    gpus = scale.gpus
    if gpus is None:
        gpus = min(1, ray.cluster_resources().get("GPU", 0))
    deployment = serve.deployment(serve.ingress()(Replica)).options(
        name=NAME,
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": gpus},
        autoscaling_config={
            "min_replicas": scale.min_replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": scale.requests,
            "upscale_delay_s": scale.upscale_seconds,
            "downscale_delay_s": scale.downscale_seconds,
        },
        max_ongoing_requests=MOST_REQUESTS,
        graceful_shutdown_timeout_s=scale.drain_seconds,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=HEALTH_TIMEOUT,
        max_constructor_retry_count=ATTEMPTS,
    )
    return deployment.bind(scale.adapters, scale.adapters_per_replica)
