"""Batches gathered from encoded pairs, and the candidates of one prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["CandidateRows", "PairBatch"]


class CandidateRows(NamedTuple):
    """Holds the candidates of one prompt as rows of the output table.

    ``context_index`` is the prompt's row among the contexts - without contexts its group -, ``rows`` (n,) int64 are
    rows of the output table, ``scores`` (n,) are the candidates' scores, higher is better.
    """

    context_index: int
    rows: Tensor
    scores: Tensor


@dataclass(frozen=True)
class PairBatch:
    """Holds gathered pairs: chosen and rejected (B, D) flat, context (B, C) or None, the rest (B,)."""

    chosen: Tensor
    rejected: Tensor
    context: Tensor | None
    weight: Tensor
    probability: Tensor

    def to(self, device: Any) -> PairBatch:
        """Copy to a device; on the same one nothing is copied."""
        parts = (self.chosen, self.rejected, self.context, self.weight, self.probability)
        return PairBatch(*(None if part is None else part.to(device, non_blocking=True) for part in parts))  # pyright: ignore[reportArgumentType]

    def joined(self, other: PairBatch) -> PairBatch:
        """Put another batch behind this one."""
        context = None
        if self.context is not None and other.context is not None:
            context = torch.cat([self.context, other.context])
        return PairBatch(
            torch.cat([self.chosen, other.chosen]), torch.cat([self.rejected, other.rejected]), context,
            torch.cat([self.weight, other.weight]), torch.cat([self.probability, other.probability]),
        )  # fmt: skip
