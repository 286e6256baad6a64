"""A ring on which every context prefers another direction: what is learned must be steered by the context.

All contexts share one reference, and no direction is better than another on average: a method that mixes up
contexts, in its pairs or in its field, gains nothing here, however well it fits the outputs as a whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.core.config import LawConfig
from benchmarks.laws.laws import Law
from benchmarks.laws.task import LawTask

__all__ = ["Ring", "load"]


@dataclass(frozen=True)
class Ring(Law):
    """A ring of blurred ``radius``, with a Bradley–Terry preference for the context's direction.

    A context is a unit vector (cos phi, sin phi) of uniformly random phi; the reward is r(y, x) = ``scale``
    cos(theta - phi), theta the polar angle of y. On support is what lies within ``reach`` standard deviations of the
    circle: all but 0.006% of the reference's draws.
    """

    name: str = "ring"
    dimension: int = 2
    context_dimension: int = 2
    box: tuple[float, float] = (-2.8, 2.8)
    radius: float = 2.0
    deviation: float = 0.15
    scale: float = 2.0
    reach: float = 4.0

    def contexts(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw unit vectors (count, 2)."""
        return _directions(2 * math.pi * torch.rand(count, generator=generator))

    def shown(self) -> Tensor:
        """Return right, upper left and lower left."""
        return _directions(2 * math.pi * torch.arange(3) / 3)

    def reference(self, context: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        """Draw a uniform angle and a normal radius; the context has no part in it."""
        angle = 2 * math.pi * torch.rand(count, generator=generator)
        radius = self.radius + self.deviation * torch.randn(count, generator=generator)
        return radius[:, None] * _directions(angle)

    def log_density(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return the normal density of the radius, spread over its circle."""
        radius = y.norm(dim=1).clamp_min(1e-9)
        return -((radius - self.radius) / self.deviation).square() / 2 - radius.log()

    def preference(self, y: Tensor, other: Tensor, context: Tensor | None) -> Tensor:
        """Return sigmoid(r(y, x) - r(other, x))."""
        return torch.sigmoid(self.reward(y, context) - self.reward(other, context))

    def supported(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Tell which outputs lie near the circle."""
        return (y.norm(dim=1) - self.radius).abs() <= self.reach * self.deviation

    def aligned(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Turn every output (B, 2) by minus its context's angle: the exact distribution is then one under all contexts.

        Beside the contexts themselves, most of the distance between two sets of draws would be that of their contexts.
        """
        cosine, sine = _given(context).unbind(1)
        return torch.stack([cosine * y[:, 0] + sine * y[:, 1], cosine * y[:, 1] - sine * y[:, 0]], dim=1)

    def reward(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return scale times the cosine of the angle between output and context."""
        return self.scale * (torch.nn.functional.normalize(y, dim=1) * _given(context)).sum(1)


def _directions(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _given(context: Tensor | None) -> Tensor:
    if context is None:
        raise ValueError("context (B, 2) is missing: what the ring prefers depends on it")
    return context


def load(config: LawConfig, seed: int) -> LawTask:
    """Load the task; the seed draws its pairs and what it is measured on."""
    return LawTask(Ring(), config, seed)
