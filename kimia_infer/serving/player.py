"""Plays speech while it is still being received, with a program that is installed."""

from __future__ import annotations

import contextlib
import shutil
import subprocess

from kimia_infer.serving.client import PCM_RATE

PLAYERS = {
    "ffplay": f"-loglevel error -nodisp -autoexit -f s16le -sample_rate {PCM_RATE} -i pipe:0",
    "aplay": f"-q -t raw -f S16_LE -r {PCM_RATE} -c 1 -",
}
"""Programs and the arguments with which they play mono 16-bit samples from stdin."""


class Player:
    """A player, started by the first samples; ``name`` is None where no program is installed."""

    def __init__(self) -> None:
        self.name = next((name for name in PLAYERS if shutil.which(name)), None)
        self._process: subprocess.Popen[bytes] | None = None

    def play(self, samples: bytes) -> None:
        """Queue mono 16-bit samples at 24 kHz; a player that ended is not started again."""
        if self.name is None or not samples:
            return
        if self._process is None:
            command = [self.name, *PLAYERS[self.name].split()]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        # One that has ended, closed by the user or without a sound card, needs nothing more.
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(samples)
            self._process.stdin.flush()

    def finish(self) -> bool:
        """Wait until everything queued has been played; False if the player failed."""
        if self._process is None:
            return True
        self._process.communicate()
        return self._process.returncode == 0

    def stop(self) -> None:
        """Stop playing at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
