"""Self-play preference optimisation (Wu et al. 2024, arXiv 2405.00675): multiplicative weights against oneself.

Round t multiplies the policy by the exponential of its own win rate,

    pi_{t+1}(y | x) = pi_t(y | x) exp(eta P(y > pi_t | x)) / Z_t(x),

and fits it by regression of log pi_{t+1}/pi_t on eta (P(y > pi_t | x) - 1/2). The half stands in the paper for
log Z / eta; here the energies are free of Z, so that the half changes nothing. With one vote a pair, P is the winner's
1 and the loser's 0, and the loss of a pair is (u(chosen) - eta / 2)^2 + (u(rejected) + eta / 2)^2, the paper's own.

The first round takes everyone's pairs, whose outputs are draws of pi_1 = pi_ref. Every further round draws as many
pairs of the policy reached and asks for as many labels: ``rounds`` times the labels of an offline method.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.policies import Grid, Policy, PolicyMover, Rows, both_energies, fit_sampled, reference_of
from benchmarks.core.bench import Bench
from benchmarks.core.config import SPPOConfig
from benchmarks.laws.laws import Law
from pfm import EncodedPairs

__all__ = ["SPPO", "make", "vote", "win_rate_rows"]


def win_rate_rows(policy: Policy, eta: float, pairs: EncodedPairs) -> Rows:
    """Return the squared errors of the policy's energies from eta (P - 1/2), P being 1 of a winner and 0 of a loser."""
    energies = both_energies(policy, pairs)
    target = eta * (pairs.gather(torch.arange(len(pairs))).probability - 0.5)

    def rows(index: Tensor) -> Tensor:
        chosen, rejected = energies(index)
        return (chosen - target[index]).square() + (rejected + target[index]).square()

    return rows


def vote(law: Law, y: Tensor, other: Tensor, context: Tensor | None, generator: torch.Generator) -> EncodedPairs:
    """Ask the law for one vote a pair of draws (N, D)."""
    first = law.label(y, other, context, generator)[:, None]
    return EncodedPairs(torch.where(first, y, other), torch.where(first, other, y), context)


class SPPO(PolicyMover):
    """Plays against itself for some rounds; ``beta`` is 1 / eta."""

    config: SPPOConfig

    def __init__(self, config: SPPOConfig) -> None:
        super().__init__(config)
        if config.rounds < 1:
            raise ValueError(f"method.rounds must be at least 1: got {config.rounds}")

    def learn(self, law: Law, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Fit on the pairs, then on votes on the policy's own draws; the reference's density is read."""
        grid = Grid.over(law, self.config.cells)
        generator = torch.Generator().manual_seed(bench.seed)
        reference, pairs, notes = reference_of(law, grid), train, []
        self.rounds: list[Policy] = []
        for number in range(self.config.rounds):
            if number:
                context = law.contexts(len(train), generator)
                y, other = (self.policy.sample(context, len(train), generator) for _ in range(2))
                pairs, reference = vote(law, y, other, context, generator), self.policy.log_probability
            policy = self.make(grid, reference, pairs, bench.seed + number)
            rows = win_rate_rows(policy, 1 / self.beta, pairs)
            fitted = fit_sampled(policy, rows, pairs, seed=bench.seed + number)
            # Divergences, like the loss, are from the policy of the round before.
            notes.append(fitted.notes() | self.release(policy, law, pairs, number + 1))
            self.rounds.append(policy)
        self.labels = self.config.rounds * len(train)
        return {"rounds": notes}

    def stages(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> dict[int, Tensor]:
        """Draw (B, D) of every round's policy: round k spends as much as k rounds of best of two."""
        return {number: policy.sample(context, len(y), generator) for number, policy in enumerate(self.rounds, 1)}


def make(config: SPPOConfig) -> SPPO:
    """Make the method of a config."""
    return SPPO(config)
