"""Outputs of generators that are not text: arrays, images, whatever an encoder encodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["first_equal", "json_output", "same_output"]


def same_output(one: Any, other: Any) -> bool:
    """Return whether two outputs are equal: texts and arrays by their values, others as ``==`` says.

    >>> import numpy as np
    >>> same_output("a", "a"), same_output(np.zeros(2), np.zeros(2)), same_output(np.zeros(2), np.zeros(3))
    (True, True, False)
    """
    if one is other:
        return True
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str) and one == other
    shapes = [getattr(output, "shape", None) for output in (one, other)]
    if shapes[0] != shapes[1]:
        return False
    found = one == other
    try:
        return bool(found)
    except (ValueError, RuntimeError):  # arrays and tensors of several values
        return bool(found.all())


def first_equal(outputs: Sequence[Any], index: int) -> int:
    """Return the lowest index of an output that equals the one at ``index``."""
    return next(place for place, output in enumerate(outputs) if same_output(output, outputs[index]))


def json_output(output: Any) -> Any:
    """Return an output as JSON values: an array as nested lists, anything else unchanged."""
    if isinstance(output, str) or not hasattr(output, "tolist"):
        return output
    return output.tolist()
