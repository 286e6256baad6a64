"""Couplings: which source sample travels to which target sample in training.

Every coupling joins samples of one context only. Joining across contexts (as minibatch optimal transport does
when it ignores contexts) transports each prompt's outputs to other prompts' outputs.

With P(y > y') + P(y' > y) = 1 the winners' law is p1 = 2 pi_ref b and the losers' law p0 = 2 pi_ref (1 - b), so
pi_ref = (p0 + p1) / 2: a member of a pair picked by a fair coin is a draw from the reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pfm.encoded import EncodedPairs

__all__ = ["COUPLINGS", "SOURCES", "BestOf", "Coupled", "Paired", "make_coupling"]

SOURCES = ("reference", "rejected")
COUPLINGS = ("paired",)


@dataclass(frozen=True)
class Coupled:
    """Holds joined samples: source and target (B, D), context (B, C) or None, weight (B,) with mean about 1."""

    source: Tensor
    target: Tensor
    context: Tensor | None
    weight: Tensor


class Paired:
    """Joins the two outputs of a labelled pair, as the data give them.

    ``source="rejected"``: loser to winner. ``source="reference"``: each member of the pair to the winner, half
    the weight each - the expectation of the fair coin, taken exactly, so that the source law is pi_ref and the
    target law p1. A soft label p counts as both labels with weights p and 1 - p.
    """

    def __init__(self, pairs: EncodedPairs, source: str) -> None:
        if source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}: got {source!r}")
        self.pairs = pairs
        self.source = source
        self.soft = pairs.probability is not None
        self.rows_per_item = (2 if source == "reference" else 1) * (2 if self.soft else 1)
        weight = pairs.weight
        self._mean_weight = 1.0 if weight is None else float(weight.mean())

    def __len__(self) -> int:
        return len(self.pairs)

    def group_of(self, index: Tensor) -> Tensor:
        """Give the prompts of the pairs at ``index`` (B,)."""
        return self.pairs.group[index]

    def draw(self, index: Tensor, generator: torch.Generator | None = None) -> Coupled:
        """Join the pairs at ``index`` (B,) into ``rows_per_item * B`` rows."""
        batch = self.pairs.gather(index)
        weight = batch.weight / self._mean_weight
        if self.source == "rejected":
            sources, targets, weights = [batch.rejected], [batch.chosen], [weight * batch.probability]
            if self.soft:
                sources.append(batch.chosen)
                targets.append(batch.rejected)
                weights.append(weight * (1 - batch.probability))
        else:
            sources = [batch.chosen, batch.rejected]
            targets = [batch.chosen, batch.chosen]
            weights = [weight * batch.probability] * 2
            if self.soft:
                sources += [batch.chosen, batch.rejected]
                targets += [batch.rejected, batch.rejected]
                weights += [weight * (1 - batch.probability)] * 2
        scale = 2.0 if self.soft else 1.0
        context = None if batch.context is None else batch.context.repeat(len(sources), 1)
        return Coupled(torch.cat(sources), torch.cat(targets), context, torch.cat(weights) * scale)


class BestOf:
    """Joins a uniform member of a candidate set to the best of m members drawn from it.

    The flow then carries pi_ref to best of m in one pass. Needs pairs that carry candidate sets
    (:meth:`pfm.PreferencePairs.from_scores`, :meth:`~pfm.PreferencePairs.from_rankings`).
    """

    rows_per_item = 1

    def __init__(self, pairs: EncodedPairs, best_of: int) -> None:
        if not pairs.candidates:
            raise ValueError(
                f"best_of={best_of} needs candidate sets with scores, and these pairs carry none: make them with "
                "PreferencePairs.from_scores or from_rankings, or use best_of=2"
            )
        smallest = min(len(entry.rows) for entry in pairs.candidates)
        if best_of > smallest:
            raise ValueError(
                f"best_of={best_of} needs at least {best_of} candidates a prompt, and one prompt has {smallest}: "
                f"use best_of <= {smallest}"
            )
        self.pairs = pairs
        self.best_of = best_of
        # Flat rows sorted by score inside each set, so that a winner is a rank and needs no score look-up.
        self._sizes = torch.tensor([len(entry.rows) for entry in pairs.candidates])
        self._starts = torch.cat([torch.zeros(1, dtype=torch.long), self._sizes.cumsum(0)[:-1]])
        self._rows = torch.cat([entry.rows[entry.scores.argsort(stable=True)] for entry in pairs.candidates])
        # Row n: P(best rank <= k) = C(k + 1, m) / C(n, m) for m of n members drawn without replacement - members of
        # a set of independent draws, so that their best has the law of the best of m fresh draws.
        largest = int(self._sizes.max())
        self._below = torch.ones(largest + 1, largest, dtype=torch.float64)
        for size in self._sizes.unique().tolist():
            ways = [math.comb(rank + 1, best_of) / math.comb(size, best_of) for rank in range(size)]
            self._below[size, :size] = torch.tensor(ways, dtype=torch.float64)
        self._context_rows = torch.tensor([entry.context_index for entry in pairs.candidates])

    def __len__(self) -> int:
        return len(self._rows)

    def group_of(self, index: Tensor) -> Tensor:
        """Give the candidate sets of the candidates at ``index`` (B,)."""
        return torch.searchsorted(self._starts, index, right=True) - 1

    def draw(self, index: Tensor, generator: torch.Generator | None = None) -> Coupled:
        """Join the candidates at ``index`` (B,), counted over all sets, with winners of their sets."""
        group = self.group_of(index)
        size = self._sizes[group]
        uniform = torch.rand(len(index), 1, generator=generator, dtype=torch.float64)
        rank = torch.searchsorted(self._below[size], uniform).squeeze(1).clamp(max=len(self._below[0]) - 1)
        rank = torch.minimum(rank, size - 1)
        target = self.pairs.output_rows(self._rows[self._starts[group] + rank])
        source = self.pairs.output_rows(self._rows[index])
        context = self.pairs.context_rows(self._context_rows[group])
        return Coupled(source, target, context, torch.ones(len(index)))


def make_coupling(pairs: EncodedPairs, *, source: str, coupling: str, best_of: int) -> Paired | BestOf:
    """Make the coupling that a configuration names.

    Raises:
        ValueError: unknown names, or ``best_of`` above 2 where it has no meaning.
    """
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling must be one of {', '.join(COUPLINGS)}: got {coupling!r}")
    if best_of < 2:
        raise ValueError(f"best_of must be at least 2: got {best_of}")
    if best_of == 2:
        return Paired(pairs, source)
    if source != "reference":
        raise ValueError(
            f"best_of={best_of} carries the reference to best of {best_of}: it goes with source='reference', "
            f"got source={source!r}"
        )
    return BestOf(pairs, best_of)
