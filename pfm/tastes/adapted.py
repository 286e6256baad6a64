"""One rater's taste, fitted from a few votes beyond a mixture of tastes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pfm._internal.checks import as_float_tensor
from pfm.devices import with_standard_defaults
from pfm.preferences.newton import label_loss, newton_logistic
from pfm.tastes.likelihood import mixed_log_odds

if TYPE_CHECKING:
    from pfm.tastes.mixture import TasteMixture


__all__ = ["AdaptedTaste", "Votes"]


@with_standard_defaults
class AdaptedTaste:
    """One rater's taste, made by :meth:`TasteMixture.adapt`.

    Attributes:
        responsibilities: (K,) of the rater's pairs for each taste.
        blend: (K,) coefficients of the tastes' log-odds beyond them. correction: (D,) the linear part.
    """

    def __init__(self, mixture: TasteMixture, responsibilities: Tensor, blend: Tensor, correction: Tensor) -> None:
        self.mixture, self.responsibilities = mixture, responsibilities
        self.blend, self.correction = blend, correction

    def score(self, y: Any, other: Any, context: Any = None) -> Tensor:
        """Return the log-odds (B,) that y (B, \\*D) is preferred to other (B, \\*D)."""
        y = as_float_tensor("y", y).float()
        difference = y - as_float_tensor("other", other).to(y.device, torch.float32)
        scores = self.mixture.scores(y, other, context)
        own, blend, correction = (part.to(y.device) for part in (self.responsibilities, self.blend, self.correction))
        return mixed_log_odds(scores, own) + scores @ blend + difference.flatten(1) @ correction

    def win_probability(self, y: Any, opponents: Any, context: Any = None) -> Tensor:
        """Return the mean probability (B,) that y (B, \\*D) is preferred to its opponents, (M, \\*D) for all of y."""
        y, opponents = (as_float_tensor(n, v).float() for n, v in (("y", y), ("opponents", opponents)))
        if opponents.shape[1:] != y.shape[1:] or len(opponents) == 0:
            raise ValueError(f"opponents must be (M, {', '.join(map(str, y.shape[1:]))}): got {tuple(opponents.shape)}")
        wins = y.new_zeros(len(y))
        for one in opponents:
            wins += torch.sigmoid(self.score(y, one.expand_as(y), context))
        return wins / len(opponents)

    @property
    def weights(self) -> Tensor:
        """Return weights (K,) for a composition of the tastes' flows: what is positive of both parts, with sum 1."""
        positive = (self.responsibilities + self.blend).clamp_min(0)
        return positive / positive.sum() if float(positive.sum()) > 0 else self.responsibilities


@dataclass(frozen=True)
class Votes:
    """Holds some votes as a rater's few coefficients see them.

    ``scores`` (n, K) log-odds of chosen over rejected by taste, ``axes`` (n, r) their difference on the axes,
    ``probability`` and ``weight`` (n,).
    """

    scores: Tensor
    axes: Tensor
    probability: Tensor
    weight: Tensor

    def select(self, index: Tensor) -> Votes:
        """Select votes by their indices (m,)."""
        return Votes(self.scores[index], self.axes[index], self.probability[index], self.weight[index])

    def coefficients(self, shares: Tensor, spread: float, correction: float) -> tuple[Tensor, Tensor]:
        """Return the responsibilities (K,) of the votes, and the MAP coefficients (K + r,) beyond them."""
        each = logsigmoid(self.scores) - (1 - self.probability[:, None]) * self.scores
        start = ((each * self.weight[:, None]).double().sum(0) + shares.double().log()).softmax(0).float()
        deviation = torch.cat([torch.full_like(start, spread), torch.full((self.axes.shape[1],), correction)]).double()
        rows = torch.cat([self.scores, self.axes], dim=1)
        # In units of the prior, whose curvature is then 1 whatever its scale.
        at, _ = newton_logistic(
            rows.double() * deviation, self.probability, self.weight, 1.0, offset=mixed_log_odds(self.scores, start)
        )
        return start, (at * deviation).float()

    def loss(self, start: Tensor, coefficients: Tensor) -> float:
        """Return the weighted mean of -log P(label); 0 for votes of no weight."""
        score = mixed_log_odds(self.scores, start) + torch.cat([self.scores, self.axes], dim=1) @ coefficients
        each = label_loss(score, self.probability)
        return float((each * self.weight).sum() / self.weight.sum().clamp_min(1e-12))
