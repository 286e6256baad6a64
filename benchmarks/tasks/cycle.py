"""Rock, paper, scissors: a preference that no reward can express, with one inside each part that one can.

Three modes, of which each beats the next with probability ``beats``; two outputs of one mode are compared by their
distance from the origin. Every round has its exact distribution all the same, p_k = 2 p_(k-1) b_(k-1), which
:meth:`Law.round` draws and :class:`Quadrature` computes. The modes' shares m then follow
m_i <- m_i (1 + (2 beats - 1) (m_next - m_previous)), the discrete replicator equation of rock, paper, scissors: equal
shares would stay, but from any other start the product of the shares falls with every round, as the three growth
terms sum to 0 and the logarithm is concave. The iterates circle outwards, each mode in turn holding almost everything
for longer than the one before, and never converge; only inside the modes is there progress, outwards. One round is as
well defined, and as well learned, as for any preference: here the largest mode shrinks, since the mode that beats it
is larger than the one it beats, and each mode moves outwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.core.config import LawConfig
from benchmarks.laws.laws import Law
from benchmarks.laws.task import LawTask

__all__ = ["Cycle", "load"]


@dataclass(frozen=True)
class Cycle(Law):
    """A mixture of three Gaussians with unequal ``shares``, and a cyclic preference.

    An output belongs to the mode with the nearest centre. Mode i beats mode i + 1 (and 2 beats 0) with probability
    ``beats``; inside a mode P(y > y') = sigmoid(``slope`` (|y| - |y'|)). On support is what lies within ``reach``
    standard deviations of a centre.
    """

    name: str = "cycle"
    dimension: int = 2
    context_dimension: int = 0
    box: tuple[float, float] = (-3.6, 3.6)
    shares: tuple[float, float, float] = (0.5, 0.15, 0.35)
    radius: float = 2.0
    deviation: float = 0.3
    beats: float = 0.8
    slope: float = 4.0
    reach: float = 4.0

    def centres(self) -> Tensor:
        """Return the centres (3, 2): above, lower left, lower right."""
        angle = math.pi / 2 + 2 * math.pi * torch.arange(3) / 3
        return self.radius * torch.stack([angle.cos(), angle.sin()], dim=1)

    def mode(self, y: Tensor) -> Tensor:
        """Return the number (B,) of each output's mode."""
        return (y[:, None] - self.centres().to(y)).square().sum(2).argmin(1)

    def reference(self, context: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        """Draw a mode for each output, and its place around the centre."""
        mode = torch.multinomial(torch.tensor(self.shares), count, replacement=True, generator=generator)
        return self.centres()[mode] + self.deviation * torch.randn(count, 2, generator=generator)

    def log_density(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return the logarithm of the weighted sum of the modes' densities."""
        squares = (y[:, None] - self.centres().to(y)).square().sum(2)
        return torch.logsumexp(torch.tensor(self.shares).to(y).log() - squares / (2 * self.deviation**2), dim=1)

    def preference(self, y: Tensor, other: Tensor, context: Tensor | None) -> Tensor:
        """Compare modes, and inside one the distances from the origin."""
        ahead = (self.mode(other) - self.mode(y)) % 3
        inside = torch.sigmoid(self.slope * (y.norm(dim=1) - other.norm(dim=1)))
        between = 0.5 + (self.beats - 0.5) * (3 - 2 * ahead).to(inside)  # one mode ahead: wins; two: loses
        return torch.where(ahead == 0, inside, between)

    def supported(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Tell which outputs lie near a centre."""
        nearest = (y[:, None] - self.centres().to(y)).norm(dim=2).min(1).values
        return nearest <= self.reach * self.deviation


def load(config: LawConfig, seed: int) -> LawTask:
    """Load the task; the seed draws its pairs and what it is measured on."""
    return LawTask(Cycle(), config, seed)
