"""The process of some measurements: makes them in turn and prints a line of JSON for each."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from dataclasses import asdict
from typing import Any

from scripts.benchmark.runner import Setup


def end_with_parent() -> None:
    """Wait for the end of stdin, which the parent holds open, and exit."""
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    # Whatever else is printed goes to stderr.
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    lock = threading.Lock()

    def send(value: dict[str, Any]) -> None:
        with lock:
            print(json.dumps(value), file=reports, flush=True)

    asked = json.loads(sys.argv[1])
    try:
        from scripts.benchmark.bench import Bench
        from scripts.benchmark.measurements import MEASURE

        bench = Bench(
            Setup(**asked["setup"]), lambda done, total: send({"progress": [done, total]})
        )
        send(bench.about())
        for name in asked["names"]:
            send({"tables": [asdict(table) for table in MEASURE[name](bench)]})
    except Exception as error:  # the device may be unusable from here on
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        send({"error": message, "traceback": traceback.format_exc()})


if __name__ == "__main__":
    main()
