"""Comparison of JSON values that hold rounded numbers."""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["assert_alike"]


def assert_alike(one: Any, other: Any) -> None:
    """Compare JSON values; b is rounded to six digits, of which the last may depend on how many rows went together."""
    if isinstance(one, float):
        assert one == pytest.approx(other, abs=2e-6)
    elif isinstance(one, dict | list):
        assert len(one) == len(other)
        for key in one if isinstance(one, dict) else range(len(one)):
            assert_alike(one[key], other[key])
    else:
        assert one == other
