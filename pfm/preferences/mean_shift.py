"""The mean shift: one direction, from the rejected outputs' mean to that of the chosen ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pfm.encoded import EncodedPairs, as_float_tensor

__all__ = ["MeanShift"]


class MeanShift:
    """Scores outputs by their projection on E[y+ - y-], the mean of chosen minus rejected outputs.

    A soft label p points p of the way forward and 1 - p back. Of all directions of one length it is the one along
    which winners lead losers most on average; it is the first step of :class:`BradleyTerry` from weight 0 too, whose
    gradient there is -E[y+ - y-] / 2. The context plays no part.
    """

    def __init__(self) -> None:
        self._direction: Tensor | None = None

    def fit(self, pairs: EncodedPairs) -> MeanShift:
        """Average the labelled pairs' differences by their weights, and return the model itself."""
        weight = torch.ones(len(pairs)) if pairs.weight is None else pairs.weight
        forward = weight if pairs.probability is None else weight * (2 * pairs.probability - 1)
        difference = (pairs.chosen - pairs.rejected).flatten(1).double()
        self._direction = (forward.double() @ difference / weight.double().sum()).float()
        return self

    @property
    def direction(self) -> Tensor:
        """Give E[y+ - y-] (D,), in the outputs' units.

        Raises:
            RuntimeError: the model is not fitted.
        """
        if self._direction is None:
            raise RuntimeError("MeanShift is not fitted: call fit(pairs) first")
        return self._direction

    def reward(self, y: Any, context: Any = None) -> Tensor:
        """Give the projections (B,) of outputs y (B, \\*D), in squared units of the outputs."""
        y = as_float_tensor("y", y).float().flatten(1)
        if y.shape[1] != len(self.direction):
            raise ValueError(f"y must have {len(self.direction)} values a row: got {y.shape[1]}")
        return y @ self.direction

    def score(self, y: Any, other: Any, context: Any = None) -> Tensor:
        """Give by how much y (B, \\*D) lies further along the direction than other (B, \\*D), (B,)."""
        return self.reward(y) - self.reward(other)
