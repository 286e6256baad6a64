"""Batches of pairs that stay on the CPU, or in files, brought to a device while it works on the batch before."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from pfm.flow.couplings import Coupled

__all__ = ["streamed"]


def streamed(
    draw: Callable[[int], Coupled], first: int, last: int, device: torch.device
) -> Generator[Coupled, None, None]:
    """Yield the batches of updates ``first`` to ``last - 1`` on a device; one is drawn ahead, in a thread.

    Two batches are in memory at a time, for CUDA on pinned memory, from which copies do not wait.

    Args:
        draw: (number of an update) -> batch on the CPU; its result must not depend on when it is called.
    """

    def prepare(update: int) -> Coupled:
        batch = draw(update)
        return batch.map(Tensor.pin_memory) if device.type == "cuda" else batch

    with ThreadPoolExecutor(1, thread_name_prefix="pfm-batches") as pool:
        ahead = pool.submit(prepare, first)
        for update in range(first, last):
            batch = ahead.result()
            if update + 1 < last:
                ahead = pool.submit(prepare, update + 1)
            yield batch.to(device)
