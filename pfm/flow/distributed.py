"""Several processes fit one flow: each computes a share of every batch, and the gradients are added up.

All processes hold the same pairs, draw the same batches from the same seed, and begin from the first process's weights.
A process computes the loss on its own rows, in proportion to all rows; the sum of the gradients is the gradient of
the whole batch. The result is that of one process up to the order in which floating-point numbers are added.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pfm.errors import ProcessLostError
from pfm.flow.coupled import Coupled

__all__ = ["Processes", "Share", "processes"]

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets
TIMEOUT_MINUTES = 30.0


@dataclass(frozen=True)
class Processes:
    """The processes of a fit, and which of them this one is; made by :func:`processes`.

    Attributes:
        rank: the number of this process, from 0.
        count: how many there are.

    >>> Processes().first, Processes().share(10)
    (True, slice(0, 10, None))
    >>> [Processes(rank, 3).share(8) for rank in range(3)]
    [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the first process: the one that writes files and shows progress."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def share(self, number: int) -> slice:
        """Return this process's part of ``number`` items: consecutive, apart from the others', of like size."""
        return slice(self.rank * number // self.count, (self.rank + 1) * number // self.count)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype and device by their sums over all processes, in one message.

        Raises:
            ProcessLostError: another process has ended, or does not answer.
        """
        if not self.several or not tensors:
            return
        message = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._together(lambda: dist.all_reduce(message))
        for tensor, part in zip(tensors, message.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def from_first(self, make: Callable[[], T]) -> T:
        """Make a value in the first process alone, and return it in every one.

        Raises:
            ProcessLostError: as in :meth:`add`.
        """
        if not self.several:
            return make()
        box = [make() if self.first else None]
        self._together(lambda: dist.broadcast_object_list(box, src=0, device=torch.device("cpu")))
        return box[0]  # pyright: ignore[reportReturnType]

    def from_all(self, value: T) -> list[T]:
        """Return the values of all processes, in their order, in every one.

        Raises:
            ProcessLostError: as in :meth:`add`.
        """
        found: list[Any] = [value] * self.count
        if self.several:
            self._together(lambda: dist.all_gather_object(found, value))
        return found

    def check_same(self, what: str, value: str) -> None:
        """Refuse in every process what differs between processes.

        Raises:
            ValueError: it does; the message names the processes that differ from the first.
            ProcessLostError: as in :meth:`add`.
        """
        found = self.from_all(value)
        others = [str(rank) for rank, each in enumerate(found) if each != found[0]]
        if others:
            raise ValueError(
                f"every process must be given the same {what}, and each takes its share by itself: process "
                f"{', '.join(others)} of {self.count} has other {what} than process 0"
            )

    def _together(self, work: Callable[[], object]) -> None:
        try:
            work()
        except RuntimeError as error:
            raise ProcessLostError(
                f"process {self.rank} of {self.count} stops, since another one has ended or does not answer: its own "
                f"error says why. With a checkpoint folder the same command goes on from the last validation ({error})"
            ) from error


class Share:
    """The rows of every batch that this process computes: of each time's rows the same part, in their order.

    Args:
        processes: all of them.
        items: of a batch. strata: different times of a batch, a divisor of it.

    Raises:
        ValueError: there are fewer items than processes.
    """

    def __init__(self, processes: Processes, items: int, strata: int) -> None:
        self.processes, self.items = processes, items
        # Where each item has a time of its own, the times are shared out too.
        self.blocks, self.times = (strata, slice(None)) if strata < items else (1, processes.share(items))
        size = items // self.blocks
        if size < processes.count:
            raise ValueError(
                f"a batch of {items} items at {self.blocks} times has {size} to share out among {processes.count} "
                "processes: start fewer of them, or use a larger batch_size or more pairs"
            )
        part = processes.share(size)
        self.of_all = (part.stop - part.start) / size

    def of(self, batch: Coupled, noise: Tensor | None) -> tuple[Coupled, Tensor | None]:
        """Return this process's rows of a batch and of its noise (B, D) or None."""
        if not self.processes.several:
            return batch, noise
        rows = batch.repeats * self.blocks
        context = None if batch.context is None else self._part(batch.context, self.blocks)
        source, target, weight = (self._part(each, rows) for each in (batch.source, batch.target, batch.weight))
        shared = Coupled(source, target, context, weight, batch.repeats)
        return shared, None if noise is None else self._part(noise, rows)

    def _part(self, rows: Tensor, blocks: int) -> Tensor:
        each = rows.unflatten(0, (blocks, -1))
        an_item = each.shape[1] * self.blocks // self.items
        part = self.processes.share(self.items // self.blocks)
        return each[:, part.start * an_item : part.stop * an_item].flatten(0, 1)


@contextmanager
def processes(*, timeout_minutes: float = TIMEOUT_MINUTES) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` has started, until the block is left; without torchrun there is but one.

    On a machine with CUDA each process takes the device of its local rank; elsewhere they talk through gloo.

    Args:
        timeout_minutes: how long a process waits for another one that has not ended; above 0.

    Raises:
        ValueError: the environment is not one that torchrun makes, or the timeout is not above 0.
        ProcessLostError: in the block, where another process ends or does not answer.

    >>> with processes() as group:
    ...     group.rank, group.count
    (0, 1)
    """
    if not timeout_minutes > 0:
        raise ValueError(f"timeout_minutes must be above 0: got {timeout_minutes}")
    if dist.is_available() and dist.is_initialized():  # by the program around
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Processes()
        return
    if not dist.is_available():
        raise ValueError("this build of torch has no torch.distributed, which several processes need: start one alone")
    if missing := [name for name in VARIABLES if not os.environ.get(name)]:
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} asks for several processes, and {', '.join(missing)} is not set: "
            "start them with torchrun, or unset WORLD_SIZE"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
