"""The mean of a number given a context: linear by ridge regression, and what nearby contexts show beyond it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pfm._internal.columns import column_statistics
from pfm.preferences.crossvalidation import deal_folds
from pfm.preferences.ridge import fit_ridge

__all__ = ["ContextMean"]

RIDGES = (10.0, 1.0, 0.1, 0.01, 0.001)  # in units of the contexts' variance
BANDWIDTHS = (1e-3, 1e-2, 0.05, 0.2)  # square of the kernel's width, in units of the contexts' mean squared distance
SHRINKAGES = (0.5, 2.0, 8.0, 32.0)  # rows of value 0 that are added to those near a context
CHECKED = 2048  # rows on which bandwidth and shrinkage are judged
ANCHORS = 2048  # contexts that are kept
ROWS = 1024  # contexts whose distances are held at a time


class ContextMean(nn.Module):
    """Estimates E[value | context], for contexts that were seen and for others.

    Contexts that were seen often, such as the rows of a one-hot code, are estimated by their own rows, shrunk to what
    the linear part predicts; contexts that are all different by the linear part and their neighbours. Ridge, width and
    shrinkage are those that predict left-out prompts, or left-out pairs, best; a part that predicts them no better than
    zero is left out.

    Args:
        context_dimension: number of values C in a context.
        anchors: number of contexts that are kept.
    """

    centre: Tensor
    spread: Tensor
    slope: Tensor
    offset: Tensor
    anchors: Tensor
    sums: Tensor
    counts: Tensor
    width: Tensor
    shrinkage: Tensor

    def __init__(self, context_dimension: int, anchors: int = 0) -> None:
        super().__init__()
        for name, value in {
            "centre": torch.zeros(context_dimension),
            "spread": torch.ones(context_dimension),
            "slope": torch.zeros(context_dimension),
            "offset": torch.zeros(()),
            "anchors": torch.zeros(anchors, context_dimension),
            "sums": torch.zeros(anchors),
            "counts": torch.zeros(anchors),
            "width": torch.ones(()),
            "shrinkage": torch.tensor(math.inf),
        }.items():
            self.register_buffer(name, value)

    def forward(self, context: Tensor) -> Tensor:
        """Return the estimates (B,) at contexts (B, C)."""
        x = (context - self.centre) / self.spread
        found = self.offset + x @ self.slope
        if len(self.anchors) and not bool(torch.isinf(self.shrinkage)):
            nears = (self._kernel(squared_distances(part, self.anchors)) for part in x.split(ROWS))
            found = found + torch.cat([near @ self.sums / (near @ self.counts + self.shrinkage) for near in nears])
        return found

    def nearness(self, context: Tensor, other: Tensor) -> Tensor:
        """Return how near contexts (B, C) are to others (M, C), (B, M): 1 where they are equal, 0 far away."""
        apart = squared_distances((context - self.centre) / self.spread, (other - self.centre) / self.spread)
        return self._kernel(apart)

    def _kernel(self, apart: Tensor) -> Tensor:
        return torch.exp(-apart / (2 * self.width))

    @torch.no_grad()
    def fit(self, context: Tensor, value: Tensor, weight: Tensor, group: Tensor, generator: torch.Generator) -> Tensor:
        """Fit on N contexts (N, C) with values (N,), weights (N,) and prompts (N,); return the estimates there (N,)."""
        total = weight.sum()
        centre, spread = column_statistics(context, weight)
        self.centre.copy_(centre)
        self.spread.copy_(spread)
        self.offset.copy_((value * weight).sum() / total)
        x, left = (context - self.centre) / self.spread, value - self.offset
        self.slope.copy_(fit_ridge(x, left, weight, deal_folds(group, generator), RIDGES)[0])
        self._fit_neighbours(x, left - x @ self.slope, weight, generator)
        return self(context)

    def _fit_neighbours(self, x: Tensor, left: Tensor, weight: Tensor, generator: torch.Generator) -> None:
        """Keep the sums of what is left at each context, and choose how far they reach and how much they count."""
        anchors, member = torch.unique(x, dim=0, return_inverse=True)
        if len(anchors) > ANCHORS:
            kept = torch.randperm(len(anchors), generator=generator)[:ANCHORS]
            place = torch.full((len(anchors),), -1)
            place[kept] = torch.arange(ANCHORS)
            anchors, member = anchors[kept], place[member]
        there = member >= 0
        sums, counts = (
            torch.zeros(len(anchors)).index_add_(0, member[there], rows[there]) for rows in (left * weight, weight)
        )
        self.anchors, self.sums, self.counts = anchors, sums, counts
        some = torch.randperm(len(x), generator=generator)[:CHECKED]
        own = torch.where(there[some], weight[some], 0.0)  # a row takes no part in its own estimate
        distance = 2 * float((x.square().sum(1) * weight).sum() / weight.sum())
        apart = squared_distances(x[some], anchors)
        best = float((left[some].square() * weight[some]).sum())
        chosen = math.inf, 1.0
        for bandwidth in BANDWIDTHS:
            self.width.fill_(max(bandwidth * distance, 1e-12))
            near = self._kernel(apart)
            of_sums, of_counts = near @ sums - own * left[some], (near @ counts - own).clamp_min(0.0)
            for shrinkage in SHRINKAGES:
                error = left[some] - of_sums / (of_counts + shrinkage)
                loss = float((error.square() * weight[some]).sum())
                if loss < best:
                    best, chosen = loss, (shrinkage, float(self.width))
        self.shrinkage.fill_(chosen[0])
        self.width.fill_(chosen[1] if math.isfinite(chosen[0]) else max(BANDWIDTHS[0] * distance, 1e-12))


def squared_distances(x: Tensor, other: Tensor) -> Tensor:
    """Return the squared Euclidean distances (N, M) of rows (N, C) to others (M, C).

    |x|^2 + |y|^2 - 2 x.y is one product of matrices, at a tenth of the time of differences; in float64 its cancellation
    is below the rounding of float32.

    >>> squared_distances(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0], [3.0, 5.0]])).tolist()
    [[0.0, 25.0]]
    """
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # which has no doubles
    first, second = x.to(exact), other.to(exact)
    sizes = first.square().sum(1)[:, None] + second.square().sum(1)
    return (sizes - 2 * first @ second.T).clamp_min(0).to(x.dtype)
