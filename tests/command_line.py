"""Commands run in the process of a test, which has imported already what they need."""

from __future__ import annotations

from kimia_infer.commands.main import run_command


def run_here(name: str, *arguments: object) -> int | str | None:
    """Run ``kimi-audio NAME``; its exit status."""
    try:
        return run_command(name, [str(argument) for argument in arguments], f"scripts/{name}")
    except SystemExit as end:
        return end.code
