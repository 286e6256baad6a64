"""Couplings within a context that are not of the pairs: independent, and by optimal transport."""

from __future__ import annotations

import torch
from torch import Tensor

from pfm._internal.checks import check_choice
from pfm.data.encoded import EncodedPairs
from pfm.flow.coupled import SOURCES, Coupled, join_members, uniforms

__all__ = ["Independent", "Transported"]

BLOCK = 1024  # samples of one assignment problem: it costs the cube of them
CONTEXT_BLUR = 0.05  # root mean square distance of contexts that c2ot joins, in units of their spread


class _Ends:
    """Holds the ends of all pairs: every source and target sample of a pair set, with its weight.

    A sample is a place in the sense of :meth:`pfm.EncodedPairs.members`. ``source="rejected"``: losers to winners.
    ``source="reference"``: both members of a pair, to winners. With a soft label p each member is the winner with
    weight p or 1 - p.
    """

    def __init__(self, pairs: EncodedPairs, source: str) -> None:
        check_choice("source", source, SOURCES)
        count, device = len(pairs), pairs.device
        chosen = 2 * torch.arange(count, device="cpu").to(device)
        rejected = chosen + 1
        ones = torch.ones(count, dtype=torch.float32, device=device)
        weight = ones if pairs.weight is None else pairs.weight / pairs.weight.mean()
        winner = ones if pairs.probability is None else pairs.probability
        both = torch.stack([chosen, rejected], dim=1).flatten()
        won = torch.stack([weight * winner, weight * (1 - winner)], dim=1).flatten()
        lost = torch.stack([weight * (1 - winner), weight * winner], dim=1).flatten()
        self.sources, self.source_weight = _present(both, won + lost if source == "reference" else lost)
        self.targets, self.target_weight = _present(both, won)


def _present(places: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    kept = weight > 0
    return places[kept], weight[kept]


class _Sources:
    """Base of couplings whose items are source samples of pairs, numbered as in `EncodedPairs.members`."""

    rows_per_item = 1
    pairs: EncodedPairs
    _sources: Tensor

    @property
    def device(self) -> torch.device:
        """Return the device of the samples."""
        return self.pairs.device

    def __len__(self) -> int:
        return len(self._sources)

    def group_of(self, index: Tensor) -> Tensor:
        """Return the prompts of the source samples at ``index`` (B,), on the CPU."""
        return self.pairs.group[(self._sources[index.to(self._sources.device)] // 2).cpu()]


class Independent(_Sources):
    """Joins each source sample to any target sample of its context, by their weights.

    Of use where a context holds many samples; :func:`make_coupling` refuses pairs of which each has its own.
    """

    def __init__(self, pairs: EncodedPairs, source: str) -> None:
        self.pairs = pairs
        ends, pool = _Ends(pairs, source), pairs.pool.to(pairs.device)
        self._sources, self._weight = ends.sources, ends.source_weight / ends.source_weight.mean()
        self._pool = pool[ends.sources // 2]
        of_target = pool[ends.targets // 2]
        order = of_target.argsort(stable=True)
        self._targets = ends.targets[order]
        # One running sum over all pools: a pool is an interval of it, a target a piece of that.
        self._sum = ends.target_weight[order].double().cumsum(0)
        self._last = torch.bincount(of_target, minlength=int(pool.max()) + 1).cumsum(0) - 1
        self._high = self._sum[self._last.clamp_min(0)]
        self._low = torch.cat([self._high.new_zeros(1), self._high[:-1]])

    def draw(self, index: Tensor, generator: torch.Generator | None = None) -> Coupled:
        """Join the source samples at ``index`` (B,) with targets of their contexts, drawn afresh."""
        index = index.to(self.pairs.device, non_blocking=True)
        pool = self._pool[index]
        uniform = uniforms(len(index), generator, self.pairs.device)
        place = self._low[pool] + uniform * (self._high[pool] - self._low[pool])
        target = torch.minimum(torch.searchsorted(self._sum, place, right=True), self._last[pool])
        return join_members(self.pairs, self._sources[index], self._targets[target], self._weight[index])


class Transported(_Sources):
    """Joins source and target samples by optimal transport: the least total squared distance of outputs.

    ``across=False`` (``ot``): within a context only, exactly for up to :data:`BLOCK` samples, larger contexts in
    random blocks of that size. ``across=True`` (``c2ot``): in random blocks of all samples, with a multiple of the
    contexts' squared distance in the cost (C2OT, Cheng and Schwing 2503.10636), the smallest power of two at which
    joined contexts are within :data:`CONTEXT_BLUR` of their spread; rows carry the source's context.
    """

    def __init__(self, pairs: EncodedPairs, source: str, *, across: bool = False, seed: int = 0) -> None:
        self.pairs = pairs
        self.context_weight = 0.0
        ends, generator, device = _Ends(pairs, source), torch.Generator().manual_seed(seed), pairs.device
        pool = torch.zeros(len(pairs), dtype=torch.long, device=device) if across else pairs.pool.to(device)
        # Both ends of a pair fall into one block, so that every block has a near context for each of its own.
        order = torch.randperm(len(pairs), generator=generator, device="cpu").to(device)
        sources, targets = [], []
        for ours, theirs in zip(
            _by_pool(pool, ends.sources, ends.source_weight, order),
            _by_pool(pool, ends.targets, ends.target_weight, order), strict=True,
        ):  # fmt: skip
            count = len(ours[0])
            if count == 0:
                continue
            start, stop = _spread(*ours, count), _spread(*theirs, count)
            blocks = -(-count // BLOCK)
            for some, others in zip(start.tensor_split(blocks), stop.tensor_split(blocks), strict=True):
                sources.append(some)
                targets.append(others[self._assign(some, others, across).to(device)])
        self._sources, self._targets = torch.cat(sources), torch.cat(targets)

    def draw(self, index: Tensor, generator: torch.Generator | None = None) -> Coupled:
        """Gather the joined samples at ``index`` (B,)."""
        index = index.to(self.pairs.device, non_blocking=True)
        weight = torch.ones(len(index), dtype=torch.float32, device=self.pairs.device)
        return join_members(self.pairs, self._sources[index], self._targets[index], weight)

    def _assign(self, sources: Tensor, targets: Tensor, across: bool) -> Tensor:
        """Return for each source (n,) the number of its target (n,), on the CPU, where assignments are solved."""
        from scipy.optimize import linear_sum_assignment

        if len(sources) == 1:
            return torch.zeros(1, dtype=torch.long, device="cpu")
        cost = _squares(*(self.pairs.members(part).cpu() for part in (sources, targets)))
        if not across:
            return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])
        ours, theirs = (self.pairs.contexts_of(part // 2) for part in (sources, targets))
        assert ours is not None
        assert theirs is not None
        ours, theirs = ours.cpu(), theirs.cpu()
        apart = _squares(ours, theirs)
        spread = float((ours - ours.mean(0)).square().sum(1).mean())
        weight = self.context_weight or float(cost.mean()) / max(spread, 1e-12)
        while True:
            found = torch.from_numpy(linear_sum_assignment((cost + weight * apart).numpy())[1])
            blur = float(apart.gather(1, found[:, None]).mean())
            if self.context_weight or blur <= CONTEXT_BLUR**2 * spread or weight > 1e12:
                self.context_weight = weight
                return found
            weight *= 2


def _by_pool(pool: Tensor, places: Tensor, weight: Tensor, order: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cut samples into their pools, inside each in the order of their pairs' numbers."""
    by_order = order[places // 2].argsort(stable=True)
    found = by_order[pool[places[by_order] // 2].argsort(stable=True)]
    sizes = torch.bincount(pool[places // 2], minlength=int(pool.max()) + 1).tolist()
    return list(zip(places[found].split(sizes), weight[found].split(sizes), strict=True))


def _spread(places: Tensor, weight: Tensor, count: int) -> Tensor:
    """Take ``count`` of some samples in proportion to their weights: with equal weights each equally often."""
    sums = weight.double().cumsum(0)
    marks = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5).to(sums.device) / count * sums[-1]
    return places[torch.searchsorted(sums, marks).clamp(max=len(places) - 1)]


def _squares(one: Tensor, other: Tensor) -> Tensor:
    """Return all squared distances (n, m) of rows (n, D) and (m, D)."""
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist").square()
