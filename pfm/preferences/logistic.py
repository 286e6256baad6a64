"""Penalised logistic regression on differences: the solver under every linear preference model here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pfm.preferences.newton import label_loss, newton_logistic
from pfm.preferences.spectrum import principal_axes

__all__ = [
    "PairwiseLogistic",
    "fit_platt",
    "fit_temperature",
    "pairwise_accuracy",
    "pairwise_log_loss",
    "smooth_labels",
]

MOST_DIRECTIONS = 50  # of conjugate gradients, in one step of Newton's
MOST_HALVINGS = 20  # of one such step; a fit that is then no better keeps its place


class PairwiseLogistic:
    """Fits w minimising the weighted mean of log(1 + exp(-d.w)) + (1 - p) d.w, plus l2 |w|^2.

    Several fits that differ in the weights of the rows alone, as those of cross-validation, are found together.
    Newton's method with conjugate gradients (Dembo, Eisenstat & Steihaug 1982): every step is two products with the
    rows. The difference rows d are rotated once to the axes of their second moment; there the Hessian at w = 0,
    diag(moment) / 4 + 2 l2, is diagonal and a good preconditioner for every penalty, so that a path of penalties
    costs few passes over the data. Of more features than rows only the rows' span is rotated, which holds the optimum.

    Args:
        difference: (N, F) features of the chosen minus features of the rejected output.
        weight: (N,) weights >= 0, or (K, N) those of K fits; None for 1.
        probability: (N,) soft labels P(chosen is preferred), or None for 1.
    """

    def __init__(self, difference: Tensor, weight: Tensor | None = None, probability: Tensor | None = None) -> None:
        count = difference.shape[0]
        share = difference.new_ones(count) if weight is None else weight
        self._single = share.ndim == 1
        share = torch.atleast_2d(share)
        self._share = share / share.sum(1, keepdim=True).clamp_min(1e-30)
        self._label = difference.new_ones(count) if probability is None else probability
        values, vectors = principal_axes(difference, self._share.mean(0))
        # Directions that the differences do not reach keep weight zero under any penalty: leave them out.
        kept = values > values[-1:].clamp_min(1e-30) * 1e-9
        self._basis = vectors[:, kept].to(difference.dtype)
        self._curvature = values[kept].to(difference.dtype) / 4
        self._rows = difference @ self._basis
        self._at = self._rows.new_zeros(len(self._share), self._rows.shape[1])

    def fit(self, l2: float, iterations: int = 30) -> Tensor:
        """Return the weights (F,), or (K, F), at penalty ``l2`` > 0; starts from the last penalty's solution.

        Without rows of positive weight, or where all differences are zero, they are zero.
        """
        if self._at.shape[1] > 0:
            self._descend(l2, iterations)
        found = self._at @ self._basis.T
        return found[0] if self._single else found

    def _descend(self, l2: float, iterations: int) -> None:
        """Go to the minimum by at most so many of Newton's steps, from where it stands."""
        score = self._at @ self._rows.T
        value, scale = self._loss(score, self._at, l2), (self._curvature + 2 * l2).rsqrt()
        for _ in range(iterations):
            chance = torch.sigmoid(score)
            gradient = (self._share * (chance - self._label)) @ self._rows + 2 * l2 * self._at
            step, change = self._newton_step(gradient, self._share * chance * (1 - chance), scale, l2)
            length = torch.ones_like(value)
            for halvings in range(MOST_HALVINGS + 1):
                at, moved = self._at - length[:, None] * step, score - length[:, None] * change
                reached = self._loss(moved, at, l2)
                worse = ~(reached <= value * (1 + 1e-6 * value.sign()))
                done, again = torch.stack([((gradient * scale).abs() <= 1e-6).all(), worse.any()]).tolist()
                if done or not again:
                    break
                length = torch.where(worse, length / 2 if halvings < MOST_HALVINGS - 1 else 0.0, length)
            self._at, score, value = at, moved, reached
            if done or not bool((length > 0).any()):  # or rounding is all that is left
                return

    def _loss(self, score: Tensor, at: Tensor, l2: float) -> Tensor:
        """Return each fit's penalised loss (K,) at scores (K, N) and weights (K, r)."""
        return (self._share * label_loss(score, self._label)).sum(1) + l2 * at.square().sum(1)

    def _newton_step(self, gradient: Tensor, curvature: Tensor, scale: Tensor, l2: float) -> tuple[Tensor, Tensor]:
        """Return steps (K, r) that leave a tenth of the gradients (K, r), and what they change in the scores (K, N).

        Args:
            gradient: (K, r).
            curvature: (K, N) of each row's loss in its score, times its share.
            scale: (r,) root of the preconditioner.
            l2: the penalty.
        """
        step, change = torch.zeros_like(gradient), torch.zeros_like(curvature)
        left, preconditioned = gradient, gradient * scale.square()
        direction, size = preconditioned, (gradient * preconditioned).sum(1)
        enough = 0.01 * size  # of the squared norm
        for _ in range(min(gradient.shape[1], MOST_DIRECTIONS)):
            along = direction @ self._rows.T
            bent = (curvature * along) @ self._rows + 2 * l2 * direction
            length = size / (direction * bent).sum(1).clamp_min(1e-30)
            step, change = step + length[:, None] * direction, change + length[:, None] * along
            left = left - length[:, None] * bent
            preconditioned = left * scale.square()
            before, size = size, (left * preconditioned).sum(1)
            if bool((size <= enough).all()):
                break
            direction = preconditioned + (size / before.clamp_min(1e-30))[:, None] * direction
        return step, change


def pairwise_accuracy(score: Tensor, weight: Tensor, probability: Tensor) -> float:
    """Return the weighted share of pairs that score differences (N,) order as their labels do, equal scores half.

    A pair labelled as a tie, by 1/2, can be ordered neither rightly nor wrongly and is left out; 1/2 of ties alone.
    """
    right = (weight * (2 * probability - 1) * torch.sign(score)).sum()
    return float(0.5 + 0.5 * right / (weight * (probability != 0.5)).sum().clamp_min(1e-30))


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
