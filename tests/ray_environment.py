"""The environment of tests that start Ray."""

from __future__ import annotations

RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Not below the temporary directory of a test, where paths are too long for its sockets.
    "RAY_TMPDIR": "/tmp",
    "RAY_worker_niceness": "0",
    # A machine that does something else as well takes long to start Ray's processes.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
}
