"""Bradley-Terry preference model: P(y > y') = sigmoid(r(y) - r(y')) with a linear reward r."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pfm.encoded import EncodedPairs, as_float_tensor
from pfm.preferences.logistic import PairwiseLogistic

__all__ = ["BradleyTerry"]


class BradleyTerry:
    """Scores outputs with a linear Bradley-Terry reward (Bradley & Terry 1952), by penalised likelihood.

    The context plays no part: within a prompt a linear term in it cancels.

    Args:
        l2: penalty on the weights, in units of the outputs' mean squared distance from their mean.
    """

    def __init__(self, l2: float = 1e-4) -> None:
        if not l2 > 0:
            raise ValueError(f"l2 must be positive: got {l2}")
        self.l2 = l2
        self._weights: Tensor | None = None
        self._mean = torch.zeros(0)

    def fit(self, pairs: EncodedPairs) -> BradleyTerry:
        """Fit on labelled pairs and return the model itself."""
        batch = pairs.gather(torch.arange(len(pairs)))
        self._mean = (batch.chosen.mean(0) + batch.rejected.mean(0)) / 2
        scale = (batch.chosen - self._mean).square().sum(1).mean().sqrt().clamp_min(1e-12)
        soft = None if pairs.probability is None else batch.probability
        solver = PairwiseLogistic((batch.chosen - batch.rejected) / scale, batch.weight, soft)
        self._weights = solver.fit(self.l2, iterations=100) / scale
        return self

    def reward(self, y: Any, context: Any = None) -> Tensor:
        """Give the reward (B,), in log-odds, of outputs y (B, \\*D)."""
        if self._weights is None:
            raise RuntimeError("BradleyTerry is not fitted: call fit(pairs) first")
        y = as_float_tensor("y", y).float().flatten(1)
        if y.shape[1] != len(self._weights):
            raise ValueError(f"y must have {len(self._weights)} values a row: got {y.shape[1]}")
        return (y - self._mean) @ self._weights

    def score(self, y: Any, other: Any, context: Any = None) -> Tensor:
        """Give the log-odds (B,) that y (B, \\*D) is preferred to other (B, \\*D)."""
        return self.reward(y) - self.reward(other)

    def win_probability(self, y: Any, opponents: Any, context: Any = None) -> Tensor:
        """Give the mean probability (B,) that y (B, D) is preferred to its opponents, (M, D) or (B, M, D)."""
        opponents = as_float_tensor("opponents", opponents).float()
        mine = self.reward(y)
        if opponents.ndim == 3:
            theirs = self.reward(opponents.flatten(0, 1)).unflatten(0, opponents.shape[:2])
        else:
            theirs = self.reward(opponents)[None, :]
        return torch.sigmoid(mine[:, None] - theirs).mean(1)
