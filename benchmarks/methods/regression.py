"""Regression from the rejected output to the chosen one: y is replaced by an estimate of E[y+ | y- = y, context].

Least squares has the conditional mean as its minimum, whatever the model: the mean of all that beats y, of density
pi_ref(y+) P(y+ > y) up to a factor. What was spread around that mean is lost: on the line, where larger numbers win,
y becomes (1 + y) / 2 and half of the spread is gone; where outputs form several modes, or a ring, their mean lies
where no output is. A flow minimises the same loss at every time of its path and integrates it, which keeps the law.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.networks import HELD_OUT, Network, fit_early_stopped
from benchmarks.core.bench import Bench
from benchmarks.core.config import RegressionConfig
from benchmarks.laws.laws import Law
from pfm import EncodedPairs

__all__ = ["Regression", "fit_ridge", "make"]

PENALTIES = (1e-6, 1e-4, 1e-2, 1.0)


class Regression:
    """Predicts the chosen output from the rejected one and the context."""

    draws = 1

    def __init__(self, config: RegressionConfig) -> None:
        if config.model not in ("ridge", "network"):
            raise ValueError(f"method.model must be 'ridge' or 'network', got {config.model!r}")
        self.model = config.model
        self.evaluations: float | None = 1 if config.model == "network" else None

    def learn(self, law: Law, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Fit on the pairs; a soft label p counts as p of a pair and 1 - p of the pair swapped."""
        if self.model == "ridge":
            self.predict, notes = fit_ridge(train, bench.seed)
            return notes
        network = Network(train.dimension, train.context_dimension, train.dimension, seed=bench.seed).standardise(train)
        every = train.gather(torch.arange(len(train)))
        mean = _winners_mean(train)

        def loss(index: Tensor) -> Tensor:
            context = None if every.context is None else every.context[index]
            chosen, rejected, p = every.chosen[index], every.rejected[index], every.probability[index]
            forward = (mean + network(rejected, context) - chosen).square().sum(1)
            if bool((p == 1).all()):
                return forward
            return p * forward + (1 - p) * (mean + network(chosen, context) - rejected).square().sum(1)

        fitted = fit_early_stopped(network, loss, train, seed=bench.seed)
        self.predict: Callable[[Tensor, Tensor | None], Tensor] = lambda y, context: mean + network(y, context)
        return fitted.notes()

    @torch.no_grad()
    def move(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        """Predict what would be chosen over y (B, D)."""
        return self.predict(y, context)


def fit_ridge(pairs: EncodedPairs, seed: int) -> tuple[Callable[[Tensor, Tensor | None], Tensor], dict[str, Any]]:
    """Regress linearly, y+ = A (y-, x) + a, at the penalty of :data:`PENALTIES` that predicts held-out pairs best.

    The penalty is on standardised inputs; the offset is free of it.

    Returns:
        the prediction (y (B, D), context) -> (B, D), and what was found.
    """
    every = pairs.gather(torch.arange(len(pairs)))
    rows = torch.cat([every.rejected, every.chosen])
    target = torch.cat([every.chosen, every.rejected]).double()
    weight = torch.cat([every.weight * every.probability, every.weight * (1 - every.probability)]).double()
    if every.context is not None:
        rows = torch.cat([rows, every.context.repeat(2, 1)], dim=1)
    middle, spread = rows.mean(0), rows.std(0, correction=0).clamp_min(1e-6)

    def design(inputs: Tensor) -> Tensor:
        inputs = ((inputs - middle) / spread).double()
        return torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)

    features = design(rows)
    count = len(every.chosen)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(count, dtype=torch.bool)
    held[order[: max(1, round(HELD_OUT * count))]] = True
    held = held.repeat(2)

    def solve(part: Tensor, penalty: float) -> Tensor:
        scaled = features[part] * (weight[part] / weight[part].sum())[:, None]
        free = torch.full((features.shape[1],), penalty, dtype=torch.float64)
        free[-1] = 0
        return torch.linalg.solve(scaled.T @ features[part] + free.diag(), scaled.T @ target[part])

    def error(matrix: Tensor) -> float:
        each = (features[held] @ matrix - target[held]).square().sum(1)
        return float(weight[held] @ each / weight[held].sum())

    penalty = min(PENALTIES, key=lambda value: error(solve(~held, value)))
    found = {"penalty": penalty, "held_out": error(solve(~held, penalty))}
    matrix = solve(torch.ones_like(held), penalty)

    def predict(y: Tensor, context: Tensor | None) -> Tensor:
        return (design(y if context is None else torch.cat([y, context], dim=1)) @ matrix).to(y.dtype)

    return predict, found


def _winners_mean(pairs: EncodedPairs) -> Tensor:
    batch = pairs.gather(torch.arange(len(pairs)))
    winner = batch.probability[:, None] * batch.chosen + (1 - batch.probability[:, None]) * batch.rejected
    return (batch.weight[:, None] * winner).sum(0) / batch.weight.sum()


def make(config: RegressionConfig) -> Regression:
    """Make the method of a config."""
    return Regression(config)
