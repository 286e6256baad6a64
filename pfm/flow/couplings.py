"""Couplings: the assignment of source samples to target samples in training.

A coupling joins samples of one context. Joining across contexts, as minibatch optimal transport does when it ignores
them, transports each prompt's outputs to other prompts' outputs; the one exception, ``c2ot``, has the distance of
contexts in its cost.

With P(y > y') + P(y' > y) = 1 the winners' distribution is p1 = 2 pi_ref b and the losers' p0 = 2 pi_ref (1 - b), so
pi_ref = (p0 + p1) / 2: a member of a pair picked uniformly at random is a draw from the reference.

That holds for pairs of two independent draws, ties included. Pairs of each liked with each disliked output of a prompt
are not such pairs: their members are an even mixture of liked and disliked outputs, whatever the shares of either, and
that mixture takes the place of pi_ref in all of the above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from pfm._internal.checks import check_choice, check_whole
from pfm._internal.registry import Registry
from pfm.data.encoded import EncodedPairs
from pfm.flow.coupled import SOURCES, Coupled, Coupling, uniforms
from pfm.flow.transported import Independent, Transported

__all__ = [
    "COUPLINGS",
    "SOURCES",
    "BestOf",
    "Coupled",
    "Coupling",
    "Independent",
    "Joined",
    "Paired",
    "Transported",
    "WithoutContext",
    "check_coupling",
    "make_coupling",
    "register_coupling",
]

COUPLINGS = ("paired", "independent", "ot", "c2ot")


class Paired:
    """Joins the two outputs of a labelled pair, as the data give them.

    ``source="rejected"``: loser to winner. ``source="reference"``: each member of the pair to the winner, half
    the weight each: the exact expectation over a member picked at random, so that the source distribution is pi_ref
    and the target distribution p1. A soft label p counts as both labels with weights p and 1 - p.
    """

    def __init__(self, pairs: EncodedPairs, source: str) -> None:
        check_choice("source", source, SOURCES)
        self.pairs = pairs
        self.source = source
        self.soft = pairs.probability is not None
        self.rows_per_item = (2 if source == "reference" else 1) * (2 if self.soft else 1)
        weight = pairs.weight
        self._mean_weight = 1.0 if weight is None else float(weight.mean())

    @property
    def device(self) -> torch.device:
        """Return the device of the samples."""
        return self.pairs.device

    def __len__(self) -> int:
        return len(self.pairs)

    def group_of(self, index: Tensor) -> Tensor:
        """Return the prompts of the pairs at ``index`` (B,), on the CPU."""
        return self.pairs.group[index.cpu()]

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
        return Coupled(torch.cat(sources), torch.cat(targets), batch.context, torch.cat(weights) * scale, len(sources))


class BestOf:
    """Joins a uniform member of a candidate set to the best of m members drawn from it.

    The flow then carries pi_ref to best of m in one pass. Needs pairs that carry candidate sets
    (:meth:`pfm.PreferencePairs.from_scores`, :meth:`~pfm.PreferencePairs.from_rankings`). Of equal scores each is as
    likely to be the best. A set counts with the mean weight of its prompt's pairs.
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
        device = pairs.device
        sizes = [len(entry.rows) for entry in pairs.candidates]
        self._sizes = torch.tensor(sizes, device="cpu").to(device)
        self._starts = self._sizes.cumsum(0) - self._sizes
        scores, orders = zip(*(entry.scores.sort(stable=True) for entry in pairs.candidates), strict=True)
        self._rows = torch.cat([entry.rows[order] for entry, order in zip(pairs.candidates, orders, strict=True)])
        self._equals = _equals(scores)
        # Row n: P(best rank <= k) = C(k + 1, m) / C(n, m) for m of n members drawn without replacement - members of
        # a set of independent draws, so that their best is distributed as the best of m fresh draws.
        largest = max(sizes)
        below = torch.ones(largest + 1, largest, dtype=torch.float64, device="cpu")
        for size in set(sizes):
            ways = [math.comb(rank + 1, best_of) / math.comb(size, best_of) for rank in range(size)]
            below[size, :size] = torch.tensor(ways, dtype=torch.float64, device="cpu")
        self._below = below.to(device)
        contexts = torch.tensor([entry.context_index for entry in pairs.candidates], device="cpu")
        self._context_rows = contexts.to(device)
        weight = pairs.candidate_weights
        # With mean 1 over the items, which are the candidates.
        self._weight = None if weight is None else weight / (weight * self._sizes).sum() * self._sizes.sum()

    @property
    def device(self) -> torch.device:
        """Return the device of the samples."""
        return self.pairs.device

    def __len__(self) -> int:
        return len(self._rows)

    def group_of(self, index: Tensor) -> Tensor:
        """Return the candidate sets of the candidates at ``index`` (B,), on the CPU."""
        return self._set_of(index.to(self.pairs.device)).cpu()

    def _set_of(self, index: Tensor) -> Tensor:
        return torch.searchsorted(self._starts, index, right=True) - 1

    def draw(self, index: Tensor, generator: torch.Generator | None = None) -> Coupled:
        """Join the candidates at ``index`` (B,), counted over all sets, with winners of their sets."""
        index = index.to(self.pairs.device, non_blocking=True)
        group = self._set_of(index)
        size = self._sizes[group]
        uniform = uniforms(len(index), generator, self.pairs.device)[:, None]
        rank = torch.searchsorted(self._below[size], uniform).squeeze(1).clamp(max=len(self._below[0]) - 1)
        rank = torch.minimum(rank, size - 1)
        place = self._starts[group] + rank
        if self._equals is not None:
            first, count = self._equals
            share = uniforms(len(index), generator, self.pairs.device)
            place = first[place] + (share * count[place]).long()
        target = self.pairs.output_rows(self._rows[place])
        source = self.pairs.output_rows(self._rows[index])
        context = self.pairs.context_rows(self._context_rows[group])
        weight = source.new_ones(len(index)) if self._weight is None else self._weight[group]
        return Coupled(source, target, context, weight)


def _equals(sorted_scores: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return for each score of all sets the place of the first equal one and their number; None without ties."""
    firsts, counts, start = [], [], 0
    for scores in sorted_scores:
        _, inverse, count = scores.unique_consecutive(return_inverse=True, return_counts=True)
        firsts.append(start + (count.cumsum(0) - count)[inverse])
        counts.append(count[inverse])
        start += len(scores)
    found = torch.cat(counts)
    return None if bool((found == 1).all()) else (torch.cat(firsts), found)


class Joined:
    """Holds samples that are joined already: source, target (N, D), context (N, C) or None; each its own prompt."""

    rows_per_item = 1

    def __init__(self, source: Tensor, target: Tensor, context: Tensor | None) -> None:
        self.source, self.target, self.context = source, target, context

    @property
    def device(self) -> torch.device:
        """Return the device of the samples."""
        return self.source.device

    def __len__(self) -> int:
        return len(self.source)

    def group_of(self, index: Tensor) -> Tensor:
        """Return the numbers of the samples, (B,), on the CPU."""
        return index.cpu()

    def draw(self, index: Tensor, generator: torch.Generator | None = None) -> Coupled:
        """Gather the samples at ``index`` (B,)."""
        rows = index.to(self.source.device, non_blocking=True)
        context = None if self.context is None else self.context[rows]
        return Coupled(self.source[rows], self.target[rows], context, self.source.new_ones(len(index)))


class WithoutContext:
    """Hides the contexts of another coupling, which joins within them all the same."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling
        self.rows_per_item = coupling.rows_per_item

    @property
    def device(self) -> torch.device:
        """Return the device of the samples."""
        return self.coupling.device

    def __len__(self) -> int:
        return len(self.coupling)

    def group_of(self, index: Tensor) -> Tensor:
        """Return the prompts of the items at ``index`` (B,)."""
        return self.coupling.group_of(index)

    def draw(self, index: Tensor, generator: torch.Generator | None = None) -> Coupled:
        """Join as the other coupling does."""
        return replace(self.coupling.draw(index, generator), context=None)


Builder = Callable[..., Coupling]
"""Makes a coupling: (pairs, *, source, seed) -> Coupling."""
B = TypeVar("B", bound=Builder)

_BUILDERS: Registry[Builder] = Registry(
    "coupling",
    "@pfm.register_coupling({name})",
    {
        "paired": lambda pairs, *, source, seed: Paired(pairs, source),
        "independent": lambda pairs, *, source, seed: Independent(pairs, source),
        "ot": lambda pairs, *, source, seed: Transported(pairs, source, seed=seed),
        "c2ot": lambda pairs, *, source, seed: Transported(pairs, source, across=True, seed=seed),
    },
)


def register_coupling(name: str) -> Callable[[B], B]:
    """Register a coupling of your own, to be named in ``FlowConfig(coupling=name)``.

    Args:
        name: the name.

    Returns:
        a decorator of a class or function ``builder(pairs, *, source, seed)`` that makes a :class:`Coupling` of
        :class:`pfm.EncodedPairs`. It must join samples of one context: to join across contexts carries each prompt's
        outputs to those of other prompts.

    Raises:
        TypeError, ValueError: the name is no name, or another coupling's.

    >>> @register_coupling("losers-only")
    ... def losers_only(pairs, *, source, seed):
    ...     return Paired(pairs, "rejected")
    """

    def register(builder: B) -> B:
        _BUILDERS.add(name, builder)
        return builder

    return register


def check_coupling(coupling: str) -> None:
    """Refuse a coupling that is neither the library's nor registered."""
    _BUILDERS.check(coupling)


def make_coupling(pairs: EncodedPairs, *, source: str, coupling: str, best_of: int = 2, seed: int = 0) -> Coupling:
    """Make the coupling that a configuration names.

    Raises:
        ValueError: unknown names, ``best_of`` above 2 where it has no meaning, or a coupling that needs several
            pairs of one context where each has its own.
    """
    check_coupling(coupling)
    check_whole("best_of", best_of, 2)
    if best_of > 2:
        if source != "reference" or coupling != "paired":
            raise ValueError(
                f"best_of={best_of} carries the reference to best of {best_of} of candidate sets: it goes with "
                f"source='reference' and coupling='paired', got source={source!r} and coupling={coupling!r}"
            )
        return BestOf(pairs, best_of)
    if coupling == "c2ot" and pairs.context_dimension == 0:
        raise ValueError("coupling='c2ot' weighs the distance of contexts, and these pairs have none: use 'ot'")
    if coupling in ("independent", "ot") and len(pairs) > 1 and int(torch.bincount(pairs.pool).max()) == 1:
        raise ValueError(
            f"coupling={coupling!r} joins samples of one context, and each of these {len(pairs)} pairs has its own: "
            "joining across contexts would mix them. Use coupling='paired', or 'c2ot', which has the distance of "
            "contexts in its cost"
        )
    made = _BUILDERS[coupling](pairs, source=source, seed=seed)
    if coupling not in COUPLINGS:
        _check_samples(coupling, made, pairs)
    return made


def _check_samples(name: str, coupling: Coupling, pairs: EncodedPairs) -> None:
    """Refuse a registered coupling whose samples are not of the pairs' shapes.

    Raises:
        ValueError: it has no items, or what it draws has other shapes than :class:`Coupled` says.
    """
    if not len(coupling):
        raise ValueError(f"coupling={name!r} joins no samples of these {len(pairs)} pairs: at least one is needed")
    index = torch.arange(min(2, len(coupling)), device="cpu")
    drawn = coupling.draw(index, torch.Generator().manual_seed(0))
    rows = coupling.rows_per_item * len(index)
    wanted = {"source": (rows, pairs.dimension), "target": (rows, pairs.dimension), "weight": (rows,)}
    if pairs.context_dimension:
        wanted["context"] = rows // drawn.repeats, pairs.context_dimension
    for part, shape in wanted.items():
        got = getattr(drawn, part)
        if got is None or tuple(got.shape) != shape:
            raise ValueError(
                f"coupling={name!r} must draw {part} {shape} for {len(index)} items, {coupling.rows_per_item} rows "
                f"each: got {None if got is None else tuple(got.shape)}"
            )
    if tuple(coupling.group_of(index).shape) != (len(index),):
        raise ValueError(f"coupling={name!r} must give one prompt an item from group_of, ({len(index)},)")
