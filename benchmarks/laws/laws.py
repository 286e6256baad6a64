"""Tasks of one kind: a method moves draws of a reference, and the distributions it should reach are known exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from benchmarks.core.bench import Bench
from pfm import EncodedPairs

__all__ = ["Flowing", "Law", "Mover", "Staged"]


@dataclass(frozen=True)
class Law(ABC):
    """A reference distribution with a preference over its draws: all of it can be computed.

    Draws are y (B, D); contexts (B, C), or None where the law has none. In round k two draws of round k - 1 are
    compared and the preferred one stays, so that p_k = 2 p_(k-1) b_(k-1), where b_(k-1)(y) is the chance that y beats a
    draw of p_(k-1). While preferences are transitive that is the distribution of the best of 2^k reference draws.

    Attributes:
        name: as in tables. dimension: D. context_dimension: C, 0 for none.
        box: (low, high) of every coordinate, for grids and plots: it holds all of the reference but a millionth.
    """

    name: str
    dimension: int
    context_dimension: int
    box: tuple[float, float]

    def contexts(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Draw contexts (count, C)."""
        return None

    @abstractmethod
    def reference(self, context: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        """Draw count outputs (count, D) of the reference, under contexts (count, C) or None."""

    @abstractmethod
    def log_density(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return the logarithm of the reference's density (B,), up to a constant."""

    @abstractmethod
    def preference(self, y: Tensor, other: Tensor, context: Tensor | None) -> Tensor:
        """Return P(y > other | context) (B,); P(y > other) + P(other > y) = 1."""

    @abstractmethod
    def supported(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Tell which outputs (B,) lie where the reference puts its mass."""

    def reward(self, y: Tensor, context: Tensor | None) -> Tensor | None:
        """Return a reward (B,) that orders outputs as the preference does; None where no reward can."""
        return None

    def aligned(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return outputs (B, D') whose distributions differ wherever they do under a context: (y, x) side by side."""
        return y if context is None else torch.cat([y, context], dim=1)

    def distribution(self, y: Tensor, number: int) -> Tensor | None:
        """Return the distribution function (B,) of a round at y (B, 1); None unless it has a closed form."""
        return None

    def shown(self) -> Tensor | None:
        """Return the contexts (G, C) that figures show; None where the law has none."""
        return self.contexts(3, torch.Generator().manual_seed(0))

    def label(self, y: Tensor, other: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        """Draw whether y is preferred (B,) bool: one vote."""
        return torch.rand(len(y), generator=generator) < self.preference(y, other, context)

    def round(self, number: int, context: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        """Draw (count, D) exactly from a round: a knock-out tournament of 2^number reference draws."""
        if number == 0:
            return self.reference(context, count, generator)
        one = self.round(number - 1, context, count, generator)
        other = self.round(number - 1, context, count, generator)
        return torch.where(self.label(one, other, context, generator)[:, None], one, other)

    def pairs(self, count: int, generator: torch.Generator) -> EncodedPairs:
        """Draw labelled pairs of the reference."""
        context = self.contexts(count, generator)
        one, other = (self.reference(context, count, generator) for _ in range(2))
        first = self.label(one, other, context, generator)[:, None]
        return EncodedPairs(torch.where(first, one, other), torch.where(first, other, one), context)


@runtime_checkable
class Mover(Protocol):
    """Is what a method must be for these tasks.

    ``draws`` is the number of reference draws an output costs, ``evaluations`` that of evaluations of its network
    (None where it has none); both are read after :meth:`learn`. So is ``labels``, if it is there: the number of
    votes that were learned from, where that is not the number of training pairs.
    """

    draws: int
    evaluations: float | None

    def learn(self, law: Law, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Learn from the pairs; return what is worth noting, as JSON values.

        Of the law, a method may use what its kind has: a wrapper the reference's draws, a policy with likelihood
        also the reference's density, one that asks for labels as it goes :meth:`Law.label`, and the oracle all.
        """
        ...

    def move(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        """Refine draws y (B, D) of the reference, under contexts (B, C) or None."""
        ...


@runtime_checkable
class Staged(Protocol):
    """A mover that aims at the distributions of other rounds than the first."""

    def stages(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> dict[int, Tensor]:
        """Refine draws as :meth:`Mover.move` does: {number of a round: the outputs (B, D) that aim at it}.

        The last is what the method is judged by.
        """
        ...


@runtime_checkable
class Flowing(Protocol):
    """A mover whose way can be drawn."""

    def trajectory(self, y: Tensor, context: Tensor | None, times: Tensor) -> Tensor:
        """Return the states (T, B, D) of draws y (B, D) at times (T,) from 0 to 1."""
        ...

    def velocity(self, t: float, y: Tensor, context: Tensor | None) -> Tensor:
        """Return the field (B, D) at points y (B, D)."""
        ...
