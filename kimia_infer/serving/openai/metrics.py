"""What Prometheus reads at ``/metrics``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kimia_infer.api.events import Completion, Metrics
from kimia_infer.api.reading import Reading
from kimia_infer.api.transcription import Transcript
from kimia_infer.engine.scheduler import Scheduler

SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 120.0)
"""Upper bounds of the buckets of histograms."""


class Meters:
    """Counters of one server. They say nothing of what is in requests."""

    def __init__(self, scheduler: Scheduler):
        self._registry = registry = CollectorRegistry()
        gauges = {
            "queued": ("Requests that wait for a slot", lambda: scheduler.queued),
            "running": ("Requests that have a slot", lambda: scheduler.taken),
            "slots": ("Requests that can run at a time", lambda: scheduler.slots),
        }
        for name, (text, value) in gauges.items():
            Gauge(f"kimi_audio_{name}", text, registry=registry).set_function(value)
        self.requests = Counter(
            "kimi_audio_requests", "Requests", ("endpoint", "status"), registry=registry
        )
        self.sessions = Gauge("kimi_audio_sessions", "Open realtime sessions", registry=registry)
        self._steps = Counter("kimi_audio_steps", "Steps of answers", registry=registry)
        self._speech = Counter(
            "kimi_audio_speech_seconds", "Seconds of speech in answers", registry=registry
        )
        self._times = {
            name: Histogram(f"kimi_audio_{name}", text, registry=registry, buckets=SECONDS)
            for name, text in (
                ("first_text_seconds", "Time to the first text of an answer"),
                ("first_audio_seconds", "Time to the first speech of an answer"),
                ("total_seconds", "Time to the end of an answer"),
            )
        }

    def count(self, answer: Completion | Transcript | Reading) -> None:
        """Add a complete answer."""
        metrics: Metrics = answer.metrics
        self._steps.inc(metrics.get("decode_steps", 0))
        self._speech.inc(metrics.get("output_audio_seconds", 0))
        for name, times in self._times.items():
            if name in metrics:
                times.observe(metrics[name])

    def exposition(self) -> bytes:
        """All counters in Prometheus' text format."""
        return generate_latest(self._registry)
