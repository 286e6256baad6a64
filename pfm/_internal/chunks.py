"""Rows in chunks on a device: inputs from anywhere, bounded memory, results back where the inputs were."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["map_rows"]

logger = logging.getLogger(__name__)

CPU_ROWS = 1024  # larger chunks leave the cache
DEVICE_ROWS = 65_536  # enough to keep a GPU busy between launches
DEVICE_BYTES = 2**32  # of intermediate values, by the estimate below
COPIES = 12  # of a row's values that are alive at a time: stages of the solver, layers of the network

Work = Callable[[Tensor, Tensor | None], tuple[Tensor, ...]]


def map_rows(work: Work, y: Tensor, context: Tensor | None, device: torch.device) -> tuple[Tensor, ...]:
    """Apply a function of rows that do not depend on each other, chunk by chunk on a device.

    A chunk that does not fit into the device's memory is halved, with a warning.

    Args:
        work: (rows (b, D), contexts (b, C) or None), both float32 on ``device``, to tensors (b, ...).
        y: (B, D), on any device. On pinned memory copies do not wait for each other, and results are pinned.
        context: (B, C) on any device, of which a row expanded to all is copied once; or None.

    Returns:
        the results (B, ...) on the device of ``y``.

    Raises:
        torch.OutOfMemoryError: a single row does not fit.
    """
    size = _chunk_rows(y, context, device)
    shared = context is not None and len(context) > 0 and context.stride(0) == 0
    if context is not None and shared:
        context = context[:1].to(device, torch.float32)
    pinned = device.type != "cpu" and y.device.type == "cpu" and y.is_pinned()
    results: list[Tensor] = []
    pieces: list[tuple[Tensor, ...]] = []
    at, first = 0, True
    while at < len(y) or first:
        rows = y[at : at + size]
        try:
            contexts = _contexts(context, shared, at, len(rows), device)
            found = work(rows.to(device, torch.float32, non_blocking=True), contexts)
        except torch.OutOfMemoryError:
            if len(rows) <= 1 or device.type == "cpu":
                raise
            size = max(1, min(size, len(rows)) // 2)
            logger.warning("%s ran out of memory: going on with %d rows at a time", device, size)
            warnings.warn(
                f"{device} ran out of memory at {len(rows)} rows at a time: going on with {size}", RuntimeWarning,
                stacklevel=5,
            )  # fmt: skip
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        if pinned:
            if first:
                results = [
                    torch.empty(len(y), *each.shape[1:], dtype=each.dtype, device="cpu", pin_memory=True)
                    for each in found
                ]
            for result, each in zip(results, found, strict=True):
                result[at : at + len(each)].copy_(each, non_blocking=True)
        else:
            pieces.append(tuple(each.to(y.device) for each in found))
        at += size
        first = False
    if pinned:
        torch.cuda.current_stream(device).synchronize()
        return tuple(results)
    if len(pieces) == 1:
        return pieces[0]
    return tuple(torch.cat(column) for column in zip(*pieces, strict=True))


def _contexts(context: Tensor | None, shared: bool, at: int, count: int, device: torch.device) -> Tensor | None:
    if context is None:
        return None
    if shared:
        return context.expand(count, -1)
    return context[at : at + count].to(device, torch.float32, non_blocking=True)


def _chunk_rows(y: Tensor, context: Tensor | None, device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_ROWS
    values = y.shape[1] * COPIES + (0 if context is None else context.shape[1] * COPIES)
    return min(max(DEVICE_BYTES // (4 * max(values, 1)), 1), DEVICE_ROWS)
