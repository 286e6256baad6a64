"""Penalised logistic regression on differences: the solver under every linear preference model here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from pfm.preferences.newton import newton_logistic
from pfm.preferences.spectrum import principal_axes

__all__ = ["PairwiseLogistic", "fit_platt", "fit_temperature", "pairwise_log_loss", "smooth_labels"]


class PairwiseLogistic:
    """Fits w minimising the weighted mean of log(1 + exp(-d.w)) + (1 - p) d.w, plus l2 |w|^2.

    The difference rows d are rotated once to the axes of their second moment; there the Hessian at w = 0,
    diag(moment) / 4 + 2 l2, is diagonal and a good preconditioner for every penalty, so that a path of penalties
    costs few passes over the data. Of more features than rows only the rows' span is rotated, which holds the optimum.

    Args:
        difference: (N, F) features of the chosen minus features of the rejected output.
        weight: (N,) weights >= 0, or None for 1.
        probability: (N,) soft labels P(chosen is preferred), or None for 1.
    """

    def __init__(self, difference: Tensor, weight: Tensor | None = None, probability: Tensor | None = None) -> None:
        count = difference.shape[0]
        share = difference.new_ones(count) if weight is None else weight
        self._share = share / share.sum().clamp_min(1e-30)
        self._against = None if probability is None else 1 - probability
        values, vectors = principal_axes(difference, self._share)
        # Directions that the differences do not reach keep weight zero under any penalty: leave them out.
        kept = values > values[-1:].clamp_min(1e-30) * 1e-9
        self._basis = vectors[:, kept].to(difference.dtype)
        self._curvature = values[kept].to(difference.dtype) / 4
        self._rows = difference @ self._basis
        self._at = self._rows.new_zeros(self._rows.shape[1])

    def fit(self, l2: float, iterations: int = 30) -> Tensor:
        """Return the weights (F,) at penalty ``l2`` > 0; starts from the last penalty's solution.

        Without rows of positive weight, or where all differences are zero, they are zero.
        """
        if len(self._at) == 0:
            return self._basis.new_zeros(len(self._basis))
        scale = (self._curvature + 2 * l2).rsqrt()
        free = (self._at / scale).requires_grad_(True)
        solver = torch.optim.LBFGS(
            [free],
            max_iter=iterations,
            tolerance_grad=1e-6,
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            solver.zero_grad()
            weights = free * scale
            score = self._rows @ weights
            each = softplus(-score)
            if self._against is not None:
                each = each + self._against * score
            value = (self._share * each).sum() + l2 * weights.square().sum()
            value.backward()
            return value

        solver.step(loss)  # pyright: ignore[reportArgumentType]
        self._at = (free * scale).detach()
        return self._basis @ self._at


def pairwise_log_loss(score: Tensor, weight: Tensor | None = None, probability: Tensor | None = None) -> float:
    """Return the weighted mean of -log P(label) for score differences (N,), in nats; NaN if no weight is positive."""
    each = -logsigmoid(score)
    if probability is not None:
        each = each + (1 - probability) * score
    if weight is None:
        return float(each.mean())
    return float((each * weight).sum() / weight.sum())


def smooth_labels(label: Tensor) -> Tensor:
    """Smooth labels (...) in [0, 1] by one pseudo-count for each class (Platt 1999).

    A few labels that a score happens to order perfectly do not make it certain; the effect on many labels is small.
    """
    count = label.numel() / 2
    return (label * count + 1) / (count + 2)


def fit_platt(score: Tensor, label: Tensor, weight: Tensor | None = None) -> tuple[float, float]:
    """Fit P(label = 1) = sigmoid(a score + c) by Newton's method (Platt 1999), to labels of :func:`smooth_labels`.

    Args:
        score: (N,) raw scores.
        label: (N,) labels or soft labels in [0, 1].
        weight: (N,) weights >= 0, or None.

    Returns:
        a >= 0 and c. A score that orders the labels wrongly gets a = 0: it is no evidence.
    """
    x = score.double()
    spread = float(x.std()) if len(x) > 1 else 0.0
    if spread < 1e-12:
        return 0.0, 0.0
    x = x / spread
    y = label.double()
    share = torch.ones_like(x) if weight is None else weight.double()
    share = share / share.sum()
    at, _ = newton_logistic(torch.stack([x, torch.ones_like(x)], dim=1), y, share, 1e-6)
    if at[0] <= 0:
        return 0.0, 0.0
    return float(at[0]) / spread, float(at[1])


def fit_temperature(score: Tensor, probability: Tensor, weight: Tensor) -> float:
    """Fit the factor >= 0 by which score differences (N,) become log-odds of the soft labels (N,).

    Both orders of a pair count, so that :func:`fit_platt` finds no offset.
    """
    label = smooth_labels(probability)
    return fit_platt(torch.cat([score, -score]), torch.cat([label, 1 - label]), weight.repeat(2))[0]
