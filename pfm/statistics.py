"""Estimates with intervals: bootstrap over prompts, win rates, length control and calibration.

Every interval here comes from resampling *prompts* (candidates of one prompt are not independent of each
other), and all figures of one report share the same resampled prompts, so that differences between methods
are paired.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log, log10

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_CACHED_COUNTS = 8_000_000  # entries (64 MB) of resampling counts kept in memory; beyond, they are drawn anew
_CHUNK_COUNTS = 2_000_000  # entries drawn at once
_RIDGE = 0.01  # penalty of the length-control fit on a and b: a prior of standard deviation 10 logits


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float

    def text(self, *, percent: bool = False, signed: bool = False, decimals: int | None = None) -> str:
        """Write as "0.412 [0.389, 0.437]" or "61.2% [57.0, 65.4]"; numbers to two digits of the interval."""
        value, interval = self.parts(percent=percent, signed=signed, decimals=decimals)
        return f"{value} {interval}"

    def parts(self, *, percent: bool = False, signed: bool = False, decimals: int | None = None) -> tuple[str, str]:
        """Write value and interval apart."""
        if decimals is None:
            decimals = 1 if percent else self.decimals
        # adding 0.0 makes a rounded -0.0 positive
        rounded = (round((100 if percent else 1) * v, decimals) + 0.0 for v in (self.value, self.low, self.high))
        sign = "+" if signed else ""
        value, low, high = (f"{v:{sign}.{decimals}f}".replace("-", "−") for v in rounded)
        return value + "%" * percent, f"[{low}, {high}]"

    @property
    def decimals(self) -> int:
        """Decimals that show two digits of the interval's width, or of the value if the interval has none."""
        size = self.high - self.low or abs(self.value)
        return min(6, max(0, 1 - floor(log10(size)))) if size else 1


@dataclass(frozen=True)
class Bin:
    """One bin of a plot: the mean of x, the mean outcome with its interval, and the number of candidates."""

    x: float
    outcome: Estimate
    count: int


@dataclass(frozen=True)
class Reliability:
    """How well probabilities agree with outcomes.

    ``ece`` is the expected calibration error over equal-mass bins, 0 to 1. ``noise_floor`` is the ECE that
    a perfectly calibrated predictor would show on average with these data, and ``noise_ceiling`` the 95%
    quantile of it: an ECE below the ceiling is no evidence of miscalibration. ``slope`` is that of outcome
    on
    probability: 1 is calibrated, below 1 overconfident, above 1 timid; None if the probabilities do not
        vary.
    """

    ece: Estimate
    noise_floor: float
    noise_ceiling: float
    slope: Estimate | None
    bins: list[Bin]

    @property
    def within_noise(self) -> bool:
        """Tell whether the ECE is one that a perfectly calibrated predictor could show."""
        return self.ece.value <= self.noise_ceiling


class Bootstrap:
    """Resamples n prompts with replacement; the same resamples serve every call."""

    def __init__(self, n: int, resamples: int = 2000, seed: int = 0):
        if n < 1:
            raise ValueError(f"n must be at least 1 prompt, got {n}")
        if resamples < 1:
            raise ValueError(f"resamples must be at least 1, got {resamples}; 2000 is usual")
        self.n, self.resamples, self.seed = n, resamples, seed
        self._counts = list(self._draw()) if n * resamples <= _CACHED_COUNTS else None

    def sums(self, values: ArrayLike) -> Array:
        """Sum per-prompt values over each resample: (n,) or (n, K) -> (resamples, K)."""
        columns = np.asarray(values, dtype=np.float64).reshape(self.n, -1)
        return np.concatenate([counts @ columns for counts in self._counts or self._draw()])

    def ratios(self, numerator: ArrayLike, denominator: ArrayLike) -> list[Estimate | None]:
        """Estimate sum(numerator) / sum(denominator) over prompts, column by column: (n, K) each -> K
        estimates.

        A column whose denominator sums to 0 gives None; resamples where it does are left out of the
        interval.
        """
        top = np.asarray(numerator, dtype=np.float64).reshape(self.n, -1)
        bottom = np.asarray(denominator, dtype=np.float64).reshape(self.n, -1)
        with np.errstate(divide="ignore", invalid="ignore"):
            values, samples = top.sum(0) / bottom.sum(0), self.sums(top) / self.sums(bottom)
        return [interval(value, samples[:, k]) for k, value in enumerate(values)]

    def ratio(self, numerator: ArrayLike, denominator: ArrayLike) -> Estimate | None:
        """Estimate sum(numerator) / sum(denominator) over prompts: (n,) each."""
        return self.ratios(numerator, denominator)[0]

    def mean(self, values: ArrayLike) -> Estimate:
        """Estimate the mean over prompts of finite values (n,)."""
        estimate = self.ratio(values, np.ones(self.n))
        if estimate is None:
            raise ValueError("values must be finite to have a mean")
        return estimate

    def _draw(self):
        rng = np.random.default_rng(self.seed)
        rows = max(1, _CHUNK_COUNTS // self.n)
        for start in range(0, self.resamples, rows):
            size = min(rows, self.resamples - start)
            picked = rng.integers(0, self.n, size=(size, self.n)) + self.n * np.arange(size)[:, None]
            yield (np.bincount(picked.ravel(), minlength=size * self.n).reshape(size, self.n).astype(np.float64))


def interval(value: float, samples: Array) -> Estimate | None:
    """Join a figure with the 95% percentile interval of its resampled values; None when it is undefined."""
    samples = samples[np.isfinite(samples)]
    if not np.isfinite(value) or not samples.size:
        return None
    low, high = np.quantile(samples, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))


def win_share(scores: ArrayLike, opponents: ArrayLike) -> Array:
    """Compare scores elementwise: 1 where the first is higher, 0 where it is lower, one half on a tie."""
    first, second = np.asarray(scores, dtype=np.float64), np.asarray(opponents, dtype=np.float64)
    return 0.5 * (1.0 + np.sign(first - second))


def win_share_among(scores: ArrayLike) -> Array:
    """Return each candidate's share of wins over the other candidates of its prompt, ties half: (n,) ->
    (n,), n >= 2.

    This is the unbiased outcome for b(y|x), the probability that y beats an independent draw; its mean over
    a prompt is 1/2.
    """
    values = np.asarray(scores, dtype=np.float64)
    ordered = np.sort(values)
    below = np.searchsorted(ordered, values, side="left")
    tied = np.searchsorted(ordered, values, side="right") - below - 1
    return (below + 0.5 * tied) / (values.size - 1)


def pairwise_agreement(probabilities: ArrayLike, scores: ArrayLike) -> tuple[float, int]:
    """Count the pairs of one prompt's candidates that probabilities (n,) order as scores (n,) do.

    Returns (right, pairs): pairs counts those with different scores, and equal probabilities on such a pair
    are half right.
    """
    p, s = np.asarray(probabilities, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    truth = np.sign(s[:, None] - s[None, :])
    agreement = float((truth * np.sign(p[:, None] - p[None, :])).sum()) / 2
    pairs = int(np.count_nonzero(truth)) // 2
    return (pairs + agreement) / 2, pairs


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided p-value of wins against losses under a fair coin; ties are left out."""
    n, k = wins + losses, max(wins, losses)
    if n == 0 or wins == losses:
        return 1.0
    i = np.arange(1, n + 1)
    log_pmf = np.concatenate([[0.0], np.cumsum(np.log(n - i + 1) - np.log(i))]) - n * log(2.0)
    return float(min(1.0, 2.0 * np.exp(log_pmf[k:]).sum()))


def length_controlled(
    win: ArrayLike,
    gap: ArrayLike,
    bootstrap: Bootstrap,
    *,
    owner: ArrayLike | None = None,
    weight: ArrayLike | None = None,
) -> Estimate | None:
    """Estimate the win rate that would remain between outputs of equal length.

    Fits P(win) = sigmoid(a + b · tanh(gap / std(gap))) by fractional logistic regression and returns
    sigmoid(a), as length-controlled AlpacaEval does.

    Args:
        win: (M,) in [0, 1], one half for a tie.
        gap: (M,) length of the output minus length of its opponent, in any one unit.
        bootstrap: resamples of the n prompts.
        owner: (M,) index of the prompt of each row; default: row i belongs to prompt i.
        weight: (M,) share of each row in its prompt; default 1.

    Degenerate cases: with all gaps 0 nothing needs correcting and the plain win rate is returned; with all
    gaps equal but not 0 the effect of length cannot be told from that of the method, and None is returned.
    A light ridge (a prior of standard deviation 10 logits on a and b) keeps the fit finite when length, or
    the method, decides every comparison.
    """
    win, gap = np.asarray(win, dtype=np.float64), np.asarray(gap, dtype=np.float64)
    owner = np.arange(bootstrap.n) if owner is None else np.asarray(owner)
    weight = np.ones_like(win) if weight is None else np.asarray(weight, dtype=np.float64)
    used = weight > 0
    win, gap, owner, weight = win[used], gap[used], owner[used], weight[used]

    centre = np.average(gap, weights=weight)
    scale = np.sqrt(np.average((gap - centre) ** 2, weights=weight))
    if scale <= 1e-9 * max(1.0, abs(centre)):
        if abs(centre) > 1e-9:
            return None
        totals = (np.bincount(owner, v, minlength=bootstrap.n) for v in (weight * win, weight))
        return bootstrap.ratio(*totals)

    # tanh is bounded, so rows whose covariate agrees to 0.01 share a cell; the fit of a resample then needs
    # only each cell's mass and wins, whatever the number of prompts and candidates
    x = np.tanh(gap / scale)
    _, cell = np.unique(np.round(x * 100), return_inverse=True)
    cells = int(cell.max()) + 1
    centres = np.bincount(cell, weight * x) / np.bincount(cell, weight)
    mass, wins = (_by_prompt(v, cell, cells, owner, bootstrap.n) for v in (weight, weight * win))
    fitted = _fit_logistic(centres, mass.sum(0)[None], wins.sum(0)[None], np.zeros((1, 2)))
    resampled = _fit_logistic(centres, bootstrap.sums(mass), bootstrap.sums(wins), fitted)
    return interval(float(_sigmoid(fitted[0, 0])), _sigmoid(resampled[:, 0]))


def _fit_logistic(x: Array, mass: Array, wins: Array, start: Array) -> Array:
    """Fit (a, b) of wins / mass = sigmoid(a + b·x) for each row: x (K,), mass and wins (R, K) -> (R, 2)."""
    a, b = (np.full(len(mass), column[0]) for column in start.T)
    for _ in range(100):
        p = _sigmoid(a[:, None] + b[:, None] * x)
        residual, curvature = wins - mass * p, mass * p * (1 - p)
        gradient_a, gradient_b = residual.sum(1) - _RIDGE * a, residual @ x - _RIDGE * b
        h_aa, h_ab, h_bb = curvature.sum(1) + _RIDGE, curvature @ x, curvature @ (x * x) + _RIDGE
        determinant = h_aa * h_bb - h_ab**2
        # a full Newton step can overshoot where the data are nearly separable
        step_a = np.clip((h_bb * gradient_a - h_ab * gradient_b) / determinant, -2.0, 2.0)
        step_b = np.clip((h_aa * gradient_b - h_ab * gradient_a) / determinant, -2.0, 2.0)
        a, b = a + step_a, b + step_b
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < 1e-6:
            break
    return np.stack([a, b], axis=1)


def _sigmoid(z: ArrayLike) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(z)))


def binned(x: ArrayLike, outcome: ArrayLike, owner: ArrayLike, bootstrap: Bootstrap, bins: int = 10) -> list[Bin]:
    """Average outcomes in bins of x that hold equally many rows; equal x never fall into different bins.

    x, outcome and owner (the prompt of each row) are (M,). Ties can leave fewer bins than asked for.
    """
    x, outcome = np.asarray(x, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    index, count = _equal_mass(x, bins)
    totals = np.bincount(index, minlength=count)
    rows, wins = (_by_prompt(v, index, count, owner, bootstrap.n) for v in (np.ones_like(x), outcome))
    centres = np.bincount(index, x, minlength=count) / totals
    estimates = bootstrap.ratios(wins, rows)
    return [Bin(float(c), e, int(m)) for c, e, m in zip(centres, estimates, totals, strict=True) if e is not None]


def reliability(
    probability: ArrayLike, outcome: ArrayLike, owner: ArrayLike, bootstrap: Bootstrap, bins: int = 10
) -> Reliability:
    """Compare predicted probabilities with outcomes, both (M,) in [0, 1]; owner (M,) is the prompt of each
    row.

    ECE = Σ over bins of (share of rows) · |mean outcome − mean probability|. Resampling adds noise to every
    bin and so raises each |·|: the interval is the percentile interval moved back by the mean of that rise,
    cut at 0. The noise floor resamples the same prompts after subtracting each bin's own gap, which leaves
    a calibrated predictor with the spread, and the dependence within prompts, of these data.
    """
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    index, count = _equal_mass(p, bins)
    gaps = _by_prompt(y - p, index, count, owner, bootstrap.n)
    rows = _by_prompt(np.ones_like(p), index, count, owner, bootstrap.n)
    bin_gap = gaps.sum(0) / rows.sum(0)
    ece = float(np.abs(gaps.sum(0)).sum() / p.size)

    sizes = bootstrap.sums(rows.sum(1))
    present = sizes[:, 0] > 0
    drawn_gaps, drawn_rows, sizes = (
        bootstrap.sums(gaps)[present],
        bootstrap.sums(rows)[present],
        sizes[present],
    )
    samples = np.abs(drawn_gaps / sizes).sum(1)
    null = np.abs((drawn_gaps - drawn_rows * bin_gap) / sizes).sum(1)
    low, high = np.quantile(samples - samples.mean() + ece, (0.025, 0.975))
    return Reliability(
        ece=Estimate(ece, max(0.0, float(low)), float(high)),
        noise_floor=float(null.mean()),
        noise_ceiling=float(np.quantile(null, 0.95)),
        slope=_slope(p, y, owner, bootstrap),
        bins=binned(p, y, owner, bootstrap, bins),
    )


def _slope(x: Array, y: Array, owner: ArrayLike, bootstrap: Bootstrap) -> Estimate | None:
    if np.ptp(x) <= 1e-9:
        return None
    x = x - x.mean()  # the slope does not change, and the differences of sums below keep their digits
    parts = np.stack([np.bincount(owner, v, minlength=bootstrap.n) for v in (np.ones_like(x), x, y, x * y, x * x)])
    full, drawn = parts.sum(1)[None], bootstrap.sums(parts.T)
    with np.errstate(divide="ignore", invalid="ignore"):
        value, samples = ((m * xy - sx * sy) / (m * xx - sx * sx) for m, sx, sy, xy, xx in (full.T, drawn.T))
    return interval(float(value[0]), samples)


def _equal_mass(x: Array, bins: int) -> tuple[NDArray[np.int64], int]:
    """Assign each x (M,) to one of at most ``bins`` bins of equal mass: (index (M,), number of bins in use)."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    middle = (np.cumsum(counts) - counts / 2) / x.size  # rank of a value, in 0 to 1, midway among its equals
    used, index = np.unique((bins * middle).astype(np.int64)[inverse], return_inverse=True)
    return index, used.size


def _by_prompt(values: Array, index: NDArray[np.int64], count: int, owner: ArrayLike, n: int) -> Array:
    flat = np.bincount(np.asarray(owner) * count + index, weights=values, minlength=n * count)
    return flat.reshape(n, count).astype(np.float64, copy=False)
