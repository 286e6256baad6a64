"""Counters and histograms in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

__all__ = ["Counter", "Histogram", "Metrics"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
Labels = tuple[tuple[str, str], ...]


class Counter:
    """Counts events, apart by labels. Labels must come from small fixed sets, never from a request's text."""

    kind = "counter"

    def __init__(self) -> None:
        self.values: dict[Labels, float] = defaultdict(float)

    def add(self, amount: float = 1, **labels: str) -> None:
        """Add to the count under these labels."""
        self.values[tuple(sorted(labels.items()))] += amount

    def lines(self, name: str) -> list[str]:
        """Write the samples."""
        return [f"{name}{_written(labels)} {_number(value)}" for labels, value in sorted(self.values.items())]


class Histogram:
    """Counts observations in buckets, and adds them up."""

    kind = "histogram"

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str) -> list[str]:
        """Write the samples, buckets cumulated."""
        written, count = [], 0
        for bound, here in zip((*map(_number, self.bounds), "+Inf"), self.counts, strict=True):
            count += here
            written.append(f'{name}_bucket{{le="{bound}"}} {count}')
        return [*written, f"{name}_sum {_number(self.total)}", f"{name}_count {count}"]


class Metrics:
    """What a proxy counts. It is used on the event loop alone, so it needs no lock."""

    def __init__(self) -> None:
        self.requests = Counter()
        self.upstream_calls = Counter()
        self.tokens = Counter()
        self.candidates = Counter()
        self.request_seconds = Histogram(SECONDS)
        self.queue_seconds = Histogram(SECONDS)
        self.upstream_seconds = Histogram(SECONDS)
        self.encoder_seconds = Histogram(SECONDS)
        self.flow_seconds = Histogram(SECONDS)
        self.batch_requests = Histogram(SIZES)
        self.gain = Histogram((-0.5, -0.2, -0.1, 0.0, 0.05, 0.1, 0.2, 0.3, 0.5))

    def text(self, *, active: int, waiting: int) -> str:
        """Write everything in the text format, version 0.0.4."""
        described = {
            "pfm_requests_total": ("Requests by endpoint and outcome.", self.requests),
            "pfm_upstream_calls_total": ("Calls of the upstream by status, or what went wrong.", self.upstream_calls),
            "pfm_upstream_tokens_total": ("Tokens that the upstream reports.", self.tokens),
            "pfm_candidates_total": ("Candidates drawn, by whether they could be used.", self.candidates),
            "pfm_request_seconds": ("Chat requests, from arrival to the answer.", self.request_seconds),
            "pfm_queue_seconds": ("Time that requests wait for their turn.", self.queue_seconds),
            "pfm_upstream_seconds": ("Time to draw the candidates of a request.", self.upstream_seconds),
            "pfm_encoder_seconds": ("Time to encode a batch of requests.", self.encoder_seconds),
            "pfm_flow_seconds": ("Time to judge a batch of encoded requests.", self.flow_seconds),
            "pfm_batch_requests": ("Requests that are encoded together.", self.batch_requests),
            "pfm_win_probability_gain": ("b of the answer less b of the original.", self.gain),
        }
        lines = []
        for name, (about, metric) in described.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {metric.kind}", *metric.lines(name)]
        for name, about, value in (
            ("pfm_requests_active", "Requests being worked on.", active),
            ("pfm_requests_waiting", "Requests that wait for their turn.", waiting),
        ):
            lines += [f"# HELP {name} {about}", f"# TYPE {name} gauge", f"{name} {value}"]
        return "\n".join(lines) + "\n"


def _written(labels: Labels) -> str:
    if not labels:
        return ""
    escape = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    return "{" + ",".join(f'{name}="{value.translate(escape)}"' for name, value in labels) + "}"


def _number(value: float) -> str:
    return f"{value:g}" if value != int(value) else str(int(value))
