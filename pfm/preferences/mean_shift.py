"""The mean shift: one direction, from the rejected outputs' mean to that of the chosen ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pfm.data.encoded import EncodedPairs
from pfm.preferences.base import Embedded, PreferenceModel, check_pairs

__all__ = ["MeanShift"]


class MeanShift(PreferenceModel):
    """Scores outputs by their projection on E[y+ - y-], the mean of chosen minus rejected outputs.

    A soft label p points p of the way forward and 1 - p back. Of all directions of one length it is the one along
    which winners lead losers most on average; it is the first step of :class:`BradleyTerry` from weight 0 too, whose
    gradient there is -E[y+ - y-] / 2. The context plays no part, and the score's unit is that of squared outputs:
    what it gives as log-odds is not calibrated.
    """

    _direction: Tensor

    def _build(self, dimension: int) -> None:
        self.dimension = dimension
        self.register_buffer("_direction", torch.zeros(dimension))

    def fit(self, pairs: EncodedPairs, validation: EncodedPairs | None = None, *, progress: bool = False) -> MeanShift:
        """Average the labelled pairs' differences by their weights, and return the model itself.

        There is nothing to decide: ``validation`` and ``progress`` change nothing.
        """
        check_pairs(pairs, validation)
        weight = torch.ones(len(pairs)) if pairs.weight is None else pairs.weight
        forward = weight if pairs.probability is None else weight * (2 * pairs.probability - 1)
        difference = (pairs.chosen - pairs.rejected).flatten(1).double()
        self._ready(dimension=pairs.dimension)
        self._direction.copy_(forward.double() @ difference / weight.double().sum())
        return self

    def _rescale(self, slope: float) -> None:
        self._direction *= slope

    @property
    def direction(self) -> Tensor:
        """Return E[y+ - y-] (D,), in the outputs' units.

        Raises:
            RuntimeError: the model is not fitted.
        """
        if self.layout is None:
            raise RuntimeError("MeanShift is not fitted: call fit(pairs) first")
        return self._direction

    def reward(self, y: Any, context: Any = None) -> Tensor:
        """Return the projections (B,) of outputs y (B, \\*D), in squared units of the outputs."""
        y, _ = self._checked("y", y, None)
        return y @ self.direction

    def embed(self, y: Tensor, context: Tensor | None) -> Embedded:
        """Embed outputs (B, D) by their projection alone."""
        return Embedded(y @ self._direction, y.new_zeros(*y.shape[:-1], 0))
