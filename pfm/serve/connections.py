"""Limits on clients' connections, which an application behind the server cannot see."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from pfm.serve.config import ServeConfig

__all__ = ["limited_protocol"]

logger = logging.getLogger(__name__)

LEAST_PROGRESS = 16 * 2**10  # bytes that a client must take within the deadline on sending, or all there are
OWN_DESCRIPTORS = 32  # files, the listening socket and the event loop's own
LOG_SECONDS = 60.0


def limited_protocol(config: ServeConfig) -> type[asyncio.Protocol]:
    """Return what uvicorn makes a connection's protocol with, under the limits of the settings."""
    return cast(
        type[asyncio.Protocol],
        functools.partial(
            _LimitedProtocol,
            clients=_affordable(config),
            read_timeout=config.read_timeout,
            send_timeout=config.send_timeout,
        ),
    )


def _affordable(config: ServeConfig) -> int:
    """Return the number of clients for which there are file descriptors, beside those of calls of the upstream."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return config.clients
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return config.clients
    left = max(limit - config.connections - OWN_DESCRIPTORS, limit // 2)
    if left < config.clients:
        logger.warning("only %d clients may connect at once: the process may open %d files (ulimit -n)", left, limit)
    return min(config.clients, left)


class _LimitedProtocol(H11Protocol):
    """Closes connections beyond a number, those whose requests do not arrive, and those that take no answer.

    uvicorn's own deadline is on the pause between two requests alone, and any byte ends it.
    """

    _last_warning = -LOG_SECONDS

    def __init__(self, *args: Any, clients: int, read_timeout: float, send_timeout: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clients = clients
        self._read_timeout = read_timeout
        self._send_timeout = send_timeout
        self._arriving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        # Every byte that is not sent yet counts as waiting, so that a stalled client shows.
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > self._clients:
            self._warn(f"{self._clients} clients are connected; further ones are closed")
            transport.abort()
        else:
            self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arriving = _cancelled(self._arriving)
        self._sending = _cancelled(self._sending)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._arriving = _cancelled(self._arriving)
        elif self._arriving is None:  # part of a request, or the rest of one that is answered already
            self._expect_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()
        self._sending = _cancelled(self._sending)
        self._sending = self.loop.call_later(self._send_timeout, self._check_sending)

    def resume_writing(self) -> None:
        self._sending = _cancelled(self._sending)
        super().resume_writing()

    def _expect_request(self) -> None:
        self._arriving = self.loop.call_later(self._read_timeout, self._give_up)

    def _give_up(self) -> None:
        self._arriving = None
        if not self.transport.is_closing():
            self.transport.close()  # what is not sent yet still has its own deadline

    def _check_sending(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent > self._unsent - LEAST_PROGRESS:
            self.transport.abort()
        else:
            self._unsent = unsent
            self._sending = self.loop.call_later(self._send_timeout, self._check_sending)

    @classmethod
    def _warn(cls, message: str) -> None:
        if time.monotonic() - cls._last_warning >= LOG_SECONDS:
            cls._last_warning = time.monotonic()
            logger.warning("%s", message)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
