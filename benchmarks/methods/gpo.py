"""Generalized preference optimisation: one convex function makes one offline loss f(beta rho) (arXiv 2402.05749).

rho = log pi/pi_ref (chosen) - log pi/pi_ref (rejected). The functions are those of the paper's table; where the
optimum over all pairs of cells is closed, it stands beside (P is the preference, b its mean over pi_ref).

| name | f(z) | is | optimum |
|---|---|---|---|
| logistic | log(1 + e^-z) | DPO | pi_ref exp(r / beta), under Bradley–Terry |
| squared | (z - 1)^2 | IPO with tau = beta / 2 | pi_ref exp(2 b / beta) |
| hinge | max(0, 1 - z) | SLiC | of two outcomes: odds times exp(1 / beta) for the preferred one |
| exponential | e^-z | | pi_ref exp(r / (2 beta)), under Bradley–Terry |
| truncated_quadratic | max(0, 1 - z)^2 | | that of squared, where all |z| <= 1 |
| savage | 1 / (1 + e^z)^2 (not convex) | | that of logistic |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.baselines.policies import Grid, PairLoss, PolicyMover, fit_sampled, pair_rows, reference_of
from benchmarks.core.bench import Bench
from benchmarks.core.config import GPOConfig
from benchmarks.laws.laws import Law
from pfm import EncodedPairs

__all__ = ["CONVEX", "GPO", "make"]

CONVEX: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda z: softplus(-z),
    "squared": lambda z: (z - 1).square(),
    "hinge": lambda z: (1 - z).clamp_min(0),
    "exponential": lambda z: torch.exp(-z),
    "truncated_quadratic": lambda z: (1 - z).clamp_min(0).square(),
    "savage": lambda z: torch.sigmoid(-z).square(),
}


class GPO(PolicyMover):
    """Trains the policy on the pairs by one of :data:`CONVEX`."""

    config: GPOConfig

    def __init__(self, config: GPOConfig) -> None:
        super().__init__(config)
        if config.function not in CONVEX:
            raise ValueError(f"method.function must be one of {', '.join(CONVEX)}: got {config.function!r}")

    def loss(self) -> PairLoss:
        """Return the loss at the beta of training."""
        function, beta = CONVEX[self.config.function], self.beta
        return lambda rho: function(beta * rho)

    def learn(self, law: Law, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Fit on the pairs; of the law, the reference's density is read."""
        grid = Grid.over(law, self.config.cells)
        policy = self.make(grid, reference_of(law, grid), train, bench.seed)
        fitted = fit_sampled(policy, pair_rows(policy, self.loss(), train), train, seed=bench.seed)
        return fitted.notes() | self.release(policy, law, train)


def make(config: GPOConfig) -> GPO:
    """Make the method of a config."""
    return GPO(config)
