"""Multi-reference preference optimisation, MRPO (Le et al. 2024, arXiv 2405.16388): DPO against several references.

The penalty sum_k a_k KL(pi || pi_k) is bounded by KL(pi || pi_v) with the *virtual reference*, the weighted harmonic
mean pi_v = (sum_k a_k / pi_k)^-1, by Jensen's inequality. Under the bound the optimum is closed,

    pi = pi_v exp(r / beta) / Z,        loss -log sigmoid(beta rho),  rho against log pi_v.

References far from the base one, pi_1, are clipped first: log pi_2 into [(1 + e) log pi_1, (1 - e) log pi_1]. The
authors also let e depend on the pair; then no one law is the reference of all pairs and no optimum is closed, so e is
fixed here, which their programme offers too. A second point of freedom: a probability of a cell depends on the
cell's size, so the clip, which is relative to log pi, does as well (theirs depends on the length of a text).

Most laws here have one reference. The second one is made: the reference tilted, pi_2 ~ pi_ref exp(tilt w . y / spread),
with w drawn on the unit sphere by the run's seed. It knows nothing of the preferences, so that in one seed it leans
the right way and in another the wrong way. The pairs are everyone's pairs, drawn from the base reference.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.policies import Grid, PolicyMover, Reference, fit_sampled, pair_rows, reference_of
from benchmarks.core.bench import Bench
from benchmarks.core.config import MRPOConfig
from benchmarks.laws.laws import Law
from benchmarks.methods.dpo import dpo_loss
from pfm import EncodedPairs

__all__ = ["MRPO", "clip_reference", "make", "tilted_reference", "virtual_reference"]


def clip_reference(log_other: Tensor, log_base: Tensor, clip: float) -> Tensor:
    """Clip log-probabilities (G, K), all at most 0, of a reference around those of the base reference."""
    return torch.minimum(torch.maximum(log_other, (1 + clip) * log_base), (1 - clip) * log_base)


def virtual_reference(log_base: Tensor, log_other: Tensor, share: float) -> Tensor:
    """Return log of the weighted harmonic mean (G, K), normalised; ``share`` is the weight of the base reference.

    A cell in which either reference has no mass has none.
    """
    log = -torch.logaddexp(math.log(share) - log_base, math.log1p(-share) - log_other)
    return torch.log_softmax(log, dim=1)


def tilted_reference(base: Reference, grid: Grid, direction: Tensor, tilt: float) -> Reference:
    """Tilt a reference along a unit ``direction`` (D,), by ``tilt`` a standard deviation of the base there."""
    along = grid.centres @ direction

    def reference(context: Tensor | None) -> Tensor:
        log = base(context)
        probability = log.exp()
        mean = (probability * along).sum(1, keepdim=True)
        spread = (probability * (along - mean).square()).sum(1, keepdim=True).sqrt()
        return torch.log_softmax(log + tilt * (along - mean) / spread.clamp_min(1e-12), dim=1)

    return reference


class MRPO(PolicyMover):
    """Trains the policy against the virtual reference of the law's own reference and a tilted copy of it."""

    config: MRPOConfig

    def __init__(self, config: MRPOConfig) -> None:
        super().__init__(config)
        if not 0 < config.share < 1:
            raise ValueError(f"method.share must lie between 0 and 1: got {config.share}")
        if not 0 <= config.clip < 1:
            raise ValueError(f"method.clip must lie in [0, 1): got {config.clip}")

    def learn(self, law: Law, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Fit on the pairs; of the law, the reference's density is read."""
        grid = Grid.over(law, self.config.cells)
        base, other, notes = self.references(law, grid, bench.seed)

        def virtual(context: Tensor | None) -> Tensor:
            log_base = base(context)
            log_other = clip_reference(other(context), log_base, self.config.clip)
            return virtual_reference(log_base, log_other, self.config.share)

        policy = self.make(grid, virtual, train, bench.seed)
        fitted = fit_sampled(
            policy, pair_rows(policy, lambda rho: dpo_loss(rho, self.beta), train), train, seed=bench.seed
        )
        # The divergence, as all of the method, is from the virtual reference.
        return fitted.notes() | self.release(policy, law, train) | notes

    def references(self, law: Law, grid: Grid, seed: int) -> tuple[Reference, Reference, dict[str, Any]]:
        """Return the base reference, the other one, and what is worth noting of them."""
        base = reference_of(law, grid)
        direction = torch.randn(law.dimension, generator=torch.Generator().manual_seed(seed))
        direction = direction / direction.norm()
        return base, tilted_reference(base, grid, direction, self.config.tilt), {"direction": direction.tolist()}


def make(config: MRPOConfig) -> MRPO:
    """Make the method of a config."""
    return MRPO(config)
