"""The exact distributions of a task's rounds, computed on a grid: what draws of :meth:`Law.round` must agree with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.laws.laws import Law

__all__ = ["Quadrature", "grid"]

_NEGLIGIBLE = 1e-9  # of the highest density: what points below it hold, together, is far below any figure's digits
_CHUNK = 500_000  # comparisons made at once


def grid(law: Law, cells: int) -> Tensor:
    """Return the middles (cells^D, D) of the cells of a law's box, the last coordinate running fastest."""
    low, high = law.box
    middles = low + (high - low) * (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    return torch.cartesian_prod(*[middles] * law.dimension).view(-1, law.dimension)


@dataclass(frozen=True)
class Quadrature:
    """Holds the distributions of rounds 0 to R under one context, as masses at points.

    The rule is the midpoint rule: for smooth densities that vanish at the edge of the box its error falls faster
    than any power of the cells' width, and on the line with deterministic preferences it is exact.

    Attributes:
        law, context: whose laws; context is (C,) or None.
        points: (M, D) middles of cells. mass: (R + 1, M), each row sums to 1.
        volume: of a cell.
    """

    law: Law
    context: Tensor | None
    points: Tensor
    mass: Tensor
    volume: float

    @classmethod
    def of(cls, law: Law, context: Tensor | None = None, *, rounds: int = 1, cells: int | None = None) -> Quadrature:
        """Compute the distributions of all rounds up to ``rounds``: p_k = 2 p_(k-1) b_(k-1).

        Args:
            cells: a side of the box; default 1000 on the line, 40 in the plane, where a cell is then at most as wide
                as a standard deviation of the reference's modes.
        """
        cells = cells or (1000 if law.dimension == 1 else 40)
        points = grid(law, cells)
        density = law.log_density(points, _rows(context, len(points))).exp()
        kept = density > _NEGLIGIBLE * density.max()
        low, high = law.box
        start = density[kept] / density[kept].sum()
        self = cls(law, context, points[kept], start[None], ((high - low) / cells) ** law.dimension)
        wins = self._wins(self.points)
        for _ in range(rounds):
            last = self.mass[-1]
            self = replace(self, mass=torch.cat([self.mass, 2 * (last * (wins @ last))[None]]))
        return self

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean (R + 1,) under every round's distribution of a function's values (M,) at the points."""
        return self.mass @ values.double()

    def rewards(self) -> list[float] | None:
        """Return E[r] of every round; None where no reward orders the outputs."""
        values = self.law.reward(self.points, _rows(self.context, len(self.points)))
        return None if values is None else self.mean(values).tolist()

    def wins(self) -> list[float]:
        """Return for every round the chance that its draw beats an independent draw of the reference."""
        return self.mean(self._wins(self.points) @ self.mass[0]).tolist()

    def density(self, y: Tensor) -> Tensor:
        """Return the densities (R + 1, B) of all rounds at any outputs (B, D)."""
        at_points = self.law.log_density(self.points, _rows(self.context, len(self.points))).exp()
        reference = self.law.log_density(y.double(), _rows(self.context, len(y))).exp()
        found = torch.zeros(len(self.mass), len(y), dtype=torch.float64)
        found[0] = reference / (at_points.sum() * self.volume)
        kept = reference > _NEGLIGIBLE * at_points.max()
        wins = self._wins(y[kept].double())
        for number, mass in enumerate(self.mass[:-1]):
            found[number + 1, kept] = 2 * found[number, kept] * (wins @ mass)
        return found

    def _wins(self, y: Tensor) -> Tensor:
        """Return the chances (B, M) that outputs y (B, D) beat the points."""
        pieces, count = [], len(self.points)
        for part in y.split(max(1, _CHUNK // count)):
            ours, theirs = part.repeat_interleave(count, 0), self.points.repeat(len(part), 1)
            found = self.law.preference(ours, theirs, _rows(self.context, len(ours)))
            pieces.append(found.double().view(len(part), count))
        return torch.cat(pieces)


def _rows(context: Tensor | None, count: int) -> Tensor | None:
    return None if context is None else context.double().expand(count, -1)
