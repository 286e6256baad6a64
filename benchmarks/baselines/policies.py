"""Policies with a likelihood, on the plane: a distribution over the cells of a grid, as fine-tuning needs one.

Fine-tuning opens the generator: it needs log pi(y|x) of the policy and of the reference. On a line or a plane a grid
gives both exactly. A policy here is

    pi(c | x) = pi_ref(c | x) exp(s u(c, x)) / Z(x),    y uniform in the cell c,

with energies u that start at zero, so that training starts at the reference as fine-tuning does; s is 1 unless the
policy is sharpened. log pi / pi_ref is s u up to log Z, which cancels wherever two outputs of one context are
compared. Within a cell the policy is flat: a draw is wrong by half a cell at most, which is the floor of its distance
to any distribution.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.networks import Fitted, Network, fit_early_stopped, pair_loss
from benchmarks.core.bench import Bench
from benchmarks.core.config import PolicyConfig
from benchmarks.laws.laws import Law
from benchmarks.laws.quadrature import Quadrature
from pfm import EncodedPairs

__all__ = [
    "Bins",
    "Grid",
    "NetworkPolicy",
    "PairLoss",
    "Policy",
    "PolicyMover",
    "Reference",
    "Rows",
    "TabularPolicy",
    "both_energies",
    "fit_exactly",
    "fit_sampled",
    "pair_rows",
    "reference_of",
    "round_divergence",
]

SIDE = {1: 256, 2: 48}  # cells a side by dimension
SIDE_UNDER_CONTEXTS = {1: 128, 2: 32}  # each context has its own distribution over the cells
QUADRATURE = {1: 4, 2: 2}  # midpoints a side of a cell
ROWS = 32_768  # rows of one evaluation of a network or a density: what stays in the cache

Reference = Callable[[Tensor | None], Tensor]
"""Gives log-probabilities (G, K) of the cells under contexts (G, C), or (1, K) for None."""

PairLoss = Callable[[Tensor], Tensor]
"""Gives losses (B,) of rho (B,) = log pi/pi_ref of the chosen output, minus that of the rejected one."""

Rows = Callable[[Tensor], Tensor]
"""Gives the losses (B,) of the pairs at index (B,)."""


@dataclass(frozen=True)
class Grid:
    """Cuts the box [low, high]^dimension into side^dimension equal cells; cells are numbered row by row."""

    low: float
    high: float
    dimension: int
    side: int

    @classmethod
    def over(cls, law: Law, side: int | str = "auto") -> Grid:
        """Cut the box of a law.

        Raises:
            ValueError: the law has more than two dimensions.
        """
        if law.dimension not in SIDE:
            raise ValueError(
                f"policies over a grid need a law of one or two dimensions: {law.name} has {law.dimension}"
            )
        sides = SIDE_UNDER_CONTEXTS if law.context_dimension else SIDE
        return cls(*law.box, law.dimension, sides[law.dimension] if side == "auto" else int(side))

    @property
    def cells(self) -> int:
        """Return the number of cells K."""
        return self.side**self.dimension

    @property
    def width(self) -> float:
        """Return the length of a cell's side."""
        return (self.high - self.low) / self.side

    @property
    def centres(self) -> Tensor:
        """Return the cells' centres (K, D)."""
        return self._points(1)[:, 0]

    def index(self, y: Tensor) -> Tensor:
        """Return the cell (B,) of each y (B, D); what lies outside the box belongs to the nearest cell."""
        place = ((y - self.low) / self.width).floor().long().clamp(0, self.side - 1)
        cell = place[:, 0]
        for axis in range(1, self.dimension):
            cell = cell * self.side + place[:, axis]
        return cell

    def sample(self, cell: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one point (B, D) uniformly in each cell (B,)."""
        offset = torch.rand(len(cell), self.dimension, generator=generator) - 0.5
        return self.centres[cell] + offset * self.width

    def log_reference(self, law: Law, context: Tensor | None) -> Tensor:
        """Return the reference's log-probabilities (G, K) of the cells, by midpoint quadrature of its density."""
        points = self._points(QUADRATURE[self.dimension])
        flat = points.flatten(0, 1)
        rows = []
        for part in _groups(context, len(flat)):
            count = 1 if part is None else len(part)
            y = flat.repeat(count, 1)
            density = law.log_density(y, None if part is None else part.repeat_interleave(len(flat), 0))
            rows.append(density.view(count, *points.shape[:2]).logsumexp(2))
        return torch.log_softmax(torch.cat(rows).double(), dim=1).float()

    def _points(self, each: int) -> Tensor:
        """Return each^dimension midpoints of every cell (K, each^D, D)."""
        inside = (torch.arange(each) + 0.5) / each
        axis = self.low + self.width * (torch.arange(self.side)[:, None] + inside)  # (side, each)
        if self.dimension == 1:
            return axis[:, :, None]
        first = axis[:, None, :, None].expand(-1, self.side, -1, each)
        second = axis[None, :, None, :].expand(self.side, -1, each, -1)
        return torch.stack([first, second], dim=-1).reshape(self.cells, each * each, 2)


def reference_of(law: Law, grid: Grid) -> Reference:
    """Return the law's reference over the cells of a grid; without contexts it is worked out once."""
    fixed = grid.log_reference(law, None) if law.context_dimension == 0 else None
    return lambda context: grid.log_reference(law, context) if fixed is None else fixed


def round_divergence(law: Law, number: int = 1) -> float:
    """Return KL(p_k || p_(k-1)) in nats, exactly, of the distribution of round k from that of the round before.

    At most log 2, since p_k = 2 p_(k-1) b_(k-1). Without doubt and ties the first is log 2 - 1/2, best of two's
    log n - (n - 1) / n (arXiv 2401.01879); doubtful preferences spend less.
    """
    shown = law.shown()
    before, after = Quadrature.of(law, None if shown is None else shown[0], rounds=number).mass[-2:]
    return float(torch.xlogy(after, after / before).sum())


class Bins:
    """Sorts contexts into bins: one a distinct context where there are few, else the nearest of k-means' centres."""

    def __init__(self, context: Tensor | None, bins: int = 16, seed: int = 0) -> None:
        self.centres: Tensor | None = None
        if context is None:
            return
        distinct = torch.unique(context, dim=0)
        if len(distinct) > 2 * bins:
            centres = distinct[torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))[:bins]]
            for _ in range(25):
                nearest = torch.cdist(context, centres).argmin(1)
                total = torch.zeros_like(centres).index_add_(0, nearest, context)
                count = torch.bincount(nearest, minlength=len(centres))[:, None]
                centres = torch.where(count > 0, total / count.clamp_min(1), centres)
            distinct = centres
        self.centres = distinct

    def __len__(self) -> int:
        return 1 if self.centres is None else len(self.centres)

    def index(self, context: Tensor | None, count: int) -> Tensor:
        """Return the bin (B,) of each context (B, C); zeros (count,) for None."""
        if self.centres is None or context is None:
            return torch.zeros(count, dtype=torch.long)
        return torch.cdist(context.to(self.centres.dtype), self.centres).argmin(1)


class Policy(nn.Module, ABC):
    """A distribution over the cells of a grid, in terms of a reference and energies.

    Args:
        grid: the cells.
        reference: what it is compared with and starts at.
    """

    def __init__(self, grid: Grid, reference: Reference) -> None:
        super().__init__()
        self.grid = grid
        self.reference = reference
        self.sharpness = 1.0

    @abstractmethod
    def energy(self, cell: Tensor, context: Tensor | None) -> Tensor:
        """Return u (B,) of cells (B,) under contexts (B, C) or None, before sharpening."""

    @abstractmethod
    def energies(self, context: Tensor | None) -> Tensor:
        """Return u (G, K) of all cells under contexts (G, C), or (1, K) for None, before sharpening."""

    def log_ratio(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return log pi/pi_ref (B,) of y (B, D), up to log Z of the context."""
        return self.sharpness * self.energy(self.grid.index(y), context)

    def log_probability(self, context: Tensor | None) -> Tensor:
        """Return log pi (G, K) of all cells under contexts (G, C), or (1, K) for None."""
        return torch.log_softmax(self.reference(context) + self.sharpness * self.energies(context), dim=1)

    @torch.no_grad()
    def sample(self, context: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        """Draw (count, D), under contexts (count, C) or None."""
        if context is None:
            probability = self.log_probability(None)[0].exp()
            cell = torch.multinomial(probability, count, replacement=True, generator=generator)
            return self.grid.sample(cell, generator)
        distinct, member = torch.unique(context, dim=0, return_inverse=True)
        order = member.argsort(stable=True)
        cell, at = torch.empty(count, dtype=torch.long), 0
        for part in _groups(distinct, self.grid.cells):
            assert part is not None
            mine = order[(member[order] >= at) & (member[order] < at + len(part))]
            probability = self.log_probability(part).exp()
            if len(mine) <= 4 * len(part):
                cell[mine] = torch.multinomial(probability[member[mine] - at], 1, generator=generator)[:, 0]
            else:
                for row, each in enumerate(probability):
                    these = mine[member[mine] == at + row]
                    cell[these] = torch.multinomial(each, len(these), replacement=True, generator=generator)
            at += len(part)
        return self.grid.sample(cell, generator)

    @torch.no_grad()
    def divergence(self, context: Tensor | None) -> float:
        """Return KL(pi || reference) in nats, averaged over contexts (G, C)."""
        parts = list(_groups(context, self.grid.cells))
        pieces = [_divergence(self.reference(part), self.sharpness * self.energies(part)) for part in parts]
        return float(torch.cat(pieces).mean())

    @torch.no_grad()
    def sharpen_to(self, divergence: float, context: Tensor | None) -> None:
        """Choose the sharpness at which KL(pi || reference) is ``divergence`` nats on average over contexts (G, C).

        Where the energies are constant no sharpness moves the policy; it stays at the reference.
        """
        parts = [(self.reference(part), self.energies(part)) for part in _groups(context, self.grid.cells)]

        def reached(sharpness: float) -> float:
            return float(torch.cat([_divergence(reference, sharpness * u) for reference, u in parts]).mean())

        spread = max(float(_spread(reference, u)) for reference, u in parts)
        if spread < 1e-6:
            self.sharpness = 0.0
            return
        low, high = math.log(1e-3 / spread), math.log(1e4 / spread)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if reached(math.exp(middle)) < divergence else (low, middle)
        self.sharpness = math.exp(low)


class TabularPolicy(Policy):
    """Has one energy a cell and bin of contexts: nothing that one cell learns tells of another."""

    def __init__(self, grid: Grid, reference: Reference, bins: Bins, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(grid, reference)
        self.bins = bins
        self.table = nn.Parameter(torch.zeros(len(bins), grid.cells, dtype=dtype))

    def energy(self, cell: Tensor, context: Tensor | None) -> Tensor:
        """Look the energies up (B,)."""
        return self.table[self.bins.index(context, len(cell)), cell]

    def energies(self, context: Tensor | None) -> Tensor:
        """Look the rows up (G, K)."""
        return self.table[self.bins.index(context, 1 if context is None else len(context))]


class NetworkPolicy(Policy):
    """Has an energy that is a network of the cell's centre and the context: what it learns, it learns of neighbours."""

    def __init__(self, grid: Grid, reference: Reference, network: Network) -> None:
        super().__init__(grid, reference)
        self.network = network
        self.register_buffer("centres", grid.centres)

    centres: Tensor

    def energy(self, cell: Tensor, context: Tensor | None) -> Tensor:
        """Evaluate the network at the cells' centres (B,)."""
        return self.network(self.centres[cell], context).squeeze(-1)

    def energies(self, context: Tensor | None) -> Tensor:
        """Evaluate the network at all centres (G, K)."""
        if context is None:
            return self.network(self.centres, None).view(1, -1)
        y = self.centres.repeat(len(context), 1)
        return self.network(y, context.repeat_interleave(self.grid.cells, 0)).view(len(context), -1)


def both_energies(policy: Policy, pairs: EncodedPairs) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return the energies of the chosen and of the rejected outputs (B,) of the pairs at index (B,)."""
    every = pairs.gather(torch.arange(len(pairs)))
    cells = torch.stack([policy.grid.index(every.chosen), policy.grid.index(every.rejected)])

    def energies(index: Tensor) -> tuple[Tensor, Tensor]:
        context = None if every.context is None else every.context[index].repeat(2, 1)
        chosen, rejected = policy.energy(cells[:, index].flatten(), context).chunk(2)
        return chosen, rejected

    return energies


def pair_rows(policy: Policy, loss: PairLoss, pairs: EncodedPairs) -> Rows:
    """Return the losses of pairs under the policy, for the fits below."""
    energies = both_energies(policy, pairs)
    probability = pairs.gather(torch.arange(len(pairs))).probability

    def rows(index: Tensor) -> Tensor:
        chosen, rejected = energies(index)
        return pair_loss(loss, chosen - rejected, probability[index])

    return rows


def fit_sampled(policy: Policy, rows: Rows, pairs: EncodedPairs, *, seed: int) -> Fitted:
    """Minimise the mean loss of sampled pairs by Adam, stopped early by held-out pairs."""
    rate = 3e-2 if isinstance(policy, TabularPolicy) else 3e-3
    return fit_early_stopped(policy, rows, pairs, seed=seed, learning_rate=rate)


def fit_exactly(policy: Policy, rows: Rows, pairs: EncodedPairs, iterations: int = 500) -> None:
    """Minimise the weighted mean loss of all pairs by full-batch L-BFGS, to the end.

    For populations: every pair of cells, weighted by how often it is drawn, with its preference as soft label. On
    sampled pairs of a table the logistic losses have no finite minimum.
    """
    every = torch.arange(len(pairs))
    weight = torch.ones(len(pairs)) if pairs.weight is None else pairs.weight
    share = (weight / weight.sum()).double()
    solver = torch.optim.LBFGS(
        policy.parameters(),
        max_iter=iterations,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def total() -> Tensor:
        solver.zero_grad()
        value = share @ rows(every).double()
        value.backward()
        return value

    solver.step(total)  # pyright: ignore[reportArgumentType]


class PolicyMover(ABC):
    """Trains a policy, and answers with fresh draws of it: the draw to be refined plays no part."""

    draws = 1
    evaluations: float | None = None

    def __init__(self, config: PolicyConfig) -> None:
        if config.policy not in ("network", "tabular"):
            raise ValueError(f"method.policy must be 'network' or 'tabular', got {config.policy!r}")
        if config.beta is not None and not config.beta > 0:
            raise ValueError(f"method.beta must be positive, or null to match a divergence: got {config.beta}")
        self.config = config
        # What the energies are learned at; where a divergence is matched, any value would do.
        self.beta = 1.0 if config.beta is None else config.beta

    @abstractmethod
    def learn(self, law: Law, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Train the policy; see :class:`benchmarks.laws.laws.Mover`."""

    def move(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        """Draw (B, D) of the policy under the contexts."""
        return self.policy.sample(context, len(y), generator)

    def make(self, grid: Grid, reference: Reference, train: EncodedPairs, seed: int) -> Policy:
        """Make an untrained policy that starts at the reference."""
        if self.config.policy == "tabular":
            return TabularPolicy(grid, reference, Bins(train.context, seed=seed))
        network = Network(train.dimension, train.context_dimension, seed=seed).standardise(train)
        return NetworkPolicy(grid, reference, network)

    def release(self, policy: Policy, law: Law, train: EncodedPairs, number: int = 1) -> dict[str, Any]:
        """Set the policy's strength, keep it, and say at which beta it is the optimum.

        All losses here depend on beta times the log-ratio only, so that energies learned at beta, multiplied by s,
        are the optimum at beta / s. Unless the config says otherwise the strength is that of the law of round
        ``number``, as the experimenter sets it: an exact figure of the law, the same for all policies.
        """
        context = None if train.context is None else train.context[:256].float()
        if self.config.beta is None:
            target = self.config.divergence
            policy.sharpen_to(round_divergence(law, number) if target is None else target, context)
        self.policy = policy
        return {
            "beta": self.beta / policy.sharpness if policy.sharpness else None,
            "divergence": policy.divergence(context),
            "cells": policy.grid.cells,
        }


def _groups(context: Tensor | None, cells: int) -> Iterator[Tensor | None]:
    """Cut contexts into parts such that a part times its cells makes :data:`ROWS` rows."""
    return iter([None]) if context is None else iter(context.split(max(1, ROWS // cells)))


def _divergence(reference: Tensor, energies: Tensor) -> Tensor:
    log = torch.log_softmax(reference + energies, dim=1)
    # A cell that the reference never visits is never visited: 0 log 0 = 0.
    return torch.where(log.isfinite(), log.exp() * (log - reference), 0.0).sum(1)


def _spread(reference: Tensor, energies: Tensor) -> Tensor:
    """Return the largest standard deviation of the energies under the reference."""
    probability = reference.exp()
    mean = (probability * energies).sum(1, keepdim=True)
    return (probability * (energies - mean).square()).sum(1).sqrt().max()
