"""The state of a Cog server as an exit status, for the probes of a container platform.

    python -m kimia_infer.serving.cog.probe [--alive] [URL]

Exit status 0: it can answer (READY or BUSY). With --alive also while it still loads (STARTING),
so that a container is only restarted from a state that it cannot leave. Else 1.
``/health-check`` itself answers HTTP 200 in every state.
"""

from __future__ import annotations

import http.client
import json
import os
import sys

from kimia_infer.serving.client import open_url

ANSWERING = ("READY", "BUSY")
TIMEOUT = 8.0
"""Seconds; the server's own limit for a health check is 5."""


def main(arguments: list[str]) -> int:
    alive = "--alive" in arguments
    rest = [argument for argument in arguments if argument != "--alive"]
    if len(rest) > 1 or any(argument.startswith("-") for argument in rest):
        print(__doc__, file=sys.stderr)
        return 2
    url = rest[0] if rest else f"http://127.0.0.1:{os.environ.get('PORT', '5000')}"
    try:
        with open_url(f"{url.rstrip('/')}/health-check", TIMEOUT) as answer:
            state = json.load(answer)
            status = state["status"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        print(f"no health check at {url}: {error}")
        return 1
    print(status, state.get("user_healthcheck_error") or "", sep="\n")
    return 0 if status in ANSWERING or (alive and status == "STARTING") else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
