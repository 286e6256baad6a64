"""Choose the pair to label next: the one whose label is expected to be most informative.

Every criterion works on *beliefs*: the log-odds of the M candidate pairs taken as jointly normal, with mean m (M,) and
covariance Z Z' of rank R. They come from

- :class:`LaplacePosterior`, the Gaussian approximation of a linear Bradley-Terry model's posterior, whose prior is
  chosen by the evidence; in it Z is closed form, the differences times a root of the covariance of the weights; or
- any ensemble of preference models, whose scores are draws: m is their mean, Z their spread.

The criteria for a pair with log-odds s ~ N(m, v), P = sigmoid(s) and entropy h(p) in nats:

- ``"information"``: h(E[P]) - E[h(P)], the information of its label on the model (BALD: Houlsby et al. 1112.5745).
- ``"win"``: by how much its label is expected to shrink the summed variance of all candidates' log-odds, of which b is
  made: with the label's Fisher information f = E[P (1 - P)], f |Z z|^2 / (1 + f v) for its row z of Z.
- ``"disagreement"``: Var[P], how far the models' probabilities lie apart.
- ``"uncertainty"``: h(E[P]), whatever its cause: it does not separate noise from lack of data.
- ``"random"``: the control.

A batch is chosen greedily. After each choice the beliefs are narrowed by the information that its label is expected to
bring, so that the next one is worth what it adds; pairs almost parallel to a chosen one are left out for every
criterion but the control.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from pfm._internal.checks import as_float_tensor, check_choice, check_finite, check_number, check_whole
from pfm.data.encoded import EncodedPairs
from pfm.devices import standard_defaults, with_standard_defaults
from pfm.preferences.newton import label_loss, newton_logistic

__all__ = ["CRITERIA", "Beliefs", "Choice", "LaplacePosterior", "Scorer", "choose_pairs", "ensemble_beliefs"]

CRITERIA = ("information", "win", "disagreement", "uncertainty", "random")
PRECISIONS = tuple(10.0**power for power in range(-2, 4))
NODES, SPAN = 49, 6.0  # of the quadrature over log-odds, in standard deviations either way
CHUNK = 8192


class Scorer(Protocol):
    """A fitted preference model, as in :mod:`pfm.preferences`."""

    def score(self, y: Any, other: Any, context: Any = None) -> Tensor:
        """Return the log-odds (B,) that y (B, \\*D) is preferred to other (B, \\*D)."""
        ...


@dataclass(frozen=True)
class Beliefs:
    """Holds what is believed of the log-odds of M pairs: normal with ``mean`` (M,) and covariance Z Z', Z (M, R)."""

    mean: Tensor
    factor: Tensor

    @property
    def variance(self) -> Tensor:
        """Return the variances of the log-odds, (M,)."""
        return self.factor.square().sum(1)


@dataclass(frozen=True)
class Choice:
    """Holds the pairs to label next, in the order of choosing.

    Attributes:
        index: (count,) int64, places among the candidates.
        value: (count,) the criterion's value of each when it was chosen; NaN for "random".
        probability: (count,) E[P] that the first output of each is preferred, before any label of the batch.
    """

    index: Tensor
    value: Tensor
    probability: Tensor


@with_standard_defaults
class LaplacePosterior:
    """Fits a linear Bradley-Terry reward and the Gaussian approximation of its posterior (Laplace; MacKay 1992).

    Weights w ~ N(0, 1 / precision) on outputs in units of their root mean square distance from their mean; the
    posterior is N(w_map, H^-1), H = sum of P (1 - P) d d' + precision. The context plays no part, as in
    :class:`pfm.preferences.BradleyTerry`.

    Args:
        precision: of the prior; None takes the one of the largest evidence among :data:`PRECISIONS`.
    """

    def __init__(self, precision: float | None = None) -> None:
        precision = check_number("precision", precision, above=0, also=(None,))
        self.given = precision
        self.precision = precision or 1.0
        self.evidence = math.nan
        self._mean: Tensor | None = None
        self._scale = 1.0
        self._root = torch.zeros(0, 0)

    def fit(self, pairs: EncodedPairs | None, outputs: Tensor | None = None) -> Self:
        """Fit on labelled pairs, on the CPU, and return the model itself.

        Args:
            pairs: weights count as repeated labels, soft labels as shares of them; None before the first label.
            outputs: (M, \\*D) outputs that set the unit, as all those of the pool; None takes the pairs' own.
        """
        if pairs is None and outputs is None:
            raise ValueError("outputs must be given where there are no labelled pairs: they set the dimension and unit")
        pairs = None if pairs is None else pairs.to("cpu")
        if outputs is None:
            assert pairs is not None
            outputs = torch.cat([pairs.chosen, pairs.rejected])
        flat = as_float_tensor("outputs", outputs).cpu().flatten(1).double()
        self._scale = float((flat - flat.mean(0)).square().sum(1).mean().sqrt()) or 1.0
        dimension = flat.shape[1]
        if pairs is None:
            self._mean = torch.zeros(dimension, dtype=torch.float64)
            self._root = torch.eye(dimension, dtype=torch.float64) / math.sqrt(self.precision)
            return self
        if pairs.dimension != dimension:
            raise ValueError(f"pairs must hold outputs of {dimension} values, as outputs does: got {pairs.dimension}")
        batch = pairs.gather(torch.arange(len(pairs)))
        rows = (batch.chosen - batch.rejected).double() / self._scale
        weight, label = batch.weight.double(), batch.probability.double()
        # All happens in the span of the differences, where N labels in D > N dimensions cost N^3 and not D^3.
        span, _ = (
            torch.linalg.qr(rows.T) if len(rows) < dimension else (torch.eye(dimension, dtype=torch.float64), None)
        )
        inside = rows @ span
        best: tuple[float, float, Tensor, Tensor] | None = None
        at = torch.zeros(inside.shape[1], dtype=torch.float64)
        for precision in (self.given,) if self.given is not None else PRECISIONS[::-1]:
            at, hessian = newton_logistic(inside, label, weight, precision, start=at)
            evidence = _evidence(inside, weight, label, precision, at, hessian)
            if best is None or evidence > best[0]:
                best = evidence, precision, at, hessian
        assert best is not None
        self.evidence, self.precision, at, hessian = best
        self._mean = span @ at
        values, vectors = torch.linalg.eigh(hessian)
        inner = span @ vectors
        # A root of the covariance: what the labels reach, and the prior at right angles to it.
        if span.shape[1] < dimension:
            prior = 1 / math.sqrt(self.precision)
            self._root = prior * torch.eye(dimension, dtype=torch.float64) + inner @ (
                (values.rsqrt() - prior)[:, None] * inner.T
            )
        else:
            self._root = inner @ (values.rsqrt()[:, None] * inner.T)
        return self

    @property
    def weights(self) -> Tensor:
        """Return the most probable weights (D,), in log-odds per unit of the outputs."""
        return self._fitted() / self._scale

    @property
    def covariance(self) -> Tensor:
        """Return the posterior covariance (D, D) of the weights, in the same units."""
        self._fitted()
        return self._root @ self._root / self._scale**2

    def reward(self, y: Any, context: Any = None) -> Tensor:
        """Return the most probable reward (B,) of outputs y (B, \\*D), in log-odds."""
        y = as_float_tensor("y", y)
        return (y.cpu().flatten(1).double() @ self.weights).float().to(y.device)

    def score(self, y: Any, other: Any, context: Any = None) -> Tensor:
        """Return the most probable log-odds (B,) that y (B, \\*D) is preferred to other (B, \\*D)."""
        reward = self.reward(y)
        return reward - self.reward(other).to(reward.device)

    def beliefs(self, y: Any, other: Any) -> Beliefs:
        """Return what is believed of the log-odds that y (M, \\*D) is preferred to other (M, \\*D), on the CPU."""
        mean = self._fitted()
        first, second = (as_float_tensor(name, value).cpu() for name, value in (("y", y), ("other", other)))
        rows = (first.flatten(1).double() - second.flatten(1).double()) / self._scale
        if rows.shape[1] != len(mean):
            raise ValueError(f"y and other must have {len(mean)} values a row: got {rows.shape[1]}")
        return Beliefs(rows @ mean, rows @ self._root)

    def _fitted(self) -> Tensor:
        if self._mean is None:
            raise RuntimeError("LaplacePosterior is not fitted: call fit(pairs) first")
        return self._mean


def _evidence(rows: Tensor, weight: Tensor, label: Tensor, precision: float, at: Tensor, hessian: Tensor) -> float:
    """Return the log of the labels' probability, weights integrated out by Laplace's method."""
    score = rows @ at
    likelihood = -(weight * label_loss(score, label)).sum()
    prior = len(at) / 2 * math.log(precision) - precision / 2 * at.square().sum()
    return float(likelihood + prior - torch.linalg.slogdet(hessian)[1] / 2)


def ensemble_beliefs(models: Sequence[Scorer], y: Any, other: Any, context: Any = None) -> Beliefs:
    """Take the scores of at least two models for draws of what is believed of the log-odds.

    Args:
        models: fitted preference models, which should differ by more than their seeds: by the prompts they saw.
        y, other: (M, \\*D) outputs. context: (M, C) or None.
    """
    if len(models) < 2:
        raise ValueError(f"models must hold at least two models, to disagree: got {len(models)}")
    scores = torch.stack([model.score(y, other, context).cpu().double().flatten() for model in models])
    check_finite("scores of the models", scores)
    mean = scores.mean(0)
    return Beliefs(mean, ((scores - mean) / math.sqrt(len(models) - 1)).T.contiguous())


@standard_defaults
def choose_pairs(
    candidates: EncodedPairs | tuple[Any, Any] | tuple[Any, Any, Any],
    count: int,
    *,
    by: str = "information",
    model: LaplacePosterior | Sequence[Scorer] | None = None,
    labelled: EncodedPairs | None = None,
    most_similar: float = 0.95,
    seed: int = 0,
) -> Choice:
    """Choose the pairs to label next.

    Args:
        candidates: pairs without labels: EncodedPairs, of which chosen and rejected are just first and second, or
            tensors (y, other) or (y, other, context) of M pairs.
        count: pairs to choose; at most M.
        by: one of :data:`CRITERIA`.
        model: what is believed: a fitted :class:`LaplacePosterior`, or at least two preference models. None fits a
            :class:`LaplacePosterior` on ``labelled``.
        labelled: pairs with labels, or None before the first one.
        most_similar: largest |cosine| of a pair's difference with that of any other in the batch; 1 allows
            repeats in all but index. Where nothing else is left, it is lifted.
        seed: of "random", and of the order among equals.

    Raises:
        ValueError: an argument is out of range, shapes disagree, or a value is not finite.

    >>> y, other = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    >>> choose_pairs((y, other), 5).index.shape
    torch.Size([5])
    """
    check_choice("by", by, CRITERIA)
    y, other, context = _outputs(candidates)
    total = len(y)
    check_whole("count", count, 1, total, hint=f"there are {total} candidates")
    most_similar = check_number("most_similar", most_similar, above=0, most=1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    if model is None:
        model = LaplacePosterior().fit(labelled, torch.cat([y, other]))
    beliefs = (
        model.beliefs(y, other) if isinstance(model, LaplacePosterior) else ensemble_beliefs(model, y, other, context)
    )
    probability = _expectations(beliefs.mean, beliefs.variance)[0].float()
    if by == "random":
        index = order[:count]
        return Choice(index, torch.full((count,), math.nan), probability[index])
    shuffled = Beliefs(beliefs.mean[order], beliefs.factor[order])
    directions = torch.nn.functional.normalize((y - other)[order].float(), dim=1)
    index, value = _greedy(shuffled, directions, count, by, most_similar)
    return Choice(order[index], value, probability[order[index]])


def _greedy(beliefs: Beliefs, directions: Tensor, count: int, by: str, most_similar: float) -> tuple[Tensor, Tensor]:
    """Choose places among the candidates, and the criterion's value of each when it was chosen."""
    mean, factor = beliefs.mean, beliefs.factor.clone()
    variance = factor.square().sum(1)
    gram = factor.T @ factor
    reach = ((factor @ gram) * factor).sum(1)  # |Z z|^2 of every pair's row z
    left = torch.ones(len(mean), dtype=torch.bool)
    apart = torch.ones(len(mean), dtype=torch.bool)
    index, found = [], []
    for _ in range(count):
        value = _value(by, mean, variance, reach)
        allowed = left & apart
        if not bool(allowed.any()):
            allowed = left
        best = int(torch.where(allowed, value, -math.inf).argmax())
        index.append(best)
        found.append(float(value[best]))
        left[best] = False
        apart &= (directions @ directions[best]).abs() <= most_similar
        spread = float(variance[best])
        if spread <= 0:
            continue
        fisher = float(_expectations(mean[best : best + 1], variance[best : best + 1])[2])
        row = factor[best].clone()
        along, image = factor @ row, gram @ row
        inner = float(row @ image)
        # (I + f z z')^(-1/2) = I - s z z': what is left of the covariance is Z (I - s z z')^2 Z'.
        shrink = (1 - 1 / math.sqrt(1 + fisher * spread)) / spread
        twice = 2 * shrink - shrink**2 * spread
        reach = reach - 2 * twice * along * (factor @ image) + (twice * along) ** 2 * inner
        factor -= shrink * torch.outer(along, row)
        cross = torch.outer(image, row)
        gram = gram - shrink * (cross + cross.T) + shrink**2 * inner * torch.outer(row, row)
        variance = factor.square().sum(1)
    return torch.tensor(index), torch.tensor(found)


def _value(by: str, mean: Tensor, variance: Tensor, reach: Tensor) -> Tensor:
    probability, entropy, fisher = _expectations(mean, variance)
    if by == "win":
        return fisher * reach / (1 + fisher * variance)
    if by == "disagreement":
        return probability * (1 - probability) - fisher
    if by == "uncertainty":
        return _entropy(probability)
    return _entropy(probability) - entropy


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p) + torch.special.entr(1 - p)


def _expectations(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return E[P], E[h(P)] and E[P (1 - P)], (M,) each, for P = sigmoid(s) and s ~ N(mean, variance).

    By the trapezoidal rule over :data:`SPAN` standard deviations either way, whose error falls exponentially.
    """
    nodes = torch.linspace(-SPAN, SPAN, NODES, dtype=torch.float64)
    share = torch.exp(-nodes.square() / 2)
    share = share / share.sum()
    results = [torch.zeros_like(mean) for _ in range(3)]
    for begin in range(0, len(mean), CHUNK):
        part = slice(begin, begin + CHUNK)
        score = mean[part, None] + variance[part, None].clamp_min(0).sqrt() * nodes
        p = torch.sigmoid(score)
        product = p * torch.sigmoid(-score)
        # h(sigmoid(s)) = softplus(-|s|) + |s| sigmoid(-|s|)
        size = score.abs()
        entropy = torch.nn.functional.softplus(-size) + size * torch.sigmoid(-size)
        for result, each in zip(results, (p, entropy, product), strict=True):
            result[part] = each @ share
    return results[0], results[1], results[2]


def _outputs(candidates: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    if isinstance(candidates, EncodedPairs):
        candidates = candidates.to("cpu")
        batch = candidates.gather(torch.arange(len(candidates)))
        return batch.chosen, batch.rejected, batch.context
    if not isinstance(candidates, tuple | list) or len(candidates) not in (2, 3):
        raise TypeError(
            f"candidates must be EncodedPairs, or tensors (y, other) or (y, other, context): got "
            f"{type(candidates).__name__}"
        )
    checked = EncodedPairs(*candidates)
    return _outputs(checked)
