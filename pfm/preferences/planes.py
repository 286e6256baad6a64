"""Planes of cyclic preferences: the closed form of a skew-symmetric part, s = f(y)' A f(y') with A' = -A.

Where labels follow P = sigmoid(f' A f'), the gradient of the likelihood at A = 0 is half the skew moment
M = E[f+ f-' - f- f+'], and for features of second moment S the first Newton step is proportional to S^-1 M S^-1: its
leading planes are to a cycle what the linear discriminant is to a reward. Classes that beat each other in turn span
exactly one of them. A reward leaves no trace in M, since winners' and losers' means lie on one line.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pfm.preferences.spectrum import principal_axes

__all__ = ["SkewMoments", "skew_products", "skew_weights", "to_planes"]


class SkewMoments:
    """Finds the planes of paired features (N, F), centred, of chosen and rejected outputs.

    Args:
        chosen, rejected: (N, F) features.
        weight: (N,) weights. probability: (N,) soft labels, of which 1/2 points nowhere.
    """

    def __init__(self, chosen: Tensor, rejected: Tensor, weight: Tensor, probability: Tensor) -> None:
        self.chosen, self.rejected = chosen, rejected
        self.weight, self.forward = weight, weight * (2 * probability - 1)
        self._known: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def axes(self, part: Tensor, ridge: float, count: int) -> Tensor:
        """Return axes (F, count) that span the leading planes of the pairs in the mask ``part`` (N,).

        A feature along an axis has variance at most 1; ``ridge`` is in units of the features' mean variance.
        """
        values, vectors, _, turned = self._moments(part)
        whiten = (values + ridge * values.sum() / len(vectors)).rsqrt()
        inside = whiten[:, None] * turned * whiten
        order = torch.linalg.eigh(inside.T @ inside)[1]  # planes are its pairs of equal eigenvalues
        axes = torch.zeros(len(vectors), count)
        found = (vectors * whiten) @ order.flip(1)[:, :count]
        axes[:, : found.shape[1]] = found  # fewer pairs than planes leave some empty
        return axes

    def features(self, part: Tensor, count: int, *, reward: bool = False) -> Tensor:
        """Return axes (F, count) along the single features in which the labels of the pairs in ``part`` stand out most.

        A cycle of a few features among many is lost in the noise of all of them. A feature stands out by its largest
        |M_ij| in standard errors, those of independent pairs; with ``reward`` by its mean difference between chosen and
        rejected outputs in standard errors. Along an axis the variance is 1.
        """
        if reward:
            difference = (self.chosen[part] - self.rejected[part]) * self.forward[part][:, None]
            found = difference.mean(0).abs() / difference.std(0).clamp_min(1e-12)
        else:
            found = (self._moments(part)[2].abs() / self._errors(part)).amax(1)
        leading = found.argsort(descending=True)[:count]
        axes = torch.zeros(self.chosen.shape[1], count)
        spread = torch.cat([self.chosen[part][:, leading], self.rejected[part][:, leading]]).std(0, correction=0)
        axes[leading, torch.arange(count)] = 1 / spread.clamp_min(1e-6)
        return axes

    def _errors(self, part: Tensor) -> Tensor:
        """Return the standard errors (F, F) of the skew moment of the pairs in ``part``, up to a common factor."""
        chosen, rejected, forward = self.chosen[part], self.rejected[part], self.forward[part].square()[:, None]
        crossed = chosen.square().T @ (rejected.square() * forward)
        both = chosen * rejected
        variance = crossed + crossed.T - 2 * both.T @ (both * forward)
        return variance.double().clamp_min(1e-9 * float(variance.mean()) + 1e-30).sqrt()

    def _moments(self, part: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return eigenvalues (r,) and axes (F, r) of the second moment, and the skew moment, also in the axes.

        Features that no pair reaches have no part in any plane: with fewer outputs than features, r < F.
        """
        key = hash(part.numpy().tobytes())
        if key not in self._known:
            chosen, rejected = self.chosen[part], self.rejected[part]
            weight, forward = self.weight[part], self.forward[part]
            total = weight.sum()
            values, vectors = principal_axes(torch.cat([chosen, rejected]), (weight / (2 * total)).repeat(2))
            values = values.clamp_min(1e-9 * values[-1].clamp_min(1e-30))
            one_way = (chosen.T @ (rejected * forward[:, None]) / total).double()
            moment = one_way - one_way.T
            self._known[key] = values, vectors, moment, vectors.T @ moment @ vectors
        return self._known[key]


def skew_products(one: Tensor, other: Tensor) -> Tensor:
    """Return u_i u'_j - u_j u'_i for i < j, (N, P), of coordinates (N, m): what a skew form is linear in."""
    first, second = torch.triu_indices(one.shape[1], one.shape[1], offset=1)
    return one[:, first] * other[:, second] - one[:, second] * other[:, first]


def skew_weights(weights: Tensor, count: int) -> Tensor:
    """Return the skew matrix (count, count) whose form the weights of :func:`skew_products` are."""
    matrix = weights.new_zeros(count, count)
    first, second = torch.triu_indices(count, count, offset=1)
    matrix[first, second] = weights
    return matrix - matrix.T


def to_planes(matrix: Tensor, second: Tensor, count: int) -> Tensor:
    """Return at most ``count`` planes V (m, 2 k) with u' A u' ~ the sum over l of (V u)_2l (V u')_2l+1 - its mirror.

    Args:
        matrix: A (m, m), skew.
        second: (m, m) second moment of u, by which the planes that matter most for scores are chosen.
        count: number of planes to keep; those without weight are left out.
    """
    values, vectors = torch.linalg.eigh(second.double())
    reached = values > 1e-9 * values[-1].clamp_min(1e-30)
    root = (vectors * values.clamp_min(0).sqrt())[:, reached]
    inverse = (vectors / values.clamp_min(1e-30).sqrt())[:, reached]
    inside = root.T @ matrix.double() @ root
    # i K is Hermitian; K = sum of s (b a' - a b') over its eigenvectors (a + i b) / sqrt 2 with eigenvalue s > 0.
    sizes, found = torch.linalg.eigh(1j * inside)
    planes = []
    for place in range(len(sizes) - 1, max(len(sizes) - 1 - count, -1), -1):
        size = float(sizes[place])
        if size <= 1e-6:
            break
        vector = found[:, place] * (2 * size) ** 0.5
        planes += [inverse @ vector.imag, inverse @ vector.real]
    return torch.stack(planes, dim=1).float() if planes else matrix.new_zeros(len(matrix), 0)
