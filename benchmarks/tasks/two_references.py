"""Two generators, one of them better, that share some of what they can say: a pool with exact distributions.

The modes are those of the mixture task, eight on a circle, the further right the better. The first generator draws
from the five on the left, the second from the five on the right; the topmost and the lowest are both's. The reference
is their pool, half and half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.core.config import LawConfig
from benchmarks.laws.task import LawTask
from benchmarks.tasks.mixture import Mixture

__all__ = ["TwoReferences", "load"]


@dataclass(frozen=True)
class TwoReferences(Mixture):
    """The pool of two mixtures over modes of one circle.

    Draws of a pool carry tags. Votes depend on the output alone, so that a tag drawn from its exact posterior, P(k | y)
    proportional to share_k pi_k(y), makes outputs and tags as jointly distributed as those that a pool gives.

    Attributes:
        sources: the modes that each source draws from, all equally often.
        shares: of the sources in the pool.
    """

    name: str = "two_references"
    sources: tuple[tuple[int, ...], ...] = ((2, 3, 4, 5, 6), (6, 7, 0, 1, 2))
    shares: tuple[float, ...] = (0.5, 0.5)

    def source_weights(self) -> Tensor:
        """Return the weight (K, modes) of each mode under each source."""
        weights = torch.zeros(len(self.sources), self.modes)
        for row, modes in zip(weights, self.sources, strict=True):
            row[list(modes)] = 1 / len(modes)
        return weights

    def weights(self) -> Tensor:
        """Return the weight (modes,) of each mode under the pool."""
        return torch.tensor(self.shares) @ self.source_weights()

    def reference(self, context: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        """Draw outputs (count, 2) of the pool."""
        return self._drawn(self.weights(), count, generator)

    def source(self, number: int, count: int, generator: torch.Generator) -> Tensor:
        """Draw outputs (count, 2) of one source."""
        return self._drawn(self.source_weights()[number], count, generator)

    def log_density(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return the logarithm of the pool's density, up to a constant."""
        return self._logs(y, self.weights())

    def source_log_density(self, y: Tensor, number: int) -> Tensor:
        """Return the logarithm of a source's density (B,), up to the pool's constant."""
        return self._logs(y, self.source_weights()[number])

    def tag(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the source (B,) of outputs y (B, 2) of the pool, given the outputs."""
        log = torch.stack(
            [self.source_log_density(y, k) + torch.tensor(share).log() for k, share in enumerate(self.shares)], dim=1
        )
        return torch.multinomial(log.softmax(1), 1, generator=generator).squeeze(1)

    def _drawn(self, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
        mode = torch.multinomial(weights, count, replacement=True, generator=generator)
        return self.centres()[mode] + self.deviation * torch.randn(count, 2, generator=generator)

    def _logs(self, y: Tensor, weights: Tensor) -> Tensor:
        squares = (y[:, None] - self.centres().to(y)).square().sum(2)
        return torch.logsumexp(weights.to(y).log() - squares / (2 * self.deviation**2), dim=1)


def load(config: LawConfig, seed: int) -> LawTask:
    """Load the task; the seed draws its pairs and what it is measured on."""
    return LawTask(TwoReferences(), config, seed)
