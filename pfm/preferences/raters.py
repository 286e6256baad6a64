"""Votes of several raters on one pair: the reliability of each rater, and the joint label.

Dawid & Skene (1979) take every pair as having a truth k - the first output is better, neither is, the second is -
and rater r as voting l with probability C_r[k, l]; expectation maximisation finds the truths' posterior and the
tables in turn. Two forms of the table:

- ``one-coin``: a rater has one number, the probability of a correct vote; the distribution of wrong votes is common to
  all raters;
- ``two-coin``: a rater has the whole confusion matrix, so that a preference for what was shown first is a bias and not
  an error. Without ties that is one probability for each truth.

Both are drawn to the table of all raters together by a Dirichlet prior worth ``prior`` votes, so that a rater of few
votes counts as an average one: after n votes its own record has the share n / (n + prior).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pfm._internal.checks import as_float_tensor, check_choice, check_finite, check_length, check_number, check_shape
from pfm.data.identity import prompt_identity

if TYPE_CHECKING:
    from pfm.data.pairs import PreferencePairs

__all__ = ["RaterFit", "Reconciled", "fit_raters", "numbered", "rater_index", "reconcile"]

MODELS = ("one-coin", "two-coin")
ITERATIONS = 500
SETTLED = 1e-6  # change of a posterior at which the iteration ends
LEAST = 1e-4  # of a truth's or a vote's probability: nothing is taken as impossible


@dataclass(frozen=True)
class RaterFit:
    """Holds what V votes of R raters on I pairs show.

    Attributes:
        raters: the R raters, as they were named.
        votes: (R,) how many votes each has cast.
        reliability: (R,) probability that a rater says what is true, over all truths; drawn to the mean.
        first_bias: (R,) P(says first) of a rater over pairs whose truths are balanced, minus P(says second); 0 in the
            one-coin model.
        mean_reliability: that of all votes together.
        probability: (I,) that the first output is the better one, a tie half.
        tied: (I,) probability that neither is.
        single: raters of one vote; their reliability is nearly the mean.
        iterations: of the fit; ``settled`` says whether it came to rest.
    """

    raters: list[Any]
    votes: Tensor
    reliability: Tensor
    first_bias: Tensor
    mean_reliability: float
    probability: Tensor
    tied: Tensor
    single: list[Any]
    iterations: int
    settled: bool

    def __str__(self) -> str:
        low, high = float(self.reliability.min()), float(self.reliability.max())
        ending = "" if self.settled else "; the fit had not come to rest"
        return (
            f"{len(self.raters)} raters, {int(self.votes.sum())} votes on {len(self.probability)} pairs: reliability "
            f"{self.mean_reliability:.1%} on the mean, {low:.1%} to {high:.1%}; {len(self.single)} raters of one vote, "
            f"taken as average{ending}"
        )


def fit_raters(
    pair: Any,
    rater: Sequence[Hashable] | Tensor,
    vote: Any,
    *,
    model: str = "one-coin",
    prior: float = 10.0,
    log_odds: Any = None,
) -> RaterFit:
    """Fit the reliability of raters and the label of each pair from their votes.

    In the one-coin model either output of a pair may be called first; in the two-coin model it is the output that was
    shown first, the same for all votes on the pair.

    Args:
        pair: (V,) integers from 0: the pair that each vote is on.
        rater: V names, or (V,) integers: who cast it.
        vote: (V,) 1 for the first output, 0 for the second, 1/2 for a tie.
        model: "one-coin" or "two-coin".
        prior: votes that the prior counts for, above 0.
        log_odds: (I,) what is believed of each pair before any vote, as by a preference model that was fitted on
            other prompts; None for nothing.

    Raises:
        ValueError: lengths disagree, a vote is none of 0, 1/2, 1, all votes are ties, or no pair has two votes and
            ``log_odds`` is None: reliable and unreliable raters could not be distinguished.
    """
    check_choice("model", model, MODELS)
    prior = check_number("prior", prior, above=0)
    cast, said, classes = _checked_votes(pair, vote)
    raters, of = numbered(rater, len(said))
    pairs = int(cast.max()) + 1
    odds = torch.zeros(pairs, dtype=torch.float64)
    if log_odds is not None:
        odds = as_float_tensor("log_odds", log_odds).double()
        check_shape("log_odds", odds, (pairs,), "one a pair")
        check_finite("log_odds", odds)
    elif int(torch.bincount(cast).max()) < 2:
        raise ValueError(
            f"no pair has more than one vote ({len(said)} votes on {len(said)} pairs), so good and bad "
            "raters cannot be distinguished: give pairs that several raters have seen, or log_odds of a model fitted "
            "on other prompts"
        )
    votes = _Votes(cast, of, said, pairs, len(raters), classes, odds)
    truth, table, iterations, settled = votes.maximise(model, prior)
    counts = torch.bincount(of, minlength=len(raters))
    share = truth[cast].mean(0)
    right = (table.diagonal(dim1=1, dim2=2) * share).sum(1)
    ends = table[:, [0, -1]].mean(1)
    bias = ends[:, 0] - ends[:, -1] if model == "two-coin" else torch.zeros(len(raters))
    tied = truth[:, 1] if truth.shape[1] == 3 else torch.zeros(pairs)
    return RaterFit(
        raters=raters,
        votes=counts,
        reliability=right.float(),
        first_bias=bias.float(),
        mean_reliability=float((right * counts).sum() / counts.sum()),
        probability=(truth[:, 0] + tied / 2).float(),
        tied=tied.float(),
        single=[name for name, count in zip(raters, counts.tolist(), strict=True) if count == 1],
        iterations=iterations,
        settled=settled,
    )


@dataclass(frozen=True)
class _Votes:
    """Holds checked votes: pair, rater and class (V,), the numbers of pairs, raters, classes and the prior log-odds."""

    pair: Tensor
    rater: Tensor
    said: Tensor
    pairs: int
    raters: int
    classes: int
    odds: Tensor

    def maximise(self, model: str, prior: float) -> tuple[Tensor, Tensor, int, bool]:
        """Find the posterior of the truths (I, K) and the raters' tables (R, K, K), by EM from the votes' shares."""
        classes = self.classes
        spoken = torch.nn.functional.one_hot(self.said, classes).double()
        # One vote for each class besides: no share is 0 or 1.
        start = torch.zeros(self.pairs, classes, dtype=torch.float64).index_add_(0, self.pair, spoken) + 1 / classes
        start = start * torch.stack(self._belief(classes, torch.ones(()) / classes), 1).exp()
        truth = start / start.sum(1, keepdim=True)
        for number in range(1, ITERATIONS + 1):
            table = self._tables(truth, spoken, model, prior)
            tie = truth[:, 1].mean() if classes == 3 else torch.zeros(())
            evidence = table.log()[self.rater, :, self.said]
            logit = torch.stack(self._belief(classes, tie), 1).index_add(0, self.pair, evidence)
            last, truth = truth, torch.softmax(logit, 1)
            change = float((truth - last).abs().max())
            if change < SETTLED:
                return truth, table, number, True
        return truth, table, ITERATIONS, False

    def _belief(self, classes: int, tie: Tensor) -> list[Tensor]:
        """Return the log-probability of each truth (I,) before any vote, to which end a pair is turned being open."""
        first, second = logsigmoid(self.odds), logsigmoid(-self.odds)
        if classes == 2:
            return [first, second]
        tie = tie.double().clamp(LEAST, 1 - LEAST)
        return [first + torch.log1p(-tie), tie.log().expand_as(first), second + torch.log1p(-tie)]

    def _tables(self, truth: Tensor, spoken: Tensor, model: str, prior: float) -> Tensor:
        """Return each rater's table (R, K, K): rows truths, columns votes, drawn to that of all raters."""
        each = truth[self.pair][:, :, None] * spoken[:, None, :]
        counts = torch.zeros(self.raters, *each.shape[1:], dtype=torch.float64).index_add_(0, self.rater, each)
        total = counts.sum(0) + 1 / each.shape[1]
        total = total + total.flip(0, 1)  # to which end a pair is turned says nothing about raters together
        common = total / total.sum(1, keepdim=True)
        if model == "two-coin":
            drawn = counts + prior * common
            return (drawn / drawn.sum(2, keepdim=True)).clamp(LEAST, 1 - LEAST)
        right = common.diagonal()
        expected = truth.mean(0) @ right
        own = counts.diagonal(dim1=1, dim2=2).sum(1)
        skill = (own + prior * expected) / (counts.sum((1, 2)) + prior)
        # A rater's errors are those of all raters, times one factor: as often as this one errs.
        wrong = ((1 - skill) / (1 - expected).clamp_min(LEAST))[:, None, None] * common
        off = wrong * (1 - torch.eye(len(right), dtype=torch.float64))
        off = off * ((1 - LEAST) / off.sum(2, keepdim=True).clamp_min(1 - LEAST))
        return (off + torch.diag_embed(1 - off.sum(2))).clamp(LEAST, 1 - LEAST)


def _checked_votes(pair: Any, vote: Any) -> tuple[Tensor, Tensor, int]:
    """Return pairs (V,), votes as classes (V,) - first 0, second the last, a tie between - and the number of classes.

    It is 3 where there is a tie, else 2, whether or not there is a vote in each class.
    """
    cast = torch.as_tensor(pair)
    if cast.ndim != 1 or cast.is_floating_point() or cast.dtype == torch.bool:
        raise ValueError(f"pair must be one-dimensional integers: got {cast.dtype} {tuple(cast.shape)}")
    cast = cast.long()
    if not len(cast) or int(cast.min()) < 0:
        raise ValueError(f"pair must hold at least one number, none below 0: got {cast.tolist()[:5]}")
    said = as_float_tensor("vote", vote)
    check_shape("vote", said, (len(cast),), "one for each entry of pair")
    check_finite("vote", said)
    odd = ~((said == 0) | (said == 0.5) | (said == 1))
    if bool(odd.any()):
        row = int(odd.nonzero()[0])
        raise ValueError(f"vote must be 1 (first), 0 (second) or 0.5 (tie): vote {row} is {float(said[row]):g}")
    if bool((said == 0.5).all()):
        raise ValueError(
            f"all {len(said)} votes are ties: they say nothing about which output is better, nor about the raters; "
            "give votes of which at least one was decided"
        )
    classes = 3 if bool((said == 0.5).any()) else 2
    return cast, ((classes - 1) * (1 - said)).long(), classes


def numbered(rater: Sequence[Hashable] | Tensor, count: int) -> tuple[list[Any], Tensor]:
    """Number the raters of ``count`` votes in order of appearance: their names, and (V,) int64 for each vote.

    Raises:
        ValueError: there is not one name a vote, or one is None or NaN.
    """
    names = rater.tolist() if isinstance(rater, Tensor) else list(rater)
    check_length("rater", names, count, "vote")
    if any(name is None or (isinstance(name, float) and math.isnan(name)) for name in names):
        row = next(i for i, name in enumerate(names) if name is None or name != name)
        raise ValueError(f"rater of vote {row} is {names[row]}: every vote needs its rater's name")
    places: dict[Any, int] = {}
    index = [places.setdefault(name, len(places)) for name in names]
    return list(places), torch.tensor(index)


# -- votes as rows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reconciled:
    """Holds one row a pair, ``pairs``, made of one row a vote, and the fit of the raters."""

    pairs: PreferencePairs
    raters: RaterFit


def rater_index(pairs: PreferencePairs, column: str = "rater") -> tuple[list[Any], Tensor]:
    """Number the raters of rows in order of appearance: their names, and (N,) int64 for each row.

    Raises:
        ValueError: there is no such column, or a row has no rater.
    """
    if column not in pairs.extra:
        found = ", ".join(map(repr, pairs.extra)) or "none"
        raise ValueError(f"column {column!r} is missing: the rows' other columns are {found}; name it with column=")
    return numbered(pairs.extra[column], len(pairs))


def reconcile(
    pairs: PreferencePairs, *, column: str = "rater", model: str = "one-coin", prior: float = 10.0
) -> Reconciled:
    """Join rows that are votes, each with its rater's name, to one row a pair with a soft label.

    Rows of one prompt (:mod:`pfm.data.identity`) with the same two responses, in whichever order, are votes on one
    pair; a row's ``probability`` says what was voted, 1 (or none) for its chosen response, 1/2 for a tie. The pair's
    probability is the posterior of :func:`fit_raters`, its weight 1: the probability accounts
    for the number of votes. With the two-coin model the response that is chosen in a pair's first row counts as shown
    first.

    Args:
        pairs: one row a vote.
        column: extra column that names the rater.
        model, prior: of :func:`fit_raters`.

    Returns:
        Pairs without the column of raters, and without others in which a pair's votes disagree.

    Raises:
        ValueError: the column is missing, or the votes are refused by :func:`fit_raters`.
    """
    names, index = rater_index(pairs, column)
    probability = pairs.probability or [1.0] * len(pairs)
    groups = pairs.group or [None] * len(pairs)
    votes_on: dict[tuple[Any, ...], list[int]] = {}
    for i, (prompt, group) in enumerate(zip(pairs.prompts, groups, strict=True)):
        key = (prompt_identity(prompt, group), *sorted((pairs.chosen[i], pairs.rejected[i])))
        votes_on.setdefault(key, []).append(i)
    cast, said, by = [], [], []
    for place, members in enumerate(votes_on.values()):
        for i in members:
            alike = pairs.chosen[i] == pairs.chosen[members[0]]
            cast.append(place)
            said.append(probability[i] if alike else 1 - probability[i])
            by.append(names[int(index[i])])
    found = fit_raters(cast, by, said, model=model, prior=prior)
    rows = [
        _joined_row(pairs, members, column, float(p))
        for members, p in zip(votes_on.values(), found.probability, strict=True)
    ]
    return Reconciled(type(pairs).from_rows(rows), found)


def _joined_row(pairs: PreferencePairs, members: list[int], column: str, probability: float) -> dict[str, Any]:
    """Make one row of the votes on one pair, whose first chosen response is preferred with ``probability``."""
    first = pairs[members[0]]
    extras = [name for name in pairs.extra if name in first and name != column]
    kept = {name: first[name] for name in extras if all(pairs.extra[name][i] == first[name] for i in members)}
    better, worse = ("chosen", "rejected") if probability >= 0.5 else ("rejected", "chosen")
    own = {"prompt": first["prompt"], "chosen": first[better], "rejected": first[worse]}
    if first.get("group") is not None:
        own["group"] = first["group"]
    return kept | own | {"probability": max(probability, 1 - probability)}
