"""Work on a GPU recorded once and repeated without Python between its kernels (CUDA graphs).

What is recorded must read and write the same memory every time, must not wait for the device, and must not depend on
Python values that change. On other devices, and if recording fails, the work runs without a graph.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["GraphCache", "Repeated", "capture", "keep_alive", "supported"]

logger = logging.getLogger(__name__)

WARM_UP = 3  # runs before the recording, in which libraries choose their kernels and optimisers make their state
OFF = "PFM_CUDA_GRAPHS"
GRAPHS = 8  # that one cache keeps
GRAPH_ROWS = 4096  # from which on the kernels take longer than launching them

T = TypeVar("T")
Inputs = tuple[Tensor | None, ...]


def supported(device: torch.device) -> bool:
    """Return whether work on a device can be recorded; the environment variable ``PFM_CUDA_GRAPHS=0`` turns it off."""
    return device.type == "cuda" and os.environ.get(OFF) != "0"


def capture(work: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """Record what ``work`` launches on a CUDA device, without running it; return what runs it."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as the one that pins batches, may go on with what a recording forbids in its own.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


_recording: ContextVar[list[Any] | None] = ContextVar("recording", default=None)


def keep_alive(value: T) -> T:
    """Return a value that a recording may read although whoever made it forgets it: the recording keeps it."""
    kept = _recording.get()
    if kept is not None:
        kept.append(value)
    return value


def warm_up(work: Callable[[], Any], device: torch.device) -> Any:
    """Run work on a stream of its own, as recording does, and let the current stream wait for it."""
    if device.type != "cuda":
        return work()
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        result = work()
    current.wait_stream(side)
    return result


class Repeated:
    """Runs a function of tensors; where graphs are supported, by replaying it after a few runs.

    Args:
        work: takes tensors, or None at the same places every time, and returns a tuple of tensors. It is given the same
            memory every time, filled with the values of each call.
        device: where the tensors are.
    """

    def __init__(self, work: Callable[..., tuple[Tensor, ...]], device: torch.device) -> None:
        self.work, self.device = work, device
        self._runs = 0
        self._inputs: Inputs = ()
        self._results: tuple[Tensor, ...] = ()
        self._replay: Callable[[], None] | None = None
        self._kept: list[Any] = []
        self._plain = not supported(device)

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Run on inputs; the next call overwrites the results. Other shapes than the first time are not recorded."""
        if self._plain or not self._fill(inputs):
            return self.work(*inputs)
        if self._replay is None:
            if self._runs < WARM_UP:
                self._runs += 1
                return warm_up(lambda: self.work(*self._inputs), self.device)
            token = _recording.set(self._kept)
            try:
                self._replay = capture(self._record, self.device)
            except RuntimeError as error:
                logger.warning("recording a graph on %s failed, going on without: %s", self.device, error)
                self._plain = True
                return self.work(*inputs)
            finally:
                _recording.reset(token)
        self._replay()
        return self._results

    def _record(self) -> None:
        self._results = self.work(*self._inputs)

    def _fill(self, inputs: Inputs) -> bool:
        """Copy values into the recorded memory; return whether they have its shapes."""
        if not self._inputs:
            self._inputs = tuple(None if each is None else each.clone() for each in inputs)
            return True
        if _shapes(self._inputs) != _shapes(inputs):
            return False
        for mine, theirs in zip(self._inputs, inputs, strict=True):
            if mine is not None and theirs is not None:
                mine.copy_(theirs, non_blocking=True)
        return True


def _shapes(tensors: Inputs) -> list[torch.Size | None]:
    return [None if each is None else each.shape for each in tensors]


class GraphCache:
    """Keeps the recordings of a few functions of rows, one for every number of rows, rounded up to a power of two.

    Copies and pickles of one are empty: what is recorded is bound to memory.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Repeated] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(
        self,
        settings: Hashable,
        work: Callable[..., tuple[Tensor, ...]],
        rows: Tensor,
        contexts: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Run work on rows (b, D) and contexts (b, C) or None; it must be the same for the same settings."""
        count = len(rows)
        if not 0 < count <= GRAPH_ROWS:
            return work(rows, contexts)
        padded = max(8, 1 << (count - 1).bit_length())
        inputs = (
            None if each is None else nn.functional.pad(each, (0, 0, 0, padded - count)) for each in (rows, contexts)
        )
        with self._lock:  # the memory of a recording is filled and read by one thread at a time
            key = settings, padded
            repeated = self._kept.pop(key, None) or Repeated(work, rows.device)
            self._kept[key] = repeated
            while len(self._kept) > GRAPHS:
                self._kept.popitem(last=False)
            return tuple(each[:count].clone() for each in repeated(*inputs))

    def clear(self) -> None:
        """Forget all recordings."""
        with self._lock:
            self._kept.clear()

    def __deepcopy__(self, memo: Any) -> GraphCache:
        return GraphCache()

    def __reduce__(self) -> Any:
        return GraphCache, ()
