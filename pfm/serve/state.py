"""The state of a running proxy: its parts, its queue, and how every request begins."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from pfm._internal.proxies import proxy_of
from pfm.refiner import Refiner
from pfm.serve.access import Access
from pfm.serve.config import ServeConfig
from pfm.serve.errors import Refused
from pfm.serve.feedback import FeedbackFile
from pfm.serve.http import LoopErrors, unless_gone, whole_body
from pfm.serve.judge import Judge
from pfm.serve.metrics import Metrics
from pfm.serve.note import Note
from pfm.serve.places import Memory, Place, Places
from pfm.serve.tracing import Tracing
from pfm.serve.upstream import Upstream

__all__ = ["State"]

logger = logging.getLogger("pfm.serve.app")


class State:
    """Holds the parts of a running proxy."""

    def __init__(self, refiner: Refiner, config: ServeConfig, tracer_provider: Any = None) -> None:
        self.config = config
        self.tracing = Tracing(config.upstream, tracer_provider)
        self.refiner = refiner
        self.metrics = Metrics()
        self.judge = Judge(refiner)
        self._token = config.secret("token_env")
        self._key = config.secret("upstream_key_env")
        if config.upstream is not None:
            proxy_of(config.upstream)  # one that cannot be used shows before the proxy listens
        self.access = Access(config, self._token, secrets.token_hex(8))
        self.feedback: FeedbackFile | None = None
        if config.feedback is not None:
            path = Path(config.feedback).expanduser()
            self.feedback = FeedbackFile(path, config.feedback_bytes, [self._token, self._key])
        self.usual_seconds = 1.0  # of a request, a running mean

    async def open(self) -> None:
        """Reach for the upstream, in the running event loop."""
        asyncio.get_running_loop().set_exception_handler(LoopErrors())
        self.places = Places(self.config.concurrency, self.config.queue)
        self.memory = Memory(self.config.held_bytes)
        self._upstream: Upstream | None = None
        if self.config.upstream is None:
            return
        self._upstream = Upstream(self.config, self._key, self._token is not None, self.access.instance, self.metrics)
        problem = await self._upstream.probe()
        if problem is not None:
            logger.warning("%s", problem)

    async def close(self) -> None:
        """Let go of everything."""
        self.judge.close()
        if self.feedback is not None:
            self.feedback.close()
        if self._upstream is not None:
            await self._upstream.close()

    @property
    def upstream(self) -> Upstream:
        """The server behind the proxy.

        Raises:
            Refused: there is none; status 404.
        """
        if self._upstream is None:
            raise Refused(
                404,
                "this server gives scores only (/v1/score, /v1/rerank, /v1/classify): started with --upstream URL, it "
                "refines chat completions of that server too",
                outcome="not_found",
            )
        return self._upstream

    async def health(self) -> dict[str, Any]:
        """Answer that the server is up, and how busy it is."""
        return {"status": "ok", "active": self.places.active, "waiting": self.places.waiting}

    async def show_metrics(self, request: Request) -> Response:
        """Answer with the metrics in the text format of Prometheus."""
        self.access.check(request)
        text = self.metrics.text(active=self.places.active, waiting=self.places.waiting, held=self.memory.used)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def with_body(
        self, request: Request, note: Note, answer: Callable[..., Coroutine[Any, Any, Response]]
    ) -> Response:
        """Admit a request, read its whole body, and answer it unless its client is gone."""
        async with AsyncExitStack() as owned:
            place = self.admitted(owned)
            held = self.memory.held()
            owned.callback(held.close)
            content = await whole_body(request, self.config, held)
            response = await unless_gone(request, answer(request, content, place, held, note, owned))
            return note.owning(response, owned)

    def admitted(self, owned: AsyncExitStack) -> Place:
        """Admit a request, or refuse it where too many wait; ``owned`` gives its place back."""
        # Retry after as long as it takes until the work that waits is done, at the usual pace.
        waiting = self.places.waiting / self.config.concurrency
        place = self.places.admit(retry_after=(1 + waiting) * self.usual_seconds)
        owned.callback(place.leave)
        return place

    async def start(self, place: Place, note: Note) -> float:
        """Wait until a request may start, and return its deadline on the clock of the event loop."""
        came, deadline = time.perf_counter(), self.deadline()
        await place.start(deadline)
        note.queue = time.perf_counter() - came
        return deadline

    def deadline(self) -> float:
        """Return when a request that starts now must have ended, on the clock of the event loop."""
        return asyncio.get_running_loop().time() + self.config.timeout

    def counted(self, endpoint: str, request: Request) -> Note:
        """Begin the note of a request."""
        route = getattr(request.scope.get("route"), "path", endpoint)
        return Note(
            self.metrics, endpoint, request.method, self.tracing.begin(request.method, route, request.headers.raw)
        )
