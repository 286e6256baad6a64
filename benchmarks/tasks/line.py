"""Numbers between 0 and 1, of which the larger always wins: the distribution on which everything has a closed form.

With pi_ref = U(0, 1) the losers' distribution is p0(u) = 2 (1 - u), the winners' p1(u) = 2 u, and that of round k has
the distribution function u^(2^k).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.core.config import LawConfig
from benchmarks.laws.laws import Law
from benchmarks.laws.task import LawTask

__all__ = ["Line", "load"]


@dataclass(frozen=True)
class Line(Law):
    """Is U(0, 1) with the order of numbers as its preference; a tie is even.

    ``margin`` beyond either end still counts as support: one percent of the reference's length.
    """

    name: str = "line"
    dimension: int = 1
    context_dimension: int = 0
    box: tuple[float, float] = (0.0, 1.0)
    margin: float = 0.01

    def reference(self, context: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        """Draw uniform numbers (count, 1)."""
        return torch.rand(count, 1, generator=generator)

    def log_density(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return 0 between the ends, minus infinity beyond."""
        inside = (y >= 0) & (y <= 1)
        return torch.where(inside, 0.0, -torch.inf).to(y).squeeze(1)

    def preference(self, y: Tensor, other: Tensor, context: Tensor | None) -> Tensor:
        """Return 1 where y is larger, 0 where it is smaller."""
        return (0.5 * (1 + torch.sign(y - other))).squeeze(1)

    def supported(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Tell which numbers lie between the ends, up to the margin."""
        return ((y >= -self.margin) & (y <= 1 + self.margin)).squeeze(1)

    def reward(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return the number itself."""
        return y.squeeze(1)

    def distribution(self, y: Tensor, number: int) -> Tensor:
        """Return u^(2^number)."""
        return y.squeeze(1).clamp(0, 1) ** 2**number

    def rejected_map(self, u: Tensor) -> Tensor:
        """Return the flow map f(u) = sqrt(1 - (1 - u)^2) from the losers to the winners: equal quantiles."""
        return (1 - (1 - u.clamp(0, 1)).square()).sqrt()

    def rejected_velocity(self, t: float, y: Tensor) -> Tensor:
        """Return the marginal velocity m / 2 of paths from losers to winners, m = min(y / t, (1 - y) / (1 - t))."""
        return self._height(t, y) / 2

    def reference_velocity(self, t: float, y: Tensor) -> Tensor:
        """Return the marginal velocity m^2 / (2 (m + y)) of paths from a random member of a pair to its winner.

        Half of these paths stand still at the winner, with density 2 y; the others are those of losers, with density
        2 m and velocity m / 2.
        """
        height = self._height(t, y)
        return height.square() / (2 * (height + y)).clamp_min(1e-12)

    def _height(self, t: float, y: Tensor) -> Tensor:
        upwards = y / t if t > 0 else torch.full_like(y, torch.inf)
        downwards = (1 - y) / (1 - t) if t < 1 else torch.full_like(y, torch.inf)
        return torch.minimum(upwards, downwards)

    def reference_map(self, u: Tensor) -> Tensor:
        """Return the flow map sqrt(u) of the reference to the winners' distribution."""
        return u.clamp(0, 1).sqrt()


def load(config: LawConfig, seed: int) -> LawTask:
    """Load the task; the seed draws its pairs and what it is measured on."""
    return LawTask(Line(), config, seed)
