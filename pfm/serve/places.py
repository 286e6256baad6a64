"""A bounded number of requests at work, a bounded queue before them, and a bounded amount of memory for bodies."""

from __future__ import annotations

import asyncio

from pfm.serve.errors import Refused

__all__ = ["HeldBytes", "Memory", "Place", "Places"]


class Places:
    """Admits so many requests to work at once and so many to wait; refuses the rest before their bodies are read.

    Args:
        concurrency: requests at work.
        queue: requests that may wait, or whose bodies are still arriving, beyond those.
    """

    def __init__(self, concurrency: int, queue: int) -> None:
        self._semaphore = asyncio.Semaphore(concurrency)
        self.most = concurrency + queue
        self.admitted = 0
        self.active = 0

    @property
    def waiting(self) -> int:
        """Requests that were admitted and are not at work yet."""
        return self.admitted - self.active

    def admit(self, retry_after: float) -> Place:
        """Admit a request, until :meth:`Place.leave`.

        Args:
            retry_after: seconds after which a refused client may try again.

        Raises:
            Refused: as many as there may be are at work or waiting; status 429.
        """
        if self.admitted >= self.most:
            raise Refused(
                429,
                f"busy: {self.active} requests at work and {self.waiting} waiting; try again later",
                outcome="busy",
                headers={"Retry-After": str(max(1, round(retry_after)))},
            )
        self.admitted += 1
        return Place(self)

    async def _start(self, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self._semaphore.acquire()
        except TimeoutError:
            raise Refused(504, "no place became free in time", outcome="timeout") from None
        self.active += 1

    def _end(self, *, at_work: bool) -> None:
        self.admitted -= 1
        if at_work:
            self.active -= 1
            self._semaphore.release()


class Place:
    """Is what an admitted request holds: first a place in the queue, then one at work."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._at_work = False
        self._left = False

    async def start(self, deadline: float) -> None:
        """Wait for a place at work.

        Args:
            deadline: time of the event loop at which waiting ends.

        Raises:
            Refused: no place was free before the deadline; status 504.
        """
        await self._places._start(deadline)
        self._at_work = True

    def leave(self) -> None:
        """Return back what is held; a second time does nothing."""
        if not self._left:
            self._left = True
            self._places._end(at_work=self._at_work)


class Memory:
    """Bounds the bytes of all bodies that are held at one time, of requests and of the upstream's answers.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def held(self) -> HeldBytes:
        """Return an account for one request."""
        return HeldBytes(self)


class HeldBytes:
    """Counts what one request holds.

    Attributes:
        size: bytes.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.size = 0
        self._closed = False

    def add(self, size: int) -> None:
        """Count further bytes.

        Raises:
            Refused: all requests together would hold more than the limit; status 503.
        """
        if self._memory.used + size > self._memory.limit:
            raise Refused(
                503,
                f"busy: unfinished requests and answers hold {self._memory.used >> 20} MiB; try again later",
                outcome="busy",
                headers={"Retry-After": "1"},
            )
        if not self._closed:
            self._memory.used += size
            self.size += size

    def close(self) -> None:
        """Count them no longer; a second time does nothing."""
        self._closed = True
        self._memory.used -= self.size
        self.size = 0
