"""Eight modes on a circle; the further right, the better: a reference with gaps, between which no output may lie."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.core.config import LawConfig
from benchmarks.laws.laws import Law
from benchmarks.laws.task import LawTask

__all__ = ["Mixture", "load"]


@dataclass(frozen=True)
class Mixture(Law):
    """A mixture of ``modes`` equal Gaussians on a circle, with a Bradley–Terry preference.

    The reward is r(y) = ``scale`` cos(theta), theta the polar angle of y, and P(y > y') = sigmoid(r(y) - r(y')).
    On support is what lies within ``reach`` standard deviations of a centre: all but exp(-reach^2 / 2) = 0.03% of the
    reference's draws.
    """

    name: str = "mixture"
    dimension: int = 2
    context_dimension: int = 0
    box: tuple[float, float] = (-2.8, 2.8)
    modes: int = 8
    radius: float = 2.0
    deviation: float = 0.15
    scale: float = 2.0
    reach: float = 4.0

    def centres(self) -> Tensor:
        """Return the centres (modes, 2), the first of which is the best."""
        angle = 2 * math.pi * torch.arange(self.modes) / self.modes
        return self.radius * torch.stack([angle.cos(), angle.sin()], dim=1)

    def reference(self, context: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        """Draw a mode for each output, and its place around the centre."""
        mode = torch.randint(self.modes, (count,), generator=generator)
        return self.centres()[mode] + self.deviation * torch.randn(count, 2, generator=generator)

    def log_density(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return the logarithm of the sum of the modes' densities."""
        squares = (y[:, None] - self.centres().to(y)).square().sum(2)
        return torch.logsumexp(-squares / (2 * self.deviation**2), dim=1)

    def preference(self, y: Tensor, other: Tensor, context: Tensor | None) -> Tensor:
        """Return sigmoid(r(y) - r(other))."""
        return torch.sigmoid(self.reward(y, context) - self.reward(other, context))

    def supported(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Tell which outputs lie near a centre."""
        nearest = (y[:, None] - self.centres().to(y)).norm(dim=2).min(1).values
        return nearest <= self.reach * self.deviation

    def reward(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return scale times the cosine of the polar angle."""
        return self.scale * y[:, 0] / y.norm(dim=1).clamp_min(1e-9)


def load(config: LawConfig, seed: int) -> LawTask:
    """Load the task; the seed draws its pairs and what it is measured on."""
    return LawTask(Mixture(), config, seed)
