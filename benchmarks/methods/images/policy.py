"""Policies over the generator's noise, where the reference N(0, I) has a likelihood: DPO, and RLHF.

The policy is normal, N(m(x), diag s(x)^2) for each digit x, so that a draw z of the reference becomes m + s z.

    DPO   minimises -log sigmoid(beta (log q/p (z+) - log q/p (z-)))          (Rafailov et al. 2023, eq. 7)
    RLHF  maximises E_q r(z, x) - beta KL(q || p), r a network fitted to the pairs   (Ziegler et al. 2019)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.core.bench import Bench
from benchmarks.images.config import PolicyConfig
from benchmarks.images.data import DIGITS, one_hot
from benchmarks.images.generator import Draws
from benchmarks.images.lesson import Lesson
from benchmarks.images.spaces import Noise

__all__ = ["Policy", "make"]

UPDATES, ROWS, LEARNING_RATE = 600, 512, 1e-2


class Policy:
    """Trains one policy for every beta."""

    def __init__(self, config: PolicyConfig) -> None:
        if config.loss not in ("dpo", "rlhf"):
            raise ValueError(f"method.loss must be 'dpo' or 'rlhf': got {config.loss!r}")
        if config.space != "noise":
            raise ValueError(f"method.space must be 'noise', where there is a likelihood: got {config.space!r}")
        self.config = config

    def learn(self, lesson: Lesson, bench: Bench) -> dict[str, Any]:
        """Train on the lesson's pairs."""
        self.space = Noise(lesson.generator)
        y = self.space.encode(lesson.draws)
        pairs = lesson.pairs(y, self.config.labels)
        assert pairs.context is not None
        reward = lesson.reward("noise", y, self.config.labels) if self.config.loss == "rlhf" else None
        chosen, rejected, digit = pairs.chosen, pairs.rejected, pairs.context.argmax(1)
        self.policies: dict[float, tuple[Tensor, Tensor]] = {}
        for beta in self.config.betas:
            mean, log_scale = (torch.zeros(DIGITS, chosen.shape[1], requires_grad=True) for _ in range(2))
            optimizer = torch.optim.Adam([mean, log_scale], lr=LEARNING_RATE)
            random = torch.Generator().manual_seed(bench.seed)
            for update in range(UPDATES):
                optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - update / UPDATES)
                some = torch.randint(len(chosen), (ROWS,), generator=random)
                m, s = mean[digit[some]], log_scale[digit[some]]
                if reward is None:
                    margin = _log_ratio(chosen[some], m, s) - _log_ratio(rejected[some], m, s)
                    loss = softplus(-beta * margin).mean()
                else:
                    z = m + s.exp() * torch.randn(m.shape, generator=random)
                    divergence = ((2 * s).exp() + m.square() - 1 - 2 * s).sum(1) / 2
                    loss = (beta * divergence - reward.reward(z, one_hot(digit[some]))).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            self.policies[beta] = mean.detach(), log_scale.detach().exp()
        return {} if reward is None else {"reward": reward.found}

    @torch.no_grad()
    def move(self, draws: Draws, seed: int) -> dict[str, tuple[Tensor, int]]:
        """Take the draws' noise to each policy's."""
        z, d = self.space.encode(draws), draws.digits
        return {
            f"beta {beta:g}": (self.space.decode(mean[d] + scale[d] * z, d), 1)
            for beta, (mean, scale) in self.policies.items()
        }


def _log_ratio(z: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return log q(z) - log p(z), (B,), of a normal policy and the standard normal reference."""
    return (z.square() - ((z - mean) / log_scale.exp()).square() - 2 * log_scale).sum(1) / 2


def make(config: PolicyConfig) -> Policy:
    """Make the method of a config."""
    return Policy(config)
