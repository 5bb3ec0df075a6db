"""Health and probe: a service says what it is."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch

from kimia_infer.serving.cog import health as health_module
from kimia_infer.serving.cog import probe
from kimia_infer.serving.cog.health import (
    GRACE_SECONDS,
    DeviceError,
    Health,
    Load,
    SlotLost,
    SlotWatch,
)
from tests.clock import set_clock
from tests.paths import ROOT
from tests.serving.helpers import Server

CPU = torch.device("cpu")


def test_working_device_is_healthy() -> None:
    Health([CPU], Load()).check()


def test_broken_device_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load()
    health = Health([CPU], load)

    def lost(*arguments, **keywords):
        raise RuntimeError("device lost")

    monkeypatch.setattr(torch, "arange", lost)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="device lost"):
            health.check()
    load.running[1] = time.monotonic()
    health.check()  # a busy device is not asked
    load.running.clear()
    monkeypatch.undo()
    health.check()


def test_both_devices_are_asked() -> None:
    """The second one has no values to return."""
    with pytest.raises(RuntimeError, match="meta"):
        Health([CPU, torch.device("meta")], Load()).check()


def test_wrong_results_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "arange", lambda *a, **k: torch.zeros(256))
    with pytest.raises(DeviceError, match="wrong results"):
        Health([CPU], Load()).check()


def test_device_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    health, asked, answer = Health([CPU], Load()), threading.Event(), threading.Event()
    arange = torch.arange

    def hanging(*arguments, **keywords):
        asked.set()
        assert answer.wait(60)
        return arange(*arguments, **keywords)

    monkeypatch.setattr(torch, "arange", hanging)
    first = threading.Thread(target=health.check)
    first.start()
    assert asked.wait(60)
    with pytest.raises(DeviceError, match="has not answered for"):
        health.check()
    answer.set()
    first.join()
    health.check()


def test_prediction_far_beyond_its_limit_counts_as_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    set_clock(monkeypatch, health_module, lambda: now)
    load = Load(2, {1: now})
    limited, unlimited = Health([CPU], load, 10.0), Health([CPU], load)
    now += 10 + GRACE_SECONDS
    limited.check()
    now += 1
    load.running[2] = now
    unlimited.check()
    with pytest.raises(DeviceError, match="its limit is 10 s"):
        limited.check()  # of the two that run, the first is stuck
    del load.running[1]
    limited.check()


class Slots:
    """A server's state as the watch sees it, and the model that it belongs to."""

    def __init__(self) -> None:
        self.load, self.status = Load(), "READY"
        self.health = Health([CPU], self.load)
        self.watch = SlotWatch(self.health, self.load, lambda: self.status)

    def begin(self) -> None:
        self.load.begun += 1
        self.load.running[1] = time.monotonic()

    def lost(self) -> bool:
        self.watch.check()
        try:
            self.health.check()
        except SlotLost:
            return True
        return False


def test_busy_without_a_prediction_is_unhealthy_at_the_second_look() -> None:
    slots = Slots()
    assert not slots.lost()
    slots.status = "BUSY"
    assert not slots.lost()  # one may be about to begin
    assert slots.lost()
    slots.status = "UNHEALTHY"  # as the server says now
    assert slots.lost() and slots.lost()
    slots.begin()
    assert not slots.lost()


def test_busy_with_predictions_is_well() -> None:
    slots = Slots()
    slots.status = "BUSY"
    for _ in range(3):
        assert not slots.lost()
        slots.begin()
        assert not slots.lost() and not slots.lost()
        slots.load.running.clear()
    slots = Slots()
    for status in ("BUSY", "READY", "BUSY", None, "BUSY"):
        slots.status = status
        assert not slots.lost()


def test_server_reports_what_the_health_check_raises(scripted_server: Server) -> None:
    server, state_file = scripted_server, scripted_server.files.parent / "state"
    state_file.write_text("CUDA error: device lost")
    try:
        _, state = server.request("GET", "/health-check")
        assert state["status"] == "UNHEALTHY"
        assert "device lost" in state["user_healthcheck_error"]
        assert run_probe(server) == run_probe(server, "--alive") == 1
    finally:
        state_file.unlink()
    server.wait_for("READY")
    assert run_probe(server) == run_probe(server, "--alive") == 0


def run_probe(server: Server, *arguments: str) -> int:
    return probe.main([*arguments, server.url])


def test_probe_without_a_server() -> None:
    command = [sys.executable, "-m", "kimia_infer.serving.cog.probe", "--alive"]
    done = subprocess.run(
        [*command, "http://127.0.0.1:1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "no health check" in done.stdout
    assert probe.main(["--ready"]) == 2
