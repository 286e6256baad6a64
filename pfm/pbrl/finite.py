"""A fast check for finite numbers, which runs at every step of every episode."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["all_finite"]


def all_finite(array: np.ndarray) -> bool:
    """Return whether an array holds neither NaN nor infinity: by a sum of squares, and one by one if that overflows."""
    flat = array.ravel()
    with np.errstate(over="ignore"):
        return math.isfinite(flat.dot(flat)) or bool(np.isfinite(array).all())
