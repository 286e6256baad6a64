"""Reinforcement learning from human feedback: a learned reward, then a policy that gains by it near the reference.

1. The reward r is a Bradley–Terry network on the same pairs (:class:`benchmarks.baselines.rewards.NetworkReward`).
2. The policy maximises E_pi[r] - beta KL(pi || pi_ref) (Ziegler et al. 2019, arXiv 1909.08593, eq. 2; Ouyang et al.
   2022, arXiv 2203.02155, eq. 2 without the term on pretraining data). Its maximum is known:

       pi = pi_ref exp(r / beta) / Z.

``optimum="closed"`` takes the maximum itself; ``optimum="gradient"`` climbs to it with a network policy, by the policy
gradient in which every cell is summed over instead of sampled, so that what remains of a difference is the
optimiser's and not the estimate's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.policies import Grid, Policy, PolicyMover, Reference, TabularPolicy, reference_of
from benchmarks.baselines.rewards import NetworkReward
from benchmarks.core.bench import Bench
from benchmarks.core.config import RLHFConfig
from benchmarks.laws.laws import Law
from pfm import EncodedPairs

__all__ = ["RLHF", "RewardPolicy", "climb", "make"]


class RewardPolicy(Policy):
    """Has the reward divided by beta as energy: the optimum of the regularised objective."""

    def __init__(self, grid: Grid, reference: Reference, model: NetworkReward, beta: float) -> None:
        super().__init__(grid, reference)
        self.model, self.beta, self.centres = model, beta, grid.centres

    def energy(self, cell: Tensor, context: Tensor | None) -> Tensor:
        """Return r / beta (B,) at the cells' centres."""
        return self.model.reward(self.centres[cell], context) / self.beta

    def energies(self, context: Tensor | None) -> Tensor:
        """Return r / beta (G, K) at all centres."""
        if context is None:
            return self.model.reward(self.centres).view(1, -1) / self.beta
        y = self.centres.repeat(len(context), 1)
        return self.model.reward(y, context.repeat_interleave(len(self.centres), 0)).view(len(context), -1) / self.beta


def climb(
    policy: Policy, target: Policy, context: Tensor | None, *, seed: int, updates: int = 400, rows: int = 16
) -> None:
    """Maximise E_pi[r] - beta KL(pi || pi_ref) by Adam, in place; r / beta are the energies of ``target``.

    Divided by beta the objective is E_pi[target's energies - log pi / pi_ref], summed exactly over all cells.

    Args:
        policy: what is trained. target: has the reward as energies; contexts (N, C) or None: of the training pairs.
        seed: of the batches. updates, rows: so many updates of so many contexts.
    """
    generator = torch.Generator().manual_seed(seed)
    rate = 3e-2 if isinstance(policy, TabularPolicy) else 5e-3
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        some = None if context is None else context[torch.randint(len(context), (rows,), generator=generator)]
        with torch.no_grad():
            reference, reward = target.reference(some), target.sharpness * target.energies(some)
        log = torch.log_softmax(reference + policy.energies(some), dim=1)
        gain = torch.where(reference.isfinite(), log.exp() * (reward - (log - reference)), 0.0).sum(1).mean()
        optimizer.zero_grad()
        (-gain).backward()
        optimizer.step()
        schedule.step()


class RLHF(PolicyMover):
    """Fits the reward, and takes or climbs to the optimum of the regularised objective."""

    config: RLHFConfig

    def __init__(self, config: RLHFConfig) -> None:
        super().__init__(config)
        if config.optimum not in ("closed", "gradient"):
            raise ValueError(f"method.optimum must be 'closed' or 'gradient', got {config.optimum!r}")

    def learn(self, law: Law, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Fit on the pairs; of the law, the reference's density is read."""
        model = NetworkReward(bench.seed)
        fitted = model.fit(train)
        grid = Grid.over(law, self.config.cells)
        best = RewardPolicy(grid, reference_of(law, grid), model, self.beta)
        # The optimum is known for every beta, so that beta is matched on it and not on what climbing reached.
        notes = fitted.notes() | self.release(best, law, train)
        if self.config.optimum == "gradient" and best.sharpness:
            self.policy = self.make(grid, best.reference, train, bench.seed)
            context = None if train.context is None else train.context.float()
            climb(self.policy, best, context, seed=bench.seed)
            notes["divergence"] = self.policy.divergence(None if context is None else context[:256])
        return notes


def make(config: RLHFConfig) -> RLHF:
    """Make the method of a config."""
    return RLHF(config)
