"""What Ray Serve adds to an answer: the same server with one replica on Ray, and without.

    .venv/bin/python -m scripts.benchmark.replicas --weights weights/mini

Both run at the same time and are asked the same question in turn, so that nothing but the way
differs. Needs requirements-ray.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator

import httpx

from scripts.benchmark.http_overhead import (
    QUESTION,
    WARM_UP,
    http_first_sound,
    http_refused,
    http_text,
    shown,
)
from scripts.benchmark.runner import ROOT

WAYS: dict[str, Callable[[httpx.Client, bytes], float]] = {
    "whole text": http_text,
    "first streamed sound": http_first_sound,
    "refused, as an earlier reply is unknown": http_refused,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="weights/mini")
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    sound = QUESTION.read_bytes()
    with serving(arguments.weights) as plain, serving(arguments.weights, "--ray") as replica:
        print(f"milliseconds, median of {arguments.rounds} rounds (least)")
        for name, ask in WAYS.items():
            rounds = WARM_UP + arguments.rounds
            times = [(ask(plain, sound), ask(replica, sound)) for _ in range(rounds)][WARM_UP:]
            alone, through = zip(*times, strict=True)
            added = 1000 * statistics.median(b - a for a, b in times)
            print(f"{name}: alone {shown(alone)}, on Ray {shown(through)}, added {added:+.1f}")


@contextlib.contextmanager
def serving(weights: str, *arguments: str) -> Iterator[httpx.Client]:
    """A client of ``scripts/serve --openai``. RuntimeError if that ends before it is ready."""
    command = [sys.executable, "scripts/serve", "--openai", "--port", "0", "--weights", weights]
    process = subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        ready = next((line for line in process.stdout if line.startswith("Ready:")), None)
        if ready is None:
            raise RuntimeError(f"the server ended with status {process.wait()}, see above")
        url = ready.removeprefix("Ready:").strip()
        with httpx.Client(base_url=url, timeout=600) as client:
            yield client
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    main()
