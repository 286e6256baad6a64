"""Choices and comparisons by one direction in the space of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.core.bench import Bench
from benchmarks.core.config import BradleyTerryConfig, MethodConfig
from benchmarks.selection.selection import Item, candidate_vectors, one_hot
from pfm import EncodedPairs
from pfm.encoders import Encoder
from pfm.preferences import BradleyTerry, MeanShift

__all__ = ["make"]


class LinearChoice:
    """Chooses the candidate of the highest linear reward: best of n, a tie keeps the earlier one."""

    reads_vectors = True

    def __init__(self, model: BradleyTerry | MeanShift) -> None:
        self.model = model

    def fit(self, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Fit the reward."""
        self.model.fit(train)
        return {}

    def learn(self, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Fit the reward."""
        return self.fit(train, bench)

    def compare(self, y: Tensor, other: Tensor, context: Tensor | None) -> Tensor:
        """Return the difference in reward (B,): with Bradley–Terry log-odds, with the mean shift in no unit."""
        return self.model.score(y, other, context)

    def choose(self, items: Sequence[Item], encoder: Encoder) -> NDArray[np.float64]:
        """Encode all candidates at once, and take each item's best."""
        vectors = candidate_vectors(items, encoder)
        best = self.model.reward(vectors.flatten(0, 1)).view(vectors.shape[:2]).argmax(1)
        return one_hot(best.tolist(), vectors.shape[1])


def make(config: MethodConfig) -> LinearChoice:
    """Make Bradley–Terry from its own config, the mean shift from any other."""
    return LinearChoice(BradleyTerry(config.l2) if isinstance(config, BradleyTerryConfig) else MeanShift())
