"""Joined samples, and what a coupling must have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pfm.data.encoded import EncodedPairs

__all__ = ["SOURCES", "Coupled", "Coupling", "join_members", "uniforms"]

SOURCES = ("reference", "rejected")


@dataclass(frozen=True)
class Coupled:
    """Holds joined samples: source and target (B, D), weight (B,) with mean about 1, context (B / r, C) or None.

    The rows are r = ``repeats`` blocks, and row i of every block has context i: what the rows of an item share is
    kept, and computed, once.
    """

    source: Tensor
    target: Tensor
    context: Tensor | None
    weight: Tensor
    repeats: int = 1

    def row_context(self) -> Tensor | None:
        """Return every row's context, (B, C)."""
        return None if self.context is None else self.context.repeat(self.repeats, 1)

    def to(self, device: torch.device) -> Coupled:
        """Copy to a device; on the same one nothing is copied."""
        return self.map(lambda part: part.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> Coupled:
        """Change every tensor."""
        context = None if self.context is None else change(self.context)
        return Coupled(change(self.source), change(self.target), context, change(self.weight), self.repeats)


class Coupling(Protocol):
    """The source of joined samples for training.

    ``rows_per_item`` is the number of rows :meth:`draw` makes of an item. Samples are on ``device``, that of the
    pairs; random numbers are drawn on the generator's, so that one seed gives the same samples on every device.
    """

    rows_per_item: int

    @property
    def device(self) -> torch.device:
        """Return the device of the samples."""
        ...

    def __len__(self) -> int:
        """Count the items."""
        ...

    def group_of(self, index: Tensor) -> Tensor:
        """Return the prompts of the items at ``index`` (B,), on the CPU."""
        ...

    def draw(self, index: Tensor, generator: torch.Generator | None = None) -> Coupled:
        """Join the items at ``index`` (B,), on any device, into ``rows_per_item * B`` rows."""
        ...


def join_members(pairs: EncodedPairs, sources: Tensor, targets: Tensor, weight: Tensor) -> Coupled:
    """Join members of pairs by their numbers (B,), 2 i of the chosen and 2 i + 1 of the rejected output of pair i."""
    return Coupled(pairs.members(sources), pairs.members(targets), pairs.contexts_of(sources // 2), weight)


def uniforms(count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw uniform numbers (count,) in float64 where the generator is, and bring them to a device."""
    where = device if generator is None else generator.device
    return torch.rand(count, generator=generator, dtype=torch.float64, device=where).to(device, non_blocking=True)
