"""Logistic regression under a Gaussian prior, to the last digit: for the few coefficients whose curvature is wanted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["label_loss", "newton_logistic"]


def label_loss(score: Tensor, label: Tensor) -> Tensor:
    """Return the log loss (..., N), in nats, of log-odds (..., N) under soft labels (N,)."""
    return softplus(-score) + (1 - label) * score


def newton_logistic(
    rows: Tensor,
    label: Tensor,
    weight: Tensor,
    precision: float,
    *,
    offset: Tensor | None = None,
    start: Tensor | None = None,
    iterations: int = 50,
) -> tuple[Tensor, Tensor]:
    """Minimise sum_n weight_n L(label_n, s_n) + precision |w|^2 / 2 over w, where s = offset + rows w.

    L(p, s) = log(1 + exp(-s)) + (1 - p) s is the cross-entropy of a soft label. Newton's method in float64; a step that
    would not lower the sum is halved, so that it arrives from any start.

    Args:
        rows: (N, F) features, or differences of them.
        label: (N,) in [0, 1].
        weight: (N,) >= 0.
        precision: > 0, of the prior.
        offset: (N,) of the scores, or None for 0.
        start: (F,) or None for 0.
        iterations: at most.

    Returns:
        the most probable w (F,), and the Hessian (F, F) there, both float64 on the device of ``rows``.
    """
    x, p, share = rows.double(), label.double(), weight.double()
    beyond = torch.zeros_like(p) if offset is None else offset.double()
    at = x.new_zeros(x.shape[1]) if start is None else start.double()

    def loss(at: Tensor) -> float:
        score = beyond + x @ at
        return float((share * label_loss(score, p)).sum() + precision / 2 * at.square().sum())

    value = loss(at)
    hessian = x.new_zeros(x.shape[1], x.shape[1])
    for _ in range(iterations):
        chance = torch.sigmoid(beyond + x @ at)
        hessian = (x * (share * chance * (1 - chance))[:, None]).T @ x
        hessian.diagonal().add_(precision)
        gradient = x.T @ (share * (chance - p)) + precision * at
        step, length = torch.linalg.solve(hessian, gradient), 1.0
        while loss(at - length * step) > value and length > 1e-6:
            length /= 2
        if length <= 1e-6:  # rounding is all that is left
            break
        at = at - length * step
        value = loss(at)
        if float(step @ gradient) < 1e-12:
            break
    return at, hessian
