"""Calibration of a preference model's probabilities, on pairs of prompts that it has not seen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pfm._internal.checks import check_whole
from pfm.data.encoded import EncodedPairs
from pfm.devices import standard_defaults
from pfm.preferences.base import PreferenceModel
from pfm.preferences.logistic import pairwise_accuracy, pairwise_log_loss

__all__ = ["Calibration", "ReliabilityBin", "calibration", "pair_scores", "reliability"]


@dataclass(frozen=True)
class ReliabilityBin:
    """Holds the pairs whose favourite was given a probability in [low, high): how surely, and how often rightly.

    Attributes:
        low, high: the bin's limits, in [1/2, 1].
        pairs: how many there are, by weight.
        confidence: mean probability given to the favourite.
        right: share of them in which the favourite was preferred.
    """

    low: float
    high: float
    pairs: float
    confidence: float
    right: float


@dataclass(frozen=True)
class Calibration:
    """Holds figures on labelled pairs.

    Attributes:
        accuracy: share of pairs ordered as labelled, equal scores half; pairs labelled as ties are left out.
        log_loss: nats a pair; log 2 = 0.693 at chance.
        brier: mean squared error of P(chosen is preferred).
        ece: expected calibration error (Naeini et al. 2015): mean |confidence - right| over the bins, by their pairs.
        bins: the reliability table, without empty bins.
    """

    accuracy: float
    log_loss: float
    brier: float
    ece: float
    bins: list[ReliabilityBin]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        head = f"accuracy {self.accuracy:.3f}, log loss {self.log_loss:.3f}, Brier {self.brier:.3f}, ECE {self.ece:.3f}"
        rows = [f"{b.low:.2f}-{b.high:.2f}  {b.pairs:8.0f}  {b.confidence:10.3f}  {b.right:.3f}" for b in self.bins]
        return "\n".join([head, "favourite     pairs  confidence  right", *rows])


@standard_defaults
def reliability(
    score: Tensor, probability: Tensor | None = None, weight: Tensor | None = None, *, bins: int = 10
) -> Calibration:
    """Compare log-odds with what was labelled.

    Args:
        score: (N,) log-odds that the chosen output is preferred.
        probability: (N,) soft labels, or None for 1. weight: (N,) weights, or None for 1.
        bins: number of equal intervals of [1/2, 1].

    Raises:
        ValueError: there are no pairs, scores are not finite, or shapes disagree.
    """
    if score.ndim != 1 or len(score) == 0 or not bool(torch.isfinite(score).all()):
        raise ValueError(f"score must be (N,) finite log-odds, N >= 1: got {tuple(score.shape)}")
    check_whole("bins", bins, 1)
    label = torch.ones_like(score) if probability is None else probability
    weight = torch.ones_like(score) if weight is None else weight
    if not label.shape == weight.shape == score.shape:
        raise ValueError(f"probability and weight must be {tuple(score.shape)}, one number a pair")
    score, label, weight = score.double(), label.double(), weight.double()
    confidence = torch.sigmoid(score.abs())
    right = torch.where(score == 0, 0.5, torch.where(score > 0, label, 1 - label))
    total, place = weight.sum(), ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    table, gap = [], 0.0
    for number in place.unique().tolist():
        part = weight * (place == number)
        count = float(part.sum())
        if count > 0:
            sure, share = float((part * confidence).sum()) / count, float((part * right).sum()) / count
            low = 0.5 + number / (2 * bins)
            table.append(ReliabilityBin(low, low + 1 / (2 * bins), count, sure, share))
            gap += count / float(total) * abs(sure - share)
    return Calibration(
        pairwise_accuracy(score, weight, label),
        pairwise_log_loss(score, weight, label),
        float((weight * (torch.sigmoid(score) - label).square()).sum() / total),
        gap,
        table,
    )


@torch.no_grad()
def pair_scores(model: PreferenceModel, pairs: EncodedPairs) -> Tensor:
    """Return the log-odds (N,) that each pair's chosen output is preferred, on the CPU."""
    pairs = pairs.to("cpu")
    scores = []
    for index in torch.arange(len(pairs), device="cpu").split(8192):
        batch = pairs.gather(index)
        scores.append(model.score(batch.chosen, batch.rejected, batch.context))
    return torch.cat(scores)


@standard_defaults
def calibration(model: PreferenceModel, pairs: EncodedPairs, *, bins: int = 10) -> Calibration:
    """Measure a fitted model on pairs, best of prompts it has not seen.

    >>> rejected, chosen = torch.randn(2, 200, 1, generator=torch.Generator().manual_seed(0)).sort(0).values
    >>> from pfm.preferences import BradleyTerry
    >>> pairs = EncodedPairs(chosen, rejected)
    >>> calibration(BradleyTerry().fit(pairs), pairs).accuracy
    1.0
    """
    pairs = pairs.to("cpu")
    return reliability(pair_scores(model, pairs), pairs.probability, pairs.weight, bins=bins)
