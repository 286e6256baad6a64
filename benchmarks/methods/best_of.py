"""Selection among n draws of the reference: best of n by a learned or the true reward, and resampling by b.

Best of n costs n draws an output; KL(best of n || pi_ref) <= log n - (n - 1) / n (Beirami et al. 2024, arXiv
2401.01879). A reward has no doubts: where votes are doubtful, its best of n is sharper than the winner of a
tournament of n by votes, the law of round log2 n, by which it is measured. Resampling draws one of the n with
probability proportional to b: importance sampling of p1 = 2 pi_ref b from pi_ref (Rubin 1987), exact as n grows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.rewards import NetworkReward
from benchmarks.core.bench import Bench
from benchmarks.core.config import BestOfConfig
from benchmarks.laws.laws import Law
from benchmarks.methods.ascent import log_win
from pfm import EncodedPairs
from pfm.preferences import BradleyTerry

__all__ = ["BestOf", "make"]


class BestOf:
    """Draws n - 1 more outputs of the reference, and chooses among all n."""

    def __init__(self, config: BestOfConfig) -> None:
        if config.by not in ("bradley_terry", "network", "win", "oracle"):
            raise ValueError(f"method.by must be 'bradley_terry', 'network', 'win' or 'oracle', got {config.by!r}")
        if config.rule not in ("best", "resample"):
            raise ValueError(f"method.rule must be 'best' or 'resample', got {config.rule!r}")
        if config.rule == "resample" and config.by != "win":
            raise ValueError(f"method.rule='resample' weighs by b and needs method.by='win': got {config.by!r}")
        if config.candidates < 2:
            raise ValueError(f"method.candidates must be at least 2: got {config.candidates}")
        self.config = config
        self.draws = config.candidates
        self.evaluations: float | None = config.candidates if config.by in ("network", "win") else None

    def learn(self, law: Law, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Fit the reward; of the law, the reference's draws are used, and by the oracle its preference."""
        self.law = law
        if self.config.by == "bradley_terry":
            self.rate = BradleyTerry().fit(train).reward
        elif self.config.by == "network":
            model = NetworkReward(bench.seed)
            fitted = model.fit(train)
            self.rate = model.reward
            return fitted.notes()
        elif self.config.by == "win":
            self.rate = log_win(train, bench.seed)
        return {}

    @torch.no_grad()
    def move(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        """Choose (B, D) among y and fresh draws."""
        more = [self.law.reference(context, len(y), generator) for _ in range(self.draws - 1)]
        candidates = torch.stack([y, *more], dim=1)
        if self.config.by == "oracle":
            score = self._oracle(candidates, context)
        else:
            score = torch.stack([self.rate(candidate, context) for candidate in candidates.unbind(1)], dim=1)
        if self.config.rule == "resample":  # the scores are log b
            place = torch.multinomial(score.softmax(1), 1, generator=generator)[:, 0]
        else:
            place = score.argmax(1)
        return candidates[torch.arange(len(y)), place]

    def stages(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> dict[int, Tensor]:
        """Return the outputs under the round they aim at: best of 2^k that of round k, resampling the first."""
        number = 1 if self.config.rule == "resample" else max(1, round(math.log2(self.draws)))
        return {number: self.move(y, context, generator)}

    def _oracle(self, candidates: Tensor, context: Tensor | None) -> Tensor:
        """Return the true rewards (B, n), or where there are none the expected wins in a round robin."""
        rewards = [self.law.reward(candidate, context) for candidate in candidates.unbind(1)]
        known = [reward for reward in rewards if reward is not None]
        if known:
            return torch.stack(known, dim=1)
        wins = [
            sum((self.law.preference(one, other, context) for other in candidates.unbind(1)), torch.zeros(len(one)))
            for one in candidates.unbind(1)
        ]
        return torch.stack(wins, dim=1)


def make(config: BestOfConfig) -> BestOf:
    """Make the method of a config."""
    return BestOf(config)
