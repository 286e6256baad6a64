"""Notes how a request goes: for the metrics, the log and its trace."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack

from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from pfm.serve.errors import Disconnected, Refused
from pfm.serve.http import Owning
from pfm.serve.metrics import Metrics
from pfm.serve.tracing import Trace

__all__ = ["Note"]

logger = logging.getLogger("pfm.serve.app")  # the name that settings of logging know


class Note:
    """Notes how a request goes; counts it and writes its line in the log when it is left."""

    def __init__(self, metrics: Metrics, endpoint: str, method: str, trace: Trace) -> None:
        self.metrics = metrics
        self.trace = trace
        self._sending = False
        self.endpoint = endpoint
        self.method = method
        self.started = time.perf_counter()
        self.outcome = "error"
        self.status = 200
        self.queue = self.upstream = self.encoder = 0.0
        self.b: tuple[float, float] | None = None

    def elapsed(self) -> float:
        """Seconds since the request came."""
        return time.perf_counter() - self.started

    def owning(self, response: Response, owned: AsyncExitStack) -> Response:
        """Return an answer with what it stands on; the span of the request ends when it has been sent."""
        stack = owned.pop_all()
        stack.callback(self.trace.end)
        self._sending = True
        return Owning(response, stack)

    def __enter__(self) -> Note:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Refused):
            self.outcome, self.status = error.outcome, error.status
        elif isinstance(error, Disconnected | ClientDisconnect | asyncio.CancelledError):
            self.outcome, self.status = "cancelled", 499
        elif error is not None:
            self.outcome, self.status = "error", 500
        self.metrics.requests.labels(self.endpoint, self.outcome).inc()
        if self.endpoint == "chat":
            self.metrics.request_seconds.observe(self.elapsed())
            self.metrics.queue_seconds.observe(self.queue)
            if self.upstream:
                self.metrics.upstream_seconds.observe(self.upstream)
        self._close_trace()
        b = "" if self.b is None else f", b {self.b[0]:.2f} -> {self.b[1]:.2f}"
        parts = f"upstream {self.upstream * 1e3:.0f}, encoder {self.encoder * 1e3:.0f}"
        logger.info(
            "%s %s: %d %s%s, %.0f ms (%s)",
            self.method,
            self.endpoint,
            self.status,
            self.outcome,
            b,
            self.elapsed() * 1e3,
            parts,
        )

    def _close_trace(self) -> None:
        b = self.b or (None, None)
        self.trace.set(
            http__response__status_code=self.status,
            pfm__outcome=self.outcome,
            pfm__queue_seconds=round(self.queue, 6),
            pfm__win_probability__original=b[0],
            pfm__win_probability__chosen=b[1],
        )
        if not self._sending:
            self.trace.end(self.outcome if self.status >= 500 else None)
