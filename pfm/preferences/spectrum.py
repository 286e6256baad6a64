"""Principal axes of the rows of a table, at the price of the smaller of its two sides."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["principal_axes"]


def principal_axes(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (r,), rising, and eigenvectors (F, r) of the second moment of rows, sum_n w_n x_n x_n'.

    A penalised linear fit has its optimum in the span of its rows. With fewer rows than columns, N < F, the axes are
    those of the span alone, found from the Gram matrix (N, N), whose positive eigenvalues are the same: N^2 F
    operations in place of F^3.

    Args:
        rows: (N, F).
        weight: (N,) weights >= 0.

    Returns:
        both in float64; r is the smaller of N and F. Axes of eigenvalue 0 are zero where N < F.
    """
    if len(rows) >= rows.shape[1]:
        return torch.linalg.eigh((rows.T @ (rows * weight[:, None])).double())
    weighed = rows.double() * weight.double().sqrt()[:, None]
    values, left = torch.linalg.eigh(weighed @ weighed.T)
    reached = values > values[-1:].clamp_min(1e-300) * 1e-14
    values = torch.where(reached, values, 0.0)
    return values, weighed.T @ (left * torch.where(reached, values, torch.inf).rsqrt())
