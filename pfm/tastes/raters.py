"""Names of raters and groups, and their numbers."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from pfm._internal.checks import check_length, check_shape

__all__ = ["check_names", "number_raters", "renumber"]


def check_names(name: str, values: Any, count: int) -> list[Any]:
    """Return names (N,) as a list, one a pair.

    Raises:
        ValueError: there are not ``count`` of them, or one is missing (None or NaN).
    """
    if isinstance(values, Tensor):
        check_shape(name, values, ("N",), "one a pair")
    listed: list[Any] = values.tolist() if hasattr(values, "tolist") else list(values)
    check_length(name, listed, count, "pair")
    for row, value in enumerate(listed):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise ValueError(f"{name} must name every pair's: number {row} is {value!r}; leave such pairs out")
    return listed


def number_raters(raters: Any, count: int, name: str = "raters") -> tuple[list[Hashable], Tensor]:
    """Number names: give the distinct ones, sorted, and each pair's number (N,) int64.

    Raises:
        ValueError: as :func:`check_names`.
    """
    listed = check_names(name, raters, count)
    distinct = set(listed)
    try:
        ordered = sorted(distinct)
    except TypeError:
        ordered = sorted(distinct, key=str)
    places = {value: place for place, value in enumerate(ordered)}
    return ordered, torch.tensor([places[value] for value in listed])


def renumber(present: list[Hashable], index: Tensor, names: list[Hashable]) -> Tensor:
    """Return numbers (N,) in the order of ``names``, from numbers in that of ``present``.

    Raises:
        ValueError: a group is not named, or a named one has no pairs.
    """
    unknown = [value for value in present if value not in names]
    if unknown:
        raise ValueError(f"groups must be among {names}: pairs are of {unknown} too")
    empty = [name for name in names if name not in present]
    if empty:
        raise ValueError(f"group {empty[0]!r} has no pairs: leave it out of names, or give it pairs")
    return torch.tensor([names.index(value) for value in present])[index]
