"""Counted votes on pairs: soft labels and weights.

A pair's n votes are drawn with its own p. The log loss of a model is linear in its label, so that the share v / n,
whose mean is p, teaches what p would: over many pairs the errors cancel. A share drawn towards one half would teach a
model to be less sure than people are.

Other uses look at one pair at a time. With p drawn from a symmetric Beta(a, a) over pairs, the best guess of a pair's
own p is the posterior mean (v + a) / (n + 2 a), and, since the votes of one pair share their p, n of them are worth
n / (1 + (n - 1) / (2 a + 1)) single votes on different pairs. A tie is half a vote for either side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfm._internal.checks import as_float_tensor, check_choice, check_finite, check_number

__all__ = ["VoteLabels", "check_counts", "fit_prior", "soft_labels"]

PRIORS = torch.logspace(-1, 3, 81, dtype=torch.float64)  # of a: labels nearly certain, to nearly at chance


@dataclass(frozen=True)
class VoteLabels:
    """Holds the labels and weights of N pairs from their votes.

    Attributes:
        probability: (N,) that the first output is preferred, in (0, 1) with a prior above 0.
        weight: (N,) > 0.
        prior: the a of Beta(a, a) that was used.
    """

    probability: Tensor
    weight: Tensor
    prior: float


def soft_labels(
    first: Any, second: Any, tie: Any = None, *, prior: float | None = 0.0, weight: str = "total"
) -> VoteLabels:
    """Turn vote counts into soft labels and weights for :class:`pfm.EncodedPairs`.

    Args:
        first, second: (N,) votes for either output, finite and >= 0.
        tie: (N,) undecided votes, half of each for either side; None for none.
        prior: votes for either side that are added to every pair, the a of Beta(a, a), >= 0: 0 for what a model is
            fitted on; None finds the one by which labels come nearest to each pair's p, see :func:`fit_prior`.
        weight: "total" for the number of votes, "effective" for how many single votes they are worth (with ``prior=0``
            that is 1: such pairs are certain), "one" for 1.

    Raises:
        ValueError: shapes disagree, a count is negative or not finite, a pair has no votes, or all votes are ties.

    >>> labels = soft_labels([3, 0], [1, 2])
    >>> labels.probability.tolist(), labels.weight.tolist()
    ([0.75, 0.0], [4.0, 2.0])
    """
    check_choice("weight", weight, ("effective", "total", "one"))
    prior = check_number("prior", prior, least=0, also=(None,))
    one, two, undecided = check_counts(first, second, tie)
    if prior is None:
        prior = fit_prior(one, two, undecided)
    total = one + two + undecided
    probability = (one + undecided / 2 + prior) / (total + 2 * prior)
    worth = {
        "effective": total / (1 + (total - 1).clamp_min(0) / (2 * prior + 1)),
        "total": total,
        "one": torch.ones_like(total),
    }[weight]
    return VoteLabels(probability.float(), worth.float(), float(prior))


def fit_prior(first: Any, second: Any, tie: Any = None) -> float:
    """Find the a of Beta(a, a) under which vote counts are most likely, between 0.1 and 1000.

    Votes of pairs that people agree on need a small a, votes at chance a large one. Pairs with one vote do not
    determine it: for such pairs alone a = 1, which makes every share equally likely. Arguments are those of
    :func:`soft_labels`.
    """
    one, two, undecided = check_counts(first, second, tie)
    won, lost = one + undecided / 2, two + undecided / 2
    telling = won + lost > 1
    if not bool(telling.any()):
        return 1.0
    won, lost = won[telling, None], lost[telling, None]
    a = PRIORS[None, :]
    # log B(v + a, n - v + a) - log B(a, a); what does not depend on a is left out.
    likelihood = _log_beta(won + a, lost + a) - _log_beta(a, a)
    return float(PRIORS[int(likelihood.sum(0).argmax())])


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def check_counts(first: Any, second: Any, tie: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Check votes for the first output, the second, and neither (None for none): three (N,) float64.

    Raises:
        ValueError: shapes disagree, a count is negative or not finite, a pair has no votes, or all votes are ties.
    """
    one = as_float_tensor("first", first).double()
    columns = {"first": one, "second": as_float_tensor("second", second).double()}
    columns["tie"] = torch.zeros_like(one) if tie is None else as_float_tensor("tie", tie).double()
    for name, column in columns.items():
        if column.ndim != 1 or column.shape != one.shape or not len(column):
            raise ValueError(
                f"{name} must be (N,) counts of votes, N >= 1, one a pair: got {tuple(column.shape)} beside first "
                f"{tuple(one.shape)}"
            )
        check_finite(name, column)
        if bool((column < 0).any()):
            row = int((column < 0).nonzero()[0])
            raise ValueError(f"{name} must hold counts >= 0: row {row} is {float(column[row]):g}")
    total = columns["first"] + columns["second"] + columns["tie"]
    if bool((total == 0).any()):
        row = int((total == 0).nonzero()[0])
        raise ValueError(f"pair {row} has no votes, so there is nothing to label it by: leave such pairs out")
    if not bool((columns["first"] + columns["second"] > 0).any()):
        raise ValueError(
            f"all votes on all {len(total)} pairs are ties: they say nothing about which output is better; give pairs "
            "of which at least one was decided"
        )
    return columns["first"], columns["second"], columns["tie"]
