"""Gradient ascent on a learned reward: y moves along grad log b(y|x), or along the gradient of a reward.

    y <- y + eta (d / g) grad f(y | x),    f = log b (the win gradient) or a Bradley–Terry network's reward,

d being the root mean square of y+ - y- a coordinate and g that of grad f over draws of the reference, so that eta is
the length of the first step in displacements, whatever the reward's scale. Climbing has no target law: it ends on
the model's hills, off the data if need be, which is why its length has to be chosen. The rule, on held-out pairs:

* the pairs are cut in half; a climber is fitted on one half and a judge of the same kind on the other, so that what
  the climber exploits in its own errors does not count;
* draws of the judge's half are climbed from, for every step size and count;
* a climb counts as off the data where its end is further from its nearest neighbour among the climber's outputs,
  contexts counted in, than 99% of fresh draws are: 1% of fresh draws is, by construction;
* among all settings with at most ``off_support`` off the data, standing still included, the one whose ends the judge
  rates highest is taken; the model is fitted again on all pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks.baselines.rewards import NetworkReward
from benchmarks.core.bench import Bench
from benchmarks.core.config import AscentConfig
from benchmarks.laws.laws import Law
from pfm import EncodedPairs
from pfm._internal.significance import CONFIRMED
from pfm.flow.win import WinHead

__all__ = ["Ascent", "OffData", "climb", "log_win", "make"]

Rating = Callable[[Tensor, Tensor | None], Tensor]

SIZES = (0.01, 0.03, 0.1, 0.3)
STEPS = (1, 2, 4, 8, 16, 32)
TRIED = 500  # draws climbed from
NEIGHBOURS = 8000  # outputs that are the data


def log_win(pairs: EncodedPairs, seed: int) -> Rating:
    """Fit the win head and return log b; the same b for every output where held-out pairs do not confirm its order."""
    head = WinHead(pairs.dimension, pairs.context_dimension)
    confirmed = head.fit(pairs, seed=seed).z > CONFIRMED
    return lambda y, context: logsigmoid(head(y, context) * confirmed)


def _reward(pairs: EncodedPairs, seed: int) -> Rating:
    model = NetworkReward(seed)
    model.fit(pairs)
    return model.reward


FITS = {"win": log_win, "network": _reward}


def climb(rating: Rating, y: Tensor, context: Tensor | None, step: float, steps: int) -> list[Tensor]:
    """Take steps of ``step`` times the gradient; give the places (B, D) after each."""
    path = []
    for _ in range(steps):
        y = y.detach().requires_grad_(True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(rating(y, context).sum(), y)
        y = (y + step * gradient).detach()
        path.append(y)
    return path


class OffData:
    """Tells which outputs lie further from the data than 99% of fresh draws do."""

    def __init__(self, data: Tensor, fresh: Tensor) -> None:
        self.middle, self.spread = data.mean(0), data.std(0, correction=0).clamp_min(1e-6)
        self.data = (data - self.middle) / self.spread
        self.limit = float(self._distance(fresh).quantile(0.99))

    def share(self, rows: Tensor) -> float:
        """Return the share of rows (B, D + C) that are off the data."""
        return float((self._distance(rows) > self.limit).float().mean())

    def _distance(self, rows: Tensor) -> Tensor:
        return torch.cdist((rows - self.middle) / self.spread, self.data).min(1).values


class Ascent:
    """Climbs the reward that it fitted."""

    draws = 1

    def __init__(self, config: AscentConfig) -> None:
        if config.reward not in FITS:
            raise ValueError(f"method.reward must be 'win' or 'network', got {config.reward!r}")
        self.config = config
        self.evaluations: float | None = None

    def learn(self, law: Law, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Choose size and number of the steps by the rule above, then fit on all pairs."""
        fit, seed = FITS[self.config.reward], bench.seed
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        ours, theirs = (train.select(part) for part in order.chunk(2))
        climber, judge = fit(ours, seed), fit(theirs, seed + 1)
        some = theirs.gather(torch.arange(len(theirs))[: 2 * TRIED])
        # A pair's rejected and chosen outputs together are two draws of the reference: take one of either by turns.
        turn = (torch.arange(len(some.chosen)) % 2 == 0)[:, None]
        start, context = torch.where(turn, some.chosen, some.rejected), some.context
        off = OffData(_outputs(ours), _rows(start[TRIED:], None if context is None else context[TRIED:]))
        start, context = start[:TRIED], None if context is None else context[:TRIED]

        def rated(y: Tensor) -> float:
            return float(judge(y, context).detach().mean())

        best = (rated(start), 0.0, 0, off.share(_rows(start, context)))
        tried = []
        unit = _unit(climber, theirs)
        for size in SIZES:
            path = climb(climber, start, context, size * unit, STEPS[-1])
            for steps in STEPS:
                end = path[steps - 1]
                value, away = rated(end), off.share(_rows(end, context))
                tried.append({"size": size, "steps": steps, "rated": value, "off_data": away})
                if away <= self.config.off_support and value > best[0]:
                    best = (value, size, steps, away)
        _, size, steps, away = best
        self.rating, self.steps, self.evaluations = fit(train, seed), steps, steps
        self.step = size * _unit(self.rating, train)
        return {"size": size, "steps": steps, "off_data": away, "tried": tried}

    def move(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        """Climb from y (B, D)."""
        path = climb(self.rating, y, context, self.step, self.steps)
        return path[-1] if path else y.clone()


def _unit(rating: Rating, pairs: EncodedPairs) -> float:
    """Return the step at which climbing from the pairs' outputs moves by their displacement, both root mean squares."""
    batch = pairs.gather(torch.arange(len(pairs))[:NEIGHBOURS])
    moved = climb(rating, batch.rejected, batch.context, 1.0, 1)[0] - batch.rejected
    displacement = (batch.chosen - batch.rejected).square().mean().sqrt()
    return float(displacement / moved.square().mean().sqrt().clamp_min(1e-12))


def _outputs(pairs: EncodedPairs) -> Tensor:
    batch = pairs.gather(torch.arange(len(pairs))[: NEIGHBOURS // 2])
    return torch.cat([_rows(batch.chosen, batch.context), _rows(batch.rejected, batch.context)])


def _rows(y: Tensor, context: Tensor | None) -> Tensor:
    return y if context is None else torch.cat([y, context], dim=1)


def make(config: AscentConfig) -> Ascent:
    """Make the method of a config."""
    return Ascent(config)
