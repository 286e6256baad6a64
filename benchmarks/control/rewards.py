"""A Bradley–Terry reward of segments that is a mean of networks, each with its own held-out part of the pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.rewards import NetworkReward
from pfm import EncodedPairs

__all__ = ["RewardEnsemble"]


class RewardEnsemble:
    """Scores outputs by the mean of several :class:`benchmarks.rewards.NetworkReward`."""

    def __init__(self, members: int = 3, seed: int = 0) -> None:
        self._members = [NetworkReward(seed + number) for number in range(members)]

    def fit(self, pairs: EncodedPairs) -> dict[str, float]:
        """Fit every member; say how many held-out pairs confirmed, and the mean loss on those."""
        found = [member.fit(pairs) for member in self._members]
        return {
            "confirmed": float(sum(each.confirmed for each in found)),
            "held_out": sum(each.held_out for each in found) / len(found),
        }

    def reward(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Give the rewards (B,), in log-odds, of outputs y (B, D) under contexts (B, C) or None; differentiable."""
        return torch.stack([member.reward(y, context) for member in self._members]).mean(0)
