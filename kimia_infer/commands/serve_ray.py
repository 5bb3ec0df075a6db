"""`kimi-audio serve --ray`: the OpenAI server as replicas of Ray Serve; and how Ray is started."""

from __future__ import annotations

import logging
import os
import signal
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kimia_infer.commands.parser import UsageError, model_variables
from kimia_infer.commands.serve_cog import free_port
from kimia_infer.utils.errors import ConfigurationError

OBJECT_STORE_BYTES = 256 << 20
"""Shared memory of a Ray that is started here: requests and answers hardly use it."""


def replica_counts(text: str) -> tuple[int, int]:
    """The least and the most replicas of ``N`` or ``MIN-MAX``. Raises UsageError."""
    least, dash, most = text.partition("-")
    try:
        low, high = int(least), int(most if dash else least)
    except ValueError:
        low = high = 0
    if not 1 <= low <= high:
        raise UsageError(f"--replicas: expected N or MIN-MAX such as 1-4, found {text!r}")
    return low, high


def run(arguments: Namespace) -> int:
    """Serve until a signal; running answers end first."""
    low, high = replica_counts(arguments.replicas)
    import ray
    from ray import serve

    from kimia_infer.cluster.serve import NAME, application
    from kimia_infer.serving.openai.settings import OpenAISettings
    from kimia_infer.serving.settings import read_settings

    try:
        port = free_port(arguments.host, arguments.port)
    except OSError as error:
        where = f"{arguments.host} port {arguments.port}"
        raise UsageError(f"cannot listen on {where}: {error.strerror}") from error
    variables = replica_variables(arguments)
    read_settings(OpenAISettings, variables)  # a bad value is named before a replica starts
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start_ray(variables)
    joined = bool(os.environ.get("RAY_ADDRESS"))
    try:
        serve.start(
            http_options={"host": arguments.host, "port": port},
            logging_config={"enable_access_log": False},
        )
        scale: dict[str, Any] = {"min_replicas": low, "max_replicas": high, "cpus": cores(high)}
        if variables.get("KIMI_AUDIO_DEVICE") == "cpu":
            scale["gpus"] = 0
        try:
            serve.run(application(scale), name=NAME, route_prefix="/")
        except RuntimeError as error:  # with the traceback of a replica, which is shown above
            reason = str(error).splitlines()[0]
            raise ConfigurationError(f"no replica could be started: {reason}") from error
        print(f"Ready: http://{arguments.host}:{port}", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        print("Stopping", flush=True)
    finally:
        if joined:  # to a cluster that may serve something else, too
            serve.delete(NAME)
        else:
            serve.shutdown()
        ray.shutdown()
    return 0


def replica_variables(arguments: Namespace) -> dict[str, str]:
    """The settings of replicas, and where they find this package."""
    found = model_variables(arguments)
    own = {name: value for name, value in found.items() if name.startswith("KIMI_AUDIO_")}
    if arguments.weights:
        own["KIMI_AUDIO_WEIGHTS"] = arguments.weights
    return own | {"PYTHONPATH": package_path(found)}


def package_path(environment: Mapping[str, str]) -> str:
    """The PYTHONPATH with which workers find this package, also that of a checkout."""
    package = str(Path(__file__).parents[2])
    return os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))


def start_ray(variables: dict[str, str]) -> None:
    """Join the cluster that RAY_ADDRESS names, or else start Ray on this machine."""
    # Ray reports the use of clusters to its makers, unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    options: dict[str, Any] = {}
    if os.environ.get("RAY_ADDRESS"):
        options["runtime_env"] = {"env_vars": variables}
    else:  # what it starts has the environment of this process, which no log shows
        os.environ.update(variables)
        # Otherwise workers get what other programs leave (15), unlike a server without Ray.
        os.environ.setdefault("RAY_worker_niceness", "0")
        options |= {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    ray.init(logging_level=logging.WARNING, **options)


def cores(models: int) -> int:
    """Cores for each of so many models, by which every node can have its share of them."""
    import ray

    found = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    usable = [count for count in found if count] or [1]
    return max(1, min(usable) // -(-models // len(usable)))
