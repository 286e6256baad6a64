"""Calibrate a stopping rule on the scored candidates of held-out prompts, by replays in random order."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pfm._internal.checks import check_length, check_number, check_seed, check_whole
from pfm.refiner.stopping import Stopping, read_waves
from pfm.statistics import Bootstrap, Estimate

__all__ = ["Replays", "calibrate", "thresholds"]

Array = NDArray[np.float64]

QUANTILES = 200  # of the residuals that are kept
MOST_PRIOR = 1000.0  # draws that a prior may be worth
LOGIT_FLOOR = 1e-6
FOLDS = 5
LEAST_PROMPTS = 4
PRICES = np.geomspace(0.5, 1e-5, 40).tolist()


def calibrate(
    probabilities: Sequence[ArrayLike],
    scores: Sequence[ArrayLike],
    *,
    n: int = 8,
    max_n: int = 16,
    waves: int | Sequence[int] = 2,
    loss: float = 0.0,
    margin: float = 0.1,
    prior: float | None = None,
    spread_prior: float | None = None,
    replays: int = 200,
    seed: int = 0,
    prompts: Sequence[Hashable] | None = None,
) -> Stopping:
    """Return the stopping rule whose mean score on held-out prompts equals that of n draws.

    The price of a draw is the largest at which replays of the given candidates in random order score as high as best of
    n does. Whether the rule is used is decided by prompts left out in turn (five folds): best of n must confirm a gain
    over one random draw, and the 95% interval of the rule's mean score minus that of n draws must not fall below
    -(``margin`` + ``loss``) times that gain. Else the rule says why not, and stands for n draws.

    Args:
        probabilities: for each prompt b (m,) of its candidates, independent draws of the generator, by
            ``flow.win_probability``; prompts with fewer than n are left out. No prompt may have been fitted on.
        scores: (m,) of each prompt's candidates, by people or a judge; higher is better.
        n: the number of draws to replace. max_n: the most to take.
        waves: draws a wave, or the sizes of the first waves, of which the last is repeated.
        loss: share of the gain of n draws that may be given up for fewer draws.
        margin: how far below, in shares of that gain, the interval of the difference may reach.
        prior, spread_prior: draws that the mean level of logit b, and its mean spread, are worth in telling those of
            one prompt; None estimates them, infinity takes them as known.
        replays: random orders of each prompt's candidates.
        seed: of these orders.
        prompts: what tells the prompts apart: rows of one are left out together, and count as one observation. None:
            all are different.

    Raises:
        ValueError: lists of unequal length, values that are not finite, b outside of [0, 1], or settings out of range.

    >>> rng = np.random.default_rng(0)
    >>> b = [rng.random(40) for _ in range(60)]
    >>> rule = calibrate(b, b, n=8)
    >>> rule.refusal is None, rule.evidence["draws"] < 5.5
    (True, True)
    """
    seed = check_seed(seed)
    sizes = read_waves(waves)
    check_whole("n", n, 1)
    check_whole("replays", replays, 1)
    check_whole("max_n", max_n, n)
    for name, value in (("loss", loss), ("margin", margin)):
        check_number(name, value, least=0, below=1)
    rows = _checked(probabilities, scores)
    prompts = range(len(rows)) if prompts is None else prompts
    check_length("prompts", prompts, len(rows), "row")
    enough = [place for place, row in enumerate(rows) if len(row[0]) >= n]
    kept = [rows[place] for place in enough]
    numbers: dict[Hashable, int] = {}
    unit = np.array([numbers.setdefault(prompts[place], len(numbers)) for place in enough])
    evidence: dict[str, Any] = {"prompts": len(numbers), "prompts_with_too_few_candidates": len(rows) - len(kept)}
    for name, value in (("prior", prior), ("spread_prior", spread_prior)):
        check_number(name, value, least=0, also=(None, math.inf))
    blank = Stopping(n, max_n, sizes, 0.0, 0.0, 0.0, (0.0,), evidence=evidence)
    if len(numbers) < LEAST_PROMPTS:
        told = f"{len(numbers)} held-out prompts with at least {n} scored candidates are too few"
        return replace(blank, refusal=f"{told}; {LEAST_PROMPTS} are needed")
    drawn = Replays.of(kept, max_n, replays, seed)
    rule = _fitted(blank, drawn, loss, prior, spread_prior)
    figures = _left_out(blank, drawn, unit, loss, prior, spread_prior, seed)
    evidence |= {
        "gain": _values(figures.gain),
        "difference": _values(figures.difference),
        "draws": figures.draws,
        "rounds": figures.rounds,
        "loss": loss,
    }
    return replace(rule, refusal=_refusal(figures, n, margin + loss), evidence=evidence)


@dataclass(frozen=True)
class Replays:
    """The candidates of P prompts, each in R random orders, up to N of them.

    Attributes:
        best: (P, R, N) score of the best by b of the first k. lead: (P, R, N) logit b of it.
        mean, squares: (P, R, N) mean logit b of the first k, and the sum of squared differences from it.
        last: (P,) place of the last draw; N - 1 unless there are fewer candidates.
        pools: (m,) logit b of each prompt's candidates. random: (P,) mean score of all.
    """

    best: Array
    lead: Array
    mean: Array
    squares: Array
    last: NDArray[np.int64]
    pools: list[Array]
    random: Array

    @classmethod
    def of(cls, rows: Sequence[tuple[Array, Array]], max_n: int, replays: int, seed: int) -> Replays:
        """Draw the orders of candidates given as (b, scores) a prompt."""
        best, lead, mean, squares = (np.zeros((len(rows), replays, max_n)) for _ in range(4))
        last, pools = np.zeros(len(rows), np.int64), []
        for row, (b, scores) in enumerate(rows):
            pool = np.log(clipped := np.clip(b, LOGIT_FLOOR, 1 - LOGIT_FLOOR)) - np.log1p(-clipped)
            count = min(max_n, len(b))
            order = np.argsort(np.random.default_rng((seed, row)).random((replays, len(b))), axis=1)[:, :count]
            values = pool[order]
            lead[row, :, :count] = np.maximum.accumulate(values, axis=1)
            fresh = np.ones_like(values, bool)
            fresh[:, 1:] = values[:, 1:] > lead[row, :, : count - 1]
            place = np.maximum.accumulate(np.where(fresh, np.arange(count), 0), axis=1)
            best[row, :, :count] = np.take_along_axis(scores[order], place, axis=1)
            drawn = np.arange(1, count + 1)
            mean[row, :, :count] = np.cumsum(values, axis=1) / drawn
            rest = np.cumsum(values**2, axis=1) - drawn * mean[row, :, :count] ** 2
            squares[row, :, :count] = np.maximum(rest, 0)
            last[row] = count - 1
            pools.append(pool)
        return cls(best, lead, mean, squares, last, pools, np.array([scores.mean() for _, scores in rows]))

    def select(self, rows: NDArray[np.int64]) -> Replays:
        """Return those of some prompts."""
        parts = (self.best[rows], self.lead[rows], self.mean[rows], self.squares[rows], self.last[rows])
        return Replays(*parts, [self.pools[row] for row in rows], self.random[rows])

    def fixed(self, n: int) -> Array:
        """Return the mean score of best of n (P,)."""
        return self.best[np.arange(len(self.last)), :, np.minimum(n - 1, self.last)].mean(axis=1)

    def surplus(self, rule: Stopping) -> Array:
        """Return the lead of the best of the first k, as far as k draws tell it (P, R, N)."""
        return rule.lead(self.lead, self.mean, self.squares, np.arange(1, self.best.shape[2] + 1))

    def stopped(self, surplus: Array, limits: Array) -> Array:
        """Return mean score, draws and waves (P, 3) where drawing stops at thresholds (N,), infinite within a wave."""
        ends = np.flatnonzero(limits < math.inf)
        stops = np.concatenate([surplus[:, :, ends] >= limits[ends], np.ones((*surplus.shape[:2], 1), bool)], axis=2)
        wave = stops.argmax(axis=2)
        at = np.minimum(np.append(ends, self.best.shape[2])[wave], self.last[:, None])
        score = np.take_along_axis(self.best, at[:, :, None], axis=2)[:, :, 0]
        return np.stack([part.mean(axis=1) for part in (score, at + 1.0, wave + 1.0)], axis=1)


def thresholds(rule: Stopping, price: float) -> Array:
    """Return the lead that stops after each number of draws up to the cap (max_n,); infinite within a wave."""
    plan = rule.plan()
    found = np.full(rule.max_n, math.inf)
    asked = rule.waves[0]
    while asked < rule.max_n:
        more = plan.next_wave(asked)
        found[asked - 1] = rule.threshold(asked, more, price)
        asked += more
    return found


@dataclass(frozen=True)
class _Figures:
    gain: Estimate
    difference: Estimate
    draws: float
    rounds: float


def _fitted(
    blank: Stopping, replays: Replays, loss: float, prior: float | None, spread_prior: float | None
) -> Stopping:
    """Estimate level, spread, their priors and the residuals, and search the largest price that meets the target.

    With nu degrees of freedom of a scaled inverse chi-squared law of the prompts' variances, their squared coefficient
    of variation is 2 / (nu - 4); about 3 / m of it is the error of a variance of m draws with somewhat heavy tails.
    """
    means = np.array([pool.mean() for pool in replays.pools])
    sizes = np.array([len(pool) for pool in replays.pools])
    variances = np.array([pool.var(ddof=1) if len(pool) > 1 else 0.0 for pool in replays.pools])
    level, within = float(means.mean()), max(float(variances.mean()), 1e-12)
    if spread_prior is None:
        uneven = float(variances.var() / within**2 - (3 / sizes).mean())
        spread_prior = min(4 + 2 / uneven, MOST_PRIOR) if uneven > 0 else MOST_PRIOR
    if prior is None:
        between = float(means.var(ddof=1) - (variances / sizes).mean())
        prior = min(within / between, MOST_PRIOR) if between > 0 else MOST_PRIOR
    if math.isinf(prior):
        means = np.full(len(means), level)
    widened = np.sqrt(sizes / np.maximum(sizes - 1, 1))  # the mean is these draws' own
    if math.isfinite(spread_prior):
        widened *= np.sqrt(within / np.maximum(variances, 1e-3 * within))
    centred = [(pool - mean) * by for pool, mean, by in zip(replays.pools, means, widened, strict=True)]
    places = (np.arange(QUANTILES) + 0.5) / QUANTILES
    residuals = tuple(np.quantile(np.concatenate(centred), places).round(6).tolist())
    spread = {"spread": math.sqrt(within), "spread_prior": max(float(spread_prior), 1e-6)}
    rule = replace(blank, level=level, prior=float(prior), residuals=residuals, **spread)
    fixed = replays.fixed(rule.n).mean()
    target = fixed - loss * max(fixed - replays.random.mean(), 0.0)
    surplus = replays.surplus(rule)

    found = [replays.stopped(surplus, thresholds(rule, price))[:, 0].mean() for price in PRICES]
    return replace(rule, price=_price(np.array(found), target))


def _price(scores: Array, target: float) -> float:
    """Return the largest price whose score meets the target, where scores rise as ``PRICES`` fall.

    Replays of few prompts rise unevenly. The best rising fit (pooled neighbours) keeps a lucky price from being chosen.
    """
    blocks: list[tuple[float, int]] = []
    for score in scores.tolist():
        mean, size = score, 1
        while blocks and blocks[-1][0] >= mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    fitted = np.repeat([mean for mean, _ in blocks], [size for _, size in blocks])
    meeting = np.flatnonzero(fitted >= target)
    if not len(meeting):
        return 0.0
    place = int(meeting[0])
    if place == 0:
        return PRICES[0]
    share = (target - fitted[place - 1]) / (fitted[place] - fitted[place - 1])
    return float(PRICES[place - 1] * (PRICES[place] / PRICES[place - 1]) ** share)


def _left_out(
    blank: Stopping,
    replays: Replays,
    unit: NDArray[np.int64],
    loss: float,
    prior: float | None,
    spread_prior: float | None,
    seed: int,
) -> _Figures:
    """Fit on the prompts of all folds but one, and measure on that one, in turn; ``unit`` numbers each row's prompt."""
    count, prompts = len(replays.last), int(unit.max()) + 1
    fold = (np.random.default_rng([seed, prompts]).permutation(prompts) % min(FOLDS, prompts))[unit]
    found = np.zeros((count, 3))
    for number in range(int(fold.max()) + 1):
        rule = _fitted(blank, replays.select(np.flatnonzero(fold != number)), loss, prior, spread_prior)
        tested = np.flatnonzero(fold == number)
        part = replays.select(tested)
        found[tested] = part.stopped(part.surplus(rule), thresholds(rule, rule.price))
    fixed = replays.fixed(blank.n)
    bootstrap = Bootstrap(count, unit=unit)
    gain, difference = bootstrap.mean(fixed - replays.random), bootstrap.mean(found[:, 0] - fixed)
    return _Figures(gain, difference, float(found[:, 1].mean()), float(found[:, 2].mean()))


def _refusal(figures: _Figures, n: int, margin: float) -> str | None:
    if not figures.gain.low > 0:
        return f"held-out scores confirm no gain of {n} draws by b over one: {figures.gain.text(signed=True)}"
    if figures.difference.low < -margin * figures.gain.value:
        return (
            f"held-out scores do not confirm that stopping early is as good as {n} draws: difference "
            f"{figures.difference.text(signed=True)} at a gain of {figures.gain.text(signed=True)}; more prompts may"
        )
    if figures.draws >= n:
        return f"stopping early takes {figures.draws:.1f} draws on average, no fewer than {n}"
    return None


def _checked(probabilities: Sequence[ArrayLike], scores: Sequence[ArrayLike]) -> list[tuple[Array, Array]]:
    if len(probabilities) != len(scores):
        raise ValueError(
            f"probabilities and scores must be equally many, one list a prompt; got {len(probabilities)} and "
            f"{len(scores)}"
        )
    rows = []
    for row, (b, score) in enumerate(zip(probabilities, scores, strict=True)):
        values, found = (np.asarray(column, dtype=np.float64).reshape(-1) for column in (b, score))
        if len(values) != len(found):
            raise ValueError(f"prompt {row}: got {len(values)} probabilities for {len(found)} scores of candidates")
        if not (np.isfinite(values).all() and np.isfinite(found).all()):
            raise ValueError(f"prompt {row}: probabilities and scores must be finite numbers")
        if len(values) and not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"prompt {row}: b must be in [0, 1], got {values.min():g} to {values.max():g}")
        rows.append((values, found))
    return rows


def _values(estimate: Estimate) -> list[float]:
    return [round(value, 6) for value in (estimate.value, estimate.low, estimate.high)]
