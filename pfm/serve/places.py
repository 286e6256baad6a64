"""A bounded number of requests at work, and a bounded queue before them."""

from __future__ import annotations

import asyncio

from pfm.serve.errors import Refused

__all__ = ["Places"]


class Places:
    """Lets so many requests work at once and so many wait; refuses the rest at the door.

    Args:
        concurrency: requests at work.
        queue: requests that may wait.
    """

    def __init__(self, concurrency: int, queue: int) -> None:
        self._semaphore = asyncio.Semaphore(concurrency)
        self.queue = queue
        self.active = 0
        self.waiting = 0

    async def take(self, deadline: float, retry_after: float) -> None:
        """Wait for a place; it is held until :meth:`leave`.

        Args:
            deadline: time of the event loop at which waiting ends.
            retry_after: seconds after which a refused client may try again.

        Raises:
            Refused: the queue is full, or no place was free before the deadline.
        """
        if self._semaphore.locked() and self.waiting >= self.queue:
            raise Refused(
                429,
                f"busy: {self.active} requests at work and {self.waiting} waiting; try again later",
                outcome="busy",
                headers={"Retry-After": str(max(1, round(retry_after)))},
            )
        self.waiting += 1
        try:
            async with asyncio.timeout_at(deadline):
                await self._semaphore.acquire()
        except TimeoutError:
            raise Refused(504, "no place became free in time", outcome="timeout") from None
        finally:
            self.waiting -= 1
        self.active += 1

    def leave(self) -> None:
        """Give a place back."""
        self.active -= 1
        self._semaphore.release()
