"""Label noise: its rate, the labels that are probably wrong, and pairs with corrected labels.

If a share e of the labels was flipped at random, a label agrees with P(e) = e + (1 - 2 e) P of what it would
have said. Two remedies are known where e is:

- the unbiased loss ((1 - e) l(s) - e l(-s)) / (1 - 2 e) of Natarajan et al. (2013), which robust DPO (Chowdhury et al.
  2403.00409) uses for preferences. For the logistic loss, l(s) - l(-s) = -s, so that it is the loss of the soft label
  (p - e) / (1 - 2 e), :func:`unbiased_label`. That lies outside [0, 1], and the loss of one pair then has no minimum:
  it falls for ever as s grows. A penalised linear fit bears it; a network, or a flow, which takes labels for weights,
  does not;
- the label's probability of being right, given what other labels say: :func:`corrected`. It stays within [0, 1], and
  what it gives is an ordinary pair set, so that every preference model and every flow has the benefit of it.

Flips of all labels with one probability change the minimiser of a large set's loss little: they shrink it more than
they rotate it. Their cost is precision, as if there were fewer pairs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pfm._internal.checks import check_number, check_seed
from pfm._internal.columns import column_statistics
from pfm._internal.significance import CONFIRMED
from pfm.data.encoded import EncodedPairs
from pfm.devices import standard_defaults
from pfm.preferences.base import check_pairs
from pfm.preferences.coordinates import equal_units
from pfm.preferences.crossvalidation import Search, deal_folds
from pfm.preferences.newton import label_loss
from pfm.preferences.raters import numbered

__all__ = ["Corrected", "NoiseReport", "RaterFlips", "corrected", "unbiased_label"]

SPREADS = (0.5, 1.0, 2.0, 4.0)  # of outputs' rewards around the linear one, in log-odds
FOLDS = 5
RATE_HINT = "at one half labels hold no information, above it the opposite: swap the pairs"
RATER_PRIOR = 10.0  # labels that a rater's prior counts for
ROUNDS = 3
RATER_ROUNDS = 100


@dataclass(frozen=True)
class RaterFlips:
    """Holds each rater's share of wrong labels: ``flip_rate`` (R,), drawn to the mean, of ``labels`` (R,) labels."""

    raters: list[Any]
    flip_rate: Tensor
    labels: Tensor


@dataclass(frozen=True)
class NoiseReport:
    """Holds the estimated rate of wrong labels, and the labels that are probably wrong.

    Attributes:
        flip_rate: share of labels that were flipped, as given or as found; 0 if held-out labels do not confirm it.
        known: whether it was given.
        estimate: the share under which held-out labels are likeliest, whether or not they confirm it.
        z: root of twice the log-likelihood ratio of it and no flips at all, on left-out labels: standard errors.
        correct: (N,) probability that each label is right.
        log_loss: of the observed labels under predictions that did not see them, nats a label.
        spread: standard deviation of the outputs' rewards around the prediction from their embeddings, in log-odds; 0
            if other labels on the same outputs gave no more information.
        raters: the raters' shares, or None if no raters were named.
    """

    flip_rate: float
    known: bool
    estimate: float
    z: float
    correct: Tensor = field(repr=False)
    log_loss: float
    spread: float
    raters: RaterFlips | None

    def __str__(self) -> str:
        wrong = int((self.correct < 0.5).sum())
        if self.known:
            found = f"{self.flip_rate:.1%} of the labels were given as flipped"
        elif self.flip_rate:
            found = f"about {self.flip_rate:.1%} of the labels are flipped (z = {self.z:.1f} against none)"
        else:
            found = f"no flipped labels confirmed (the likeliest share, {self.estimate:.1%}, is within the noise)"
        return f"{found}; {wrong} of {len(self.correct)} labels are more likely wrong than right"


@dataclass(frozen=True)
class Corrected:
    """Holds pairs with corrected soft labels, and the report."""

    pairs: EncodedPairs
    report: NoiseReport


@standard_defaults
def unbiased_label(probability: Any, flip_rate: float) -> Tensor:
    """Return the soft label (N,) whose logistic loss is, on the mean over flips, that of the label before them.

    It is (p - e) / (1 - 2 e), outside [0, 1] for certain labels, as the module says; what takes probabilities refuses
    it. :class:`pfm.preferences.logistic.PairwiseLogistic` can be fitted with it.

    Args:
        probability: (N,) labels or soft labels as they were observed, in [0, 1].
        flip_rate: e, in [0, 0.5).

    Raises:
        ValueError: ``flip_rate`` is out of range: from one half on labels say nothing.
    """
    flip_rate = check_number("flip_rate", flip_rate, least=0, below=0.5, hint=RATE_HINT)
    return (torch.as_tensor(probability).float() - flip_rate) / (1 - 2 * flip_rate)


@standard_defaults
def corrected(
    pairs: EncodedPairs,
    flip_rate: float | None = None,
    *,
    rater: Sequence[Hashable] | Tensor | None = None,
    seed: int = 0,
) -> Corrected:
    """Return each label the probability with which it is right, by what other labels say of its pair.

    1. A linear Bradley-Terry reward predicts every pair from labels of other prompts only; penalties by
       cross-validation.
    2. Added to it, each output's own reward in its prompt, from the other labels on that output, with a normal prior
       whose spread is chosen on left-out labels. Neither uses the label that is judged.
    3. The share of flips e is that under which left-out labels are likeliest, P = e + (1 - 2 e) sigmoid(a s); it counts
       if the likelihood ratio to no flips is beyond chance (one-sided 95%), else the pairs are returned unchanged.
    4. Steps 1 to 3 are repeated with corrected labels of the other prompts, while left-out labels are likelier for it.
    5. By Bayes' rule a label p is right with odds (1 - e) / e exp((2 p - 1) a s), and is replaced by
       c p + (1 - c) (1 - p).

    Labels on which other labels have no information keep the probability of the flip rate, so that shuffled labels
    remain uninformative. Held-out figures of a model fitted on corrected labels
    are held against those, and look better than they would against the labels that were given.

    Args:
        pairs: labelled pairs; soft labels and weights count. All happens on the CPU; the corrected pairs are on the
            device of these.
        flip_rate: share of labels that were flipped, in [0, 0.5); None finds it.
        rater: N names of who gave each label: each has a share of his own, drawn to that of all by a prior worth
            10 labels, so that a rater of one label counts as average. A rater who is wrong more often than
            right has the labels flipped.
        seed: of the folds.

    Raises:
        TypeError: ``pairs`` is not EncodedPairs.
        ValueError: ``flip_rate`` is out of range, all pairs are ties, or ``rater`` has not one entry a pair.

    >>> one, other = torch.randn(2, 400, 2, generator=torch.Generator().manual_seed(0))
    >>> first = (one[:, :1] > other[:, :1])
    >>> pairs = EncodedPairs(torch.where(first, one, other), torch.where(first, other, one))
    >>> cleaned = corrected(pairs.flip_labels(0.2))
    >>> round(cleaned.report.flip_rate, 1)
    0.2
    """
    seed = check_seed(seed)
    check_pairs(pairs)
    if flip_rate is not None:
        flip_rate = check_number("flip_rate", flip_rate, least=0, below=0.5, hint=RATE_HINT)
    device, pairs = pairs.device, pairs.to("cpu")
    names, index = ([], torch.zeros(0)) if rater is None else numbered(rater, len(pairs))
    generator = torch.Generator().manual_seed(seed)
    labels = _Labels.of(pairs)
    linear = _from_other_prompts(pairs, labels, generator)
    score, spread, link = _with_outputs(pairs, labels, linear, flip_rate, generator)
    plain = _fit_link(score, labels, 0.0)
    # The root of the likelihood ratio of two nested links is, without flips, half a normal deviate.
    gain = float((labels.weight * (plain.loss(score, labels) - link.loss(score, labels))).sum())
    z = math.sqrt(max(2 * gain, 0.0))
    rate = link.rate if flip_rate is not None or z > CONFIRMED else 0.0
    if rate:
        score, spread, link = _repeated(pairs, labels, (score, spread, link), flip_rate, generator)
        rate = link.rate
    odds = link.evidence(score, labels)
    raters = None
    rates = torch.full((len(pairs),), rate)
    if rater is not None:
        each = _rater_rates(odds, labels, index, len(names), link.rate)
        raters = RaterFlips(names, each, torch.bincount(index, minlength=len(names)))
        rates = each[index]
    correct = torch.sigmoid(odds + torch.logit(1 - rates.clamp_min(1e-9)))
    if rater is None and rate == 0:
        correct = torch.ones(len(pairs))
    loss = float((labels.weight * link.loss(score, labels)).sum() / labels.weight.sum())
    report = NoiseReport(rate, flip_rate is not None, link.rate, z, correct, loss, spread, raters)
    part = pairs.select(torch.arange(len(pairs)))
    if bool((correct < 1).any()):
        part.probability = _turned(labels.probability, correct)
    return Corrected(part.to(device), report)


@dataclass(frozen=True)
class _Labels:
    """Holds labels and weights (N,), the weights with mean 1 over those that count.

    Ties count for nothing: turned round they are the same, and among decided labels they would hide the flips, since a
    large share of them makes every prediction look less certain than it is.
    """

    probability: Tensor
    weight: Tensor

    @classmethod
    def of(cls, pairs: EncodedPairs) -> _Labels:
        ones = torch.ones(len(pairs))
        probability = ones if pairs.probability is None else pairs.probability
        weight = torch.where(probability == 0.5, 0.0, ones if pairs.weight is None else pairs.weight)
        return cls(probability, weight / weight[weight > 0].mean())


@dataclass(frozen=True)
class _Link:
    """Gives the chance of an observed label from a score s: rate + (1 - 2 rate) sigmoid(slope s)."""

    slope: float
    rate: float

    def evidence(self, score: Tensor, labels: _Labels) -> Tensor:
        """Return the log-odds that each label is as given rather than flipped, (N,)."""
        return (2 * labels.probability - 1) * self.slope * score

    def loss(self, score: Tensor, labels: _Labels) -> Tensor:
        """Return -log of the chance of each label, (N,), in nats."""
        return _link_loss(self.slope * score, torch.tensor(self.rate), labels.probability)


def _link_loss(score: Tensor, rate: Tensor, probability: Tensor) -> Tensor:
    # Mixed in logs: one sigmoid may round to 0.
    stay, turn = torch.log1p(-rate), rate.clamp_min(1e-12).log()
    ahead, behind = logsigmoid(score), logsigmoid(-score)
    chosen, rejected = torch.logaddexp(stay + ahead, turn + behind), torch.logaddexp(stay + behind, turn + ahead)
    return -(probability * chosen + (1 - probability) * rejected)


def _fit_link(score: Tensor, labels: _Labels, rate: float | None) -> _Link:
    """Find slope >= 0 and, unless it is given, rate in [0, 0.5) of greatest likelihood."""
    spread = float(score.std()) if len(score) > 1 else 0.0
    if spread < 1e-9:
        return _Link(0.0, rate or 0.0)
    s, weight = (score / spread).double(), labels.weight.double() / labels.weight.sum()
    p = labels.probability.double()
    best: tuple[float, _Link] | None = None
    # The likelihood can have two maxima: steep with flips, flat without.
    for begin in (0.05, 0.3) if rate is None else (0.0,):
        at = torch.tensor([1.0, math.log(begin / (0.5 - begin)) if begin else 0.0], dtype=torch.float64)
        at.requires_grad_(True)
        solver = torch.optim.LBFGS([at], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

        def loss(at: Tensor = at, solver: torch.optim.LBFGS = solver) -> Tensor:
            solver.zero_grad()
            share = torch.sigmoid(at[1]) / 2 if rate is None else torch.tensor(rate, dtype=torch.float64)
            value = (weight * _link_loss(at[0] * s, share, p)).sum()
            value.backward()
            return value

        solver.step(loss)  # pyright: ignore[reportArgumentType]
        value = float(loss().detach())
        slope = max(float(at[0].detach()), 0.0) / spread
        found = float(torch.sigmoid(at[1].detach())) / 2 if rate is None else rate
        if best is None or value < best[0] - 1e-9:
            best = value, _Link(slope, found if slope else (rate or 0.0))
    assert best is not None
    return best[1]


def _from_other_prompts(pairs: EncodedPairs, labels: _Labels, generator: torch.Generator) -> Tensor:
    """Return the log-odds (N,) of each pair by linear rewards fitted on other prompts, or other pairs of one prompt."""
    batch = pairs.gather(torch.arange(len(pairs)))
    spread = column_statistics(torch.cat([batch.chosen, batch.rejected]), batch.weight.repeat(2))[1]
    scale = equal_units(spread).to(batch.chosen.dtype)
    fold = deal_folds(pairs.group, generator)
    if len(fold.unique()) < 2:
        return torch.zeros(len(pairs))
    search = Search([(batch.chosen - batch.rejected) / scale], labels.weight, labels.probability, fold)
    search.over([()])
    return search.left_out(search.best())


def _with_outputs(
    pairs: EncodedPairs,
    labels: _Labels,
    linear: Tensor,
    rate: float | None,
    generator: torch.Generator,
    spreads: Sequence[float] = SPREADS,
) -> tuple[Tensor, float, _Link]:
    """Add the information of other labels on the same outputs, if left-out labels are likelier with it.

    Returns the log-odds (N,), the spread of the outputs' own rewards (0 if they are left out), and the link.
    """
    best = linear, 0.0, _fit_link(linear, labels, rate)
    least = float((labels.weight * best[2].loss(linear, labels)).sum())
    first, second, count = _outputs(pairs)
    if count == 2 * len(pairs):  # no output stands in two pairs
        return best
    fold = torch.randperm(len(pairs), generator=generator) % min(FOLDS, len(pairs))
    for spread in spreads:
        score = torch.zeros(len(pairs))
        for number in range(int(fold.max()) + 1):
            part = fold != number
            own = _own_rewards(first[part], second[part], count, linear[part], labels, part, spread)
            score[~part] = (linear + own[first] - own[second])[~part]
        link = _fit_link(score, labels, rate)
        loss = float((labels.weight * link.loss(score, labels)).sum())
        if loss < least:
            best, least = (score, spread, link), loss
    return best


def _repeated(
    pairs: EncodedPairs,
    labels: _Labels,
    found: tuple[Tensor, float, _Link],
    rate: float | None,
    generator: torch.Generator,
) -> tuple[Tensor, float, _Link]:
    """Predict again from corrected labels, as long as the labels that were observed are likelier for it."""
    for _ in range(ROUNDS):
        score, spread, link = found
        correct = torch.sigmoid(link.evidence(score, labels) + math.log((1 - link.rate) / link.rate))
        better = replace(labels, probability=_turned(labels.probability, correct))
        linear = _from_other_prompts(pairs, better, generator)
        again = _with_outputs(pairs, labels, linear, rate, generator, [spread] if spread else [])
        gain = labels.weight * (link.loss(score, labels) - again[2].loss(again[0], labels))
        if float(gain.sum()) <= 0 or again[2].rate == 0:
            break
        found = again
    return found


def _turned(probability: Tensor, correct: Tensor) -> Tensor:
    """Return soft labels (N,) of which each is right with probability ``correct``, and else the other way round."""
    return correct * probability + (1 - correct) * (1 - probability)


def _outputs(pairs: EncodedPairs) -> tuple[Tensor, Tensor, int]:
    """Number the outputs, those of different prompts apart: chosen and rejected of each pair (N,), and how many."""
    keys = torch.stack([pairs.group.repeat(2), torch.cat(pairs.row_numbers())], 1)
    names, member = torch.unique(keys, dim=0, return_inverse=True)
    return member[: len(pairs)], member[len(pairs) :], len(names)


def _own_rewards(
    first: Tensor, second: Tensor, count: int, linear: Tensor, labels: _Labels, part: Tensor, spread: float
) -> Tensor:
    """Fit each output's reward (count,) beyond the linear one by penalised likelihood."""
    weight, probability = labels.weight[part], labels.probability[part]
    own = torch.zeros(count, requires_grad=True)
    solver = torch.optim.LBFGS([own], max_iter=30, line_search_fn="strong_wolfe", tolerance_grad=1e-4)

    def loss() -> Tensor:
        solver.zero_grad()
        score = linear + own[first] - own[second]
        value = (weight * label_loss(score, probability)).sum() + own.square().sum() / (2 * spread**2)
        value.backward()
        return value

    solver.step(loss)  # pyright: ignore[reportArgumentType]
    return own.detach()


def _rater_rates(odds: Tensor, labels: _Labels, rater: Tensor, count: int, rate: float) -> Tensor:
    """Find each rater's share of wrong labels (R,) by EM, drawn to ``rate``; it may exceed one half."""
    rates = torch.full((count,), rate).clamp(1e-3, 1 - 1e-3)
    mean, weight = float(rates[0]), labels.weight
    total = torch.zeros(count).index_add_(0, rater, weight)
    for _ in range(RATER_ROUNDS):
        wrong = torch.sigmoid(-odds - torch.logit(1 - rates)[rater])
        last = rates
        rates = (torch.zeros(count).index_add_(0, rater, weight * wrong) + RATER_PRIOR * mean) / (total + RATER_PRIOR)
        if float((rates - last).abs().max()) < 1e-5:
            break
    return rates
