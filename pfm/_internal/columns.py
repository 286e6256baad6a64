"""The unit of each column of a table: its own weighted spread, whatever the other columns' units are.

Everything that penalises, compares or joins columns divides them by this spread first, so that a change of a column's
unit or origin changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ROUNDING", "column_statistics", "weighted_mean"]

ROUNDING = 2.0**-23  # relative spacing of float32: a column that varies by less is constant
CHUNK = 8192


def column_statistics(rows: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return each column's weighted mean (D,) and spread (D,), in float64.

    The spread is the standard deviation around the mean, in the column's own unit, and infinite where the column is
    constant to the rounding of float32: divided by it, a constant column is zero.

    Args:
        rows: (N, D), N >= 1.
        weight: (N,) weights >= 0, not all 0, or None for 1.

    >>> mean, spread = column_statistics(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    >>> mean.tolist(), spread.tolist()
    ([2.0, 5.0], [1.0, inf])
    """
    if weight is not None and not bool((weight > 0).all()):
        rows, weight = rows[weight > 0], weight[weight > 0]
    equal = weight is None or bool((weight == weight[0]).all())
    share = rows.new_ones(len(rows), dtype=torch.float64) if weight is None or equal else weight.double()
    share = share / share.sum()
    parts = list(zip(rows.split(CHUNK), share.split(CHUNK), strict=True))
    mean = torch.stack([own @ part.double() for part, own in parts]).sum(0)
    squares = torch.stack([own @ (part.double() - mean).square() for part, own in parts]).sum(0)
    spread = squares.sqrt()
    return mean, torch.where(spread > ROUNDING * rows.abs().amax(0), spread, torch.inf)


def weighted_mean(rows: Tensor, weight: Tensor | None) -> Tensor:
    """Return the mean (D,) of rows (N, D) with weights (N,), or None for 1; of equal weights to the last bit alike."""
    if weight is None or bool((weight == weight[0]).all()):
        return rows.mean(0)
    return weight @ rows / weight.sum()
