"""Counters and histograms for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

__all__ = ["Metrics"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
GAINS = (-0.5, -0.2, -0.1, 0.0, 0.05, 0.1, 0.2, 0.3, 0.5)


class Metrics:
    """Counts what a proxy does, in a registry of its own: two proxies in one process do not share numbers.

    Labels must come from small fixed sets, never from a request's text.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(name, about, labels, registry=self.registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(name, about, buckets=buckets, registry=self.registry)

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(name, about, registry=self.registry)

        self.requests = counter("pfm_requests", "Requests by endpoint and outcome.", "endpoint", "outcome")
        self.upstream_calls = counter(
            "pfm_upstream_calls", "Calls of the upstream by status, or what went wrong.", "status"
        )
        self.tokens = counter("pfm_upstream_tokens", "Tokens that the upstream reports.", "kind")
        self.candidates = counter("pfm_candidates", "Candidates drawn, by whether they could be used.", "usable")
        self.scored_texts = counter("pfm_scored_texts", "Texts scored by request.", "endpoint")
        self.feedback = counter("pfm_feedback", "Rows of feedback kept, by kind.", "kind")
        self.request_seconds = histogram("pfm_request_seconds", "Chat requests, from arrival to the answer.")
        self.queue_seconds = histogram("pfm_queue_seconds", "Time that requests wait for their turn.")
        self.upstream_seconds = histogram("pfm_upstream_seconds", "Time to draw the candidates of a request.")
        self.encoder_seconds = histogram("pfm_encoder_seconds", "Time to encode a batch of requests.")
        self.flow_seconds = histogram("pfm_flow_seconds", "Time to judge a batch of encoded requests.")
        self.batch_requests = histogram("pfm_batch_requests", "Requests that are judged together.", SIZES)
        self.gain = histogram("pfm_win_probability_gain", "b of the answer less b of the original.", GAINS)
        self._active = gauge("pfm_requests_active", "Requests being worked on.")
        self._waiting = gauge("pfm_requests_waiting", "Requests that wait for their turn.")
        self._held = gauge("pfm_held_bytes", "Bodies held in memory.")

    def text(self, *, active: int, waiting: int, held: int) -> bytes:
        """Write everything in the text format, version 0.0.4."""
        self._active.set(active)
        self._waiting.set(waiting)
        self._held.set(held)
        return generate_latest(_WithoutCreated(self.registry))  # pyright: ignore[reportArgumentType]


class _WithoutCreated(Collector):
    """Gives the samples of a registry less the times at which its metrics began, which nobody reads here.

    The library can leave them out for the whole process only.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

    def collect(self) -> Iterable[Metric]:
        for metric in self.registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
