"""Choices by one direction in the space of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.bench import Bench
from benchmarks.config import BradleyTerryConfig, MethodConfig
from benchmarks.selection import Item, candidate_vectors, one_hot
from pfm import EncodedPairs
from pfm.encoders import Encoder
from pfm.preferences import BradleyTerry

__all__ = ["make"]


class _Best:
    """Chooses the candidate of the highest reward; a tie keeps the earlier one."""

    reads_vectors = True

    def choose(self, items: Sequence[Item], encoder: Encoder) -> NDArray[np.float64]:
        """Encode all candidates at once, and take each item's best."""
        vectors = candidate_vectors(items, encoder)
        best = self.reward(vectors.flatten(0, 1)).view(vectors.shape[:2]).argmax(1)
        return one_hot(best.tolist(), vectors.shape[1])

    def reward(self, vectors: Tensor) -> Tensor:
        raise NotImplementedError


class MeanShift(_Best):
    """Projects on the mean of chosen minus rejected; a soft label p points p of the way forward and 1 − p back."""

    def fit(self, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Average the differences of all pairs."""
        weight = torch.ones(len(train)) if train.weight is None else train.weight
        forward = weight if train.probability is None else weight * (2 * train.probability - 1)
        self.direction = forward @ (train.chosen - train.rejected) / weight.sum()
        return {}

    def reward(self, vectors: Tensor) -> Tensor:
        """Give the projections (B,)."""
        return vectors @ self.direction


class BradleyTerryChoice(_Best):
    """Takes a linear Bradley–Terry reward: best of n."""

    def __init__(self, l2: float) -> None:
        self.model = BradleyTerry(l2)

    def fit(self, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Fit the reward."""
        self.model.fit(train)
        return {}

    def reward(self, vectors: Tensor) -> Tensor:
        """Give the rewards (B,)."""
        return self.model.reward(vectors)


def make(config: MethodConfig) -> MeanShift | BradleyTerryChoice:
    """Make Bradley–Terry from its own config, the mean shift from any other."""
    return BradleyTerryChoice(config.l2) if isinstance(config, BradleyTerryConfig) else MeanShift()
