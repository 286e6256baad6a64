"""Ridge regression of one number on centred columns of unit spread, its penalty chosen on left-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pfm.preferences.spectrum import principal_axes

__all__ = ["Ridge", "fit_ridge"]


class Ridge:
    """Fits w minimising the weighted mean of (value - x.w)^2 plus penalty |w|^2, for any penalty at the price of one.

    Args:
        x: (N, F) centred columns. value: (N,) centred. weight: (N,) weights >= 0.
    """

    def __init__(self, x: Tensor, value: Tensor, weight: Tensor) -> None:
        share = weight.double() / weight.double().sum().clamp_min(1e-300)
        values, self._axes = principal_axes(x.double(), share)
        self._values = values.clamp_min(0)
        self._cross = self._axes.T @ (x.double().T @ (share * value.double()))

    def solve(self, penalty: float) -> Tensor:
        """Return the weights (F,) at a penalty > 0, in float64."""
        return self._axes @ (self._cross / (self._values + penalty))


def fit_ridge(
    x: Tensor, value: Tensor, weight: Tensor, fold: Tensor, penalties: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return the weights (F,), and the predictions (N,) of rows by fits that did not see their fold.

    Both are zero if no penalty predicts left-out folds better than zero does.

    Args:
        x: (N, F) centred columns of unit spread; constant ones are zero.
        value: (N,) centred. weight: (N,) weights >= 0. fold: (N,) numbers of the folds.
        penalties: to choose from, in units of the columns' variance.
    """
    x, value, weight = x.double(), value.double(), weight.double()
    nothing = torch.zeros_like(x[0]), torch.zeros_like(value)
    numbers = fold.unique().tolist()
    if len(numbers) < 2:
        return nothing
    fits = {number: Ridge(x[out], value[out], weight[out]) for number in numbers for out in [fold != number]}
    least, best = float(weight @ value.square()), None
    for penalty in penalties:
        predicted = torch.zeros_like(value)
        for number, fit in fits.items():
            predicted[fold == number] = x[fold == number] @ fit.solve(penalty)
        loss = float(weight @ (value - predicted).square())
        if loss < least:
            least, best = loss, (penalty, predicted)
    return nothing if best is None else (Ridge(x, value, weight).solve(best[0]), best[1])
