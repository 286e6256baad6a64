"""Equality of results, up to the rounding of a GPU where the tests run on one."""

from __future__ import annotations

import os

import torch
from torch import Tensor

__all__ = ["assert_same"]


def assert_same(one: Tensor, other: Tensor) -> None:
    """Compare bit by bit; on CUDA up to rounding, since there one of the two may have been computed on the CPU."""
    if os.environ.get("PFM_TEST_DEVICE", "").startswith("cuda"):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-3)
    else:
        torch.testing.assert_close(one, other, rtol=0, atol=0)
