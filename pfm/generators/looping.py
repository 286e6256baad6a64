"""Concurrent work in event loops: in order, bounded, and for callers that have no loop."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

__all__ = ["LoopSlots", "in_order", "iterate"]

T = TypeVar("T")

_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process: a forked one has no thread that runs it
_END = object()


def iterate(make: Callable[[], AsyncIterator[T]]) -> Iterator[T]:
    """Yield what an asynchronous iterator yields, which runs ahead in the loop of the background.

    The loop stays: connections of an asynchronous client belong to one loop and can be used again.

    Args:
        make: makes the iterator; called in the loop.
    """
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()

    async def pump() -> None:
        try:
            async for item in make():
                arrived.put(item)
        except Exception as error:
            arrived.put(_Raised(error))
        finally:
            arrived.put(_END)

    task = asyncio.run_coroutine_threadsafe(pump(), _background())
    try:
        while (item := arrived.get()) is not _END:
            if isinstance(item, _Raised):
                raise item.error
            yield item
    finally:
        task.cancel()


async def in_order(calls: Sequence[Callable[[], Awaitable[T]]], at_once: int) -> AsyncGenerator[T, None]:
    """Yield the results of calls in their order, while up to ``at_once`` of them run; earlier ones begin first."""
    places = asyncio.Semaphore(at_once)

    async def run(call: Callable[[], Awaitable[T]]) -> T:
        async with places:
            return await call()

    running = [asyncio.ensure_future(run(call)) for call in calls]
    try:
        for one in running:
            yield await one
    finally:
        for one in running:
            one.cancel()


class LoopSlots:
    """Bounds what is under way at once in each event loop: a semaphore belongs to one loop."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._by_loop: weakref.WeakKeyDictionary[Any, asyncio.Semaphore] = weakref.WeakKeyDictionary()

    def here(self) -> asyncio.Semaphore:
        """Return the semaphore of the running loop."""
        return self._by_loop.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self.number))

    def __getstate__(self) -> dict[str, int]:
        return {"number": self.number}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["number"])


class _Raised:
    def __init__(self, error: Exception) -> None:
        self.error = error


def _background() -> asyncio.AbstractEventLoop:
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = asyncio.new_event_loop()
            # A daemon: an interrupted program does not wait for servers that do not answer.
            threading.Thread(target=loop.run_forever, daemon=True, name="pfm-loop").start()
            _loops.clear()
            _loops[os.getpid()] = loop
        return loop
