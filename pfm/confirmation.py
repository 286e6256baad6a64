"""What counts as confirmed by held-out prompts: one rule for every part that is kept or dropped."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["CONFIRMED", "standard_errors"]

CONFIRMED = 1.645  # standard errors above zero: one-sided 95%


def standard_errors(value: Tensor, group: Tensor) -> float:
    """Give the mean of ``value`` (N,) in standard errors, clustered by ``group`` (N,).

    Rows of one prompt are not independent of each other; with one group only, rows are taken as independent.
    """
    value, group = value.cpu(), group.cpu()
    names, member = torch.unique(group, return_inverse=True)
    if len(names) < 2:
        names, member = torch.arange(len(value)), torch.arange(len(value))
    total = torch.zeros(len(names), dtype=torch.float64).index_add_(0, member, value.double())
    count = torch.bincount(member, minlength=len(names)).double()
    mean = total.sum() / count.sum()
    error = (total - mean * count).square().sum().sqrt() / count.sum()
    if float(error) > 0:
        return float(mean / error)
    return math.inf if float(mean) > 0 else 0.0
