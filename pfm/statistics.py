"""Estimates with intervals: bootstrap over prompts, win rates, length control and calibration.

Every interval here comes from resampling *prompts* (candidates of one prompt are not independent of each
other), and all figures of one report share the same resampled prompts, so that differences between methods
are paired. A percentile interval of n resampled prompts is too narrow by the factor sqrt((n - 1) / n) and by
the ratio of the normal to Student's quantile (Hesterberg 2015); both are put right by :func:`interval`.
``python -m benchmarks.studies.coverage`` simulates how often each interval holds the truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log, log10, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_CACHED_COUNTS = 8_000_000  # entries (64 MB) of resampling counts kept in memory; beyond, they are drawn again
_CHUNK_COUNTS = 2_000_000  # entries drawn at once
_ONE_SIDED = 0.025  # what either side of a 95% interval leaves out
FEW_PROMPTS = 30  # below which intervals are rough
_RIDGE = 0.01  # penalty of the length-control fit on a and b: a prior of standard deviation 10 logits


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95% interval.

    >>> Estimate(0.412, 0.389, 0.437).text()
    '0.412 [0.389, 0.437]'
    """

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
    """Holds measures of how well probabilities agree with outcomes.

    ``ece`` estimates the expected calibration error over equal-mass bins, 0 to 1, without what noise adds
    to it; ``measured_ece`` is the plain figure, with the noise. ``noise_floor`` is the plain ECE that a
    perfectly calibrated predictor would show on average with these data, and ``noise_ceiling`` the 95%
    quantile of it: a plain ECE below the ceiling is no evidence of miscalibration. ``slope`` is that of
    outcome on probability: 1 is calibrated, below 1 overconfident, above 1 underconfident; None if the
    probabilities do not vary.
    """

    ece: Estimate
    noise_floor: float
    noise_ceiling: float
    slope: Estimate | None
    bins: list[Bin]
    measured_ece: float | None = None  # None in reports of earlier versions, whose ``ece`` is the plain figure

    @property
    def within_noise(self) -> bool:
        """Return whether the plain ECE is one that a perfectly calibrated predictor could show."""
        return (self.ece.value if self.measured_ece is None else self.measured_ece) <= self.noise_ceiling


class Bootstrap:
    """Resamples n prompts with replacement; the same resamples serve every call.

    Rows of one prompt are no independent draws. With ``unit`` (n,), which numbers the prompt of each of n rows from 0,
    the prompts are resampled, each with all of its rows.

    >>> wins = [1, 0, 1, 1, 0, 1, 1, 1]
    >>> rate = Bootstrap(len(wins)).ratio(wins, [1] * len(wins), bounds=(0, 1))
    >>> rate.value, rate.low < rate.value < rate.high
    (0.75, True)
    """

    def __init__(self, n: int, resamples: int = 2000, seed: int = 0, unit: NDArray[np.int64] | None = None):
        if n < 1:
            raise ValueError(f"n must be at least 1 prompt: got {n}")
        if resamples < 1:
            raise ValueError(f"resamples must be at least 1: got {resamples}; 2000 is usual")
        self.n, self.resamples, self.seed = n, resamples, seed
        self.resampled = n if unit is None else int(np.max(unit)) + 1
        self.unit = np.asarray(unit) if self.resampled < n else None
        self._counts = list(self._draw()) if self.resampled * resamples <= _CACHED_COUNTS else None

    def sums(self, values: ArrayLike) -> Array:
        """Sum per-prompt values over each resample: (n,) or (n, K) -> (resamples, K)."""
        columns = self.by_unit(values)
        return np.concatenate([counts @ columns for counts in self._counts or self._draw()])

    def by_unit(self, values: ArrayLike) -> Array:
        """Sum values over what is resampled: (n,) or (n, K) -> (resampled, K)."""
        columns = np.asarray(values, dtype=np.float64).reshape(self.n, -1)
        if self.unit is None:
            return columns
        summed = np.zeros((self.resampled, columns.shape[1]))
        np.add.at(summed, self.unit, columns)
        return summed

    def units(self, used: ArrayLike) -> Array:
        """Count the independent units among the rows in use: (n,) or (n, K) booleans -> (K,)."""
        return (self.by_unit(np.asarray(used, dtype=bool)) > 0).sum(0)

    def ratios(
        self, numerator: ArrayLike, denominator: ArrayLike, bounds: tuple[float, float] | None = None
    ) -> list[Estimate | None]:
        """Estimate sum(numerator) / sum(denominator) over prompts, (n, K) each: one ratio a column.

        A column whose denominator sums to 0 gives None; resamples where it does are left out of the
        interval. ``bounds`` are limits that the figure cannot exceed, such as (0, 1) of a share.
        """
        top = np.asarray(numerator, dtype=np.float64).reshape(self.n, -1)
        bottom = np.asarray(denominator, dtype=np.float64).reshape(self.n, -1)
        with np.errstate(divide="ignore", invalid="ignore"):
            values, samples = top.sum(0) / bottom.sum(0), self.sums(top) / self.sums(bottom)
        units = self.units(bottom != 0)
        return [interval(value, samples[:, k], int(units[k]), bounds) for k, value in enumerate(values)]

    def ratio(
        self, numerator: ArrayLike, denominator: ArrayLike, bounds: tuple[float, float] | None = None
    ) -> Estimate | None:
        """Estimate sum(numerator) / sum(denominator) over prompts: (n,) each."""
        return self.ratios(numerator, denominator, bounds)[0]

    def share(self, numerator: ArrayLike, denominator: ArrayLike) -> Estimate | None:
        """Estimate a share of outcomes in [0, 1], sum(numerator) / sum(denominator) over prompts: (n,) each.

        The interval stays in [0, 1]. Where all n prompts agree, resamples have no spread, and say nothing of how many
        prompts are otherwise: at most 1 - 0.025^(1/n) of them, at 97.5% confidence, since all n of the sample would
        miss a larger part with a chance below 2.5%. For n successes of n that limit is the exact binomial one (Clopper
        and Pearson 1934).

        >>> Bootstrap(6).share([1] * 6, [1] * 6).text(percent=True)
        '100.0% [54.1, 100.0]'
        """
        estimate = self.ratio(numerator, denominator, (0.0, 1.0))
        units = int(self.units(np.asarray(denominator, dtype=np.float64) != 0)[0])
        if estimate is None or (estimate.low < estimate.high) or (units > 1 and 0.0 < estimate.value < 1.0):
            return estimate
        otherwise = 1 - _ONE_SIDED ** (1 / units)
        value = estimate.value
        return Estimate(value, value - otherwise * value, value + otherwise * (1 - value))

    def mean(self, values: ArrayLike, bounds: tuple[float, float] | None = None) -> Estimate:
        """Estimate the mean over prompts of finite values (n,)."""
        estimate = self.ratio(values, np.ones(self.n), bounds)
        if estimate is None:
            raise ValueError("values must be finite to have a mean")
        return estimate

    def _draw(self):
        rng = np.random.default_rng(self.seed)
        n = self.resampled
        rows = max(1, _CHUNK_COUNTS // n)
        for start in range(0, self.resamples, rows):
            size = min(rows, self.resamples - start)
            picked = rng.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
            yield np.bincount(picked.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def interval(
    value: float, samples: Array, units: int | None = None, bounds: tuple[float, float] | None = None
) -> Estimate | None:
    """Join a figure with the 95% interval of its resampled values; None when it is undefined.

    Args:
        value: the figure.
        samples: (R,) its values over resamples; those that are not finite are left out.
        units: number of independent units that were resampled. The percentile interval is stretched about the
            value by Student's t(units - 1) over the normal quantile and by sqrt(units / (units - 1)); of one
            unit no spread can be known. None: the percentile interval unchanged.
        bounds: limits of the figure, to which the interval is cut.
    """
    samples = samples[np.isfinite(samples)]
    if not np.isfinite(value) or not samples.size:
        return None
    low, high = np.quantile(samples, (0.025, 0.975))
    if units is not None and units > 1:
        stretch = small_sample_factor(units)
        low, high = value - stretch * (value - low), value + stretch * (high - value)
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Estimate(float(value), float(low), float(high))


def warn_of_few(prompts: int, kind: str = "prompt") -> str | None:
    """Return the warning that figures over fewer than 30 prompts need; None from there on.

    >>> warn_of_few(1)[:14]
    'Only 1 prompt:'
    """
    if prompts >= FEW_PROMPTS:
        return None
    return (
        f"Only {prompts} {kind}{'s' * (prompts != 1)}: the intervals are rough, and nothing but a large effect can "
        f"show. Use {FEW_PROMPTS} or more, better several hundred."
    )


def small_sample_factor(units: int) -> float:
    """Return by how much a percentile interval of the mean of ``units`` >= 2 values is to be stretched."""
    from scipy.special import ndtri, stdtrit

    return float(stdtrit(units - 1, 0.975) / ndtri(0.975)) * sqrt(units / (units - 1))


def win_share(scores: ArrayLike, opponents: ArrayLike) -> Array:
    """Compare scores elementwise: 1 where the first is higher, 0 where it is lower, one half on a tie."""
    first, second = np.asarray(scores, dtype=np.float64), np.asarray(opponents, dtype=np.float64)
    return 0.5 * (1.0 + np.sign(first - second))


def win_share_among(scores: ArrayLike) -> Array:
    """Return each candidate's share of wins over the other candidates of its prompt: (n,) -> (n,), n >= 2.

    A tie counts half. This is the unbiased outcome for b(y|x), the probability that y beats an independent draw; its
    mean over a prompt is 1/2.

    >>> win_share_among([3, 1, 1]).tolist()
    [1.0, 0.25, 0.25]
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
    """Return the exact two-sided p-value of wins against losses with equal chances; ties are left out.

    >>> round(sign_test(wins=9, losses=1), 4)
    0.0215
    """
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
    changed: ArrayLike | None = None,
) -> Estimate | None:
    """Estimate the win rate that would remain between outputs of equal length.

    Fits P(win) = sigmoid(a + b · tanh(gap / std(gap))) to the changed outputs by fractional logistic
    regression. An unchanged output is a tie at equal length whatever the length of the others, and says
    nothing of a and b: the estimate is sigmoid(a) times the changed share plus half of the unchanged share.

    The term in length, and the prediction at a difference of zero, are those of length-controlled AlpacaEval
    (Dubois et al. 2404.04475). It differs in three ways: it adds a term for the difficulty of each
    instruction, known from other models; it chooses an L1 penalty by cross-validation, where a light ridge
    stands here (a prior of standard deviation 10 logits on a and b, which keeps the fit finite when length,
    or the method, decides every comparison); and it adds weighted comparisons of baselines that game length.
    Outputs equal to the baseline's are not set apart there, being rare between two models.

    Args:
        win: (M,) in [0, 1], one half for a tie.
        gap: (M,) length of the output minus length of its opponent, in any one unit.
        bootstrap: resamples of the n prompts.
        owner: (M,) index of the prompt of each row; default: row i belongs to prompt i.
        weight: (M,) share of each row in its prompt; default 1.
        changed: (M,) whether the output differs from its opponent; default: all but ties of equal length.

    Degenerate cases: with all gaps 0 nothing needs correcting and the plain win rate is returned; with the
    gaps of all changed outputs equal but not 0 the effect of length cannot be separated from that of the method,
    and None is returned.
    """
    win, gap = np.asarray(win, dtype=np.float64), np.asarray(gap, dtype=np.float64)
    owner = np.arange(bootstrap.n) if owner is None else np.asarray(owner)
    weight = np.ones_like(win) if weight is None else np.asarray(weight, dtype=np.float64)
    differs = np.logical_or(win != 0.5, gap != 0) if changed is None else np.asarray(changed, dtype=bool)
    total = np.bincount(owner, weight, minlength=bootstrap.n)
    used = np.logical_and(weight > 0, differs)
    unchanged = total - np.bincount(owner[used], weight[used], minlength=bootstrap.n)
    if not used.any():
        return bootstrap.ratio(unchanged / 2, total)
    win, gap, owner, weight = win[used], gap[used], owner[used], weight[used]

    centre = np.average(gap, weights=weight)
    scale = np.sqrt(np.average((gap - centre) ** 2, weights=weight))
    if scale <= 1e-9 * max(1.0, abs(centre)):
        if abs(centre) > 1e-9:
            return None
        return bootstrap.ratio(np.bincount(owner, weight * win, minlength=bootstrap.n) + unchanged / 2, total, (0, 1))

    # tanh is bounded, so rows whose covariate agrees to 0.01 share a cell; the fit of a resample then needs
    # only each cell's mass and wins, whatever the number of prompts and candidates
    x = np.tanh(gap / scale)
    _, cell = np.unique(np.round(x * 100), return_inverse=True)
    cells = int(cell.max()) + 1
    centres = np.bincount(cell, weight * x) / np.bincount(cell, weight)
    mass, wins = (_by_prompt(v, cell, cells, owner, bootstrap.n) for v in (weight, weight * win))
    fitted = _fit_logistic(centres, mass.sum(0)[None], wins.sum(0)[None], np.zeros((1, 2)))
    resampled = _fit_logistic(centres, bootstrap.sums(mass), bootstrap.sums(wins), fitted)
    kept = float(unchanged.sum() / total.sum())
    kept_of_each = bootstrap.sums(unchanged)[:, 0] / bootstrap.sums(total)[:, 0]
    return interval(
        kept / 2 + (1 - kept) * float(_sigmoid(fitted[0, 0])),
        kept_of_each / 2 + (1 - kept_of_each) * _sigmoid(resampled[:, 0]),
        int(bootstrap.units(np.bincount(owner, weight, minlength=bootstrap.n) > 0)[0]),
        (0.0, 1.0),
    )


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

    x, outcome and owner (the prompt of each row) are (M,). Ties can leave fewer bins than requested.
    """
    x, outcome = np.asarray(x, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    index, count = _equal_mass(x, bins)
    totals = np.bincount(index, minlength=count)
    rows, wins = (_by_prompt(v, index, count, owner, bootstrap.n) for v in (np.ones_like(x), outcome))
    centres = np.bincount(index, x, minlength=count) / totals
    estimates = bootstrap.ratios(wins, rows, (0.0, 1.0))
    return [Bin(float(c), e, int(m)) for c, e, m in zip(centres, estimates, totals, strict=True) if e is not None]


def reliability(
    probability: ArrayLike, outcome: ArrayLike, owner: ArrayLike, bootstrap: Bootstrap, bins: int = 10
) -> Reliability:
    """Compare predicted probabilities with outcomes, both (M,) in [0, 1]; owner (M,) is each row's prompt.

    The plain ECE = Σ over bins of (share of rows) · |mean outcome − mean probability| is never below what
    noise alone makes of it. Resampled prompts, after subtracting each bin's own gap, show that noise with
    its dependence within prompts; a calibrated predictor would show it and nothing else (noise floor and
    ceiling). Gaps that are a multiple s of the observed ones would show s times them plus the noise: the
    estimate is the multiple whose median ECE is the measured one, and the interval holds those whose 95%
    range has it, so that it starts at 0 wherever calibration cannot be ruled out.
    """
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(outcome, dtype=np.float64)
    index, count = _equal_mass(p, bins)
    gaps = _by_prompt(y - p, index, count, owner, bootstrap.n)
    rows = _by_prompt(np.ones_like(p), index, count, owner, bootstrap.n)
    bin_gap = gaps.sum(0) / rows.sum(0)
    measured = float(np.abs(gaps.sum(0)).sum() / p.size)

    sizes = bootstrap.sums(rows.sum(1))
    present = sizes[:, 0] > 0
    drawn_gaps, drawn_rows, sizes = bootstrap.sums(gaps)[present], bootstrap.sums(rows)[present], sizes[present]
    noise = (drawn_gaps - drawn_rows * bin_gap) / sizes
    # a bin of m prompts has taken 1 / m of its noise into its own gap; of few prompts the noise is known roughly
    prompts = rows.sum(0) ** 2 / (bootstrap.by_unit(rows) ** 2).sum(0)
    noise *= np.sqrt(prompts / np.maximum(prompts - 1, 1.0))
    if bootstrap.resampled > 1:
        noise *= small_sample_factor(bootstrap.resampled) * sqrt(1 - 1 / bootstrap.resampled)
    null = np.abs(noise).sum(1)
    low, middle, high = (measured * found for found in _multiples(bin_gap * rows.sum(0) / p.size, noise, measured))
    return Reliability(
        ece=Estimate(middle, low, high),
        noise_floor=float(null.mean()),
        noise_ceiling=float(np.quantile(null, 0.95)),
        slope=_slope(p, y, owner, bootstrap),
        bins=binned(p, y, owner, bootstrap, bins),
        measured_ece=measured,
    )


def _multiples(gap: Array, noise: Array, measured: float) -> tuple[float, float, float]:
    """Find the multiples s >= 0 of gaps (K,) under which Σ|s gap + noise| has ``measured`` as a quantile.

    The quantiles are 0.975, 0.5 and 0.025, of noise (R, K): the ends of the interval and the estimate.
    """

    def multiple(quantile: float) -> float:
        def above(s: float) -> bool:
            return bool(np.quantile(np.abs(s * gap + noise).sum(1), quantile) >= measured)

        if above(0.0):
            return 0.0
        low, high = 0.0, 1.0
        while not above(high) and high < 64:
            low, high = high, 2 * high
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (low, middle) if above(middle) else (middle, high)
        return high

    if measured <= 0:
        return 0.0, 0.0, 0.0
    low, middle, high = multiple(0.975), multiple(0.5), multiple(0.025)
    return low, middle, high


def _slope(x: Array, y: Array, owner: ArrayLike, bootstrap: Bootstrap) -> Estimate | None:
    if np.ptp(x) <= 1e-9:
        return None
    x = x - x.mean()  # the slope does not change, and the differences of sums below keep their digits
    parts = np.stack([np.bincount(owner, v, minlength=bootstrap.n) for v in (np.ones_like(x), x, y, x * y, x * x)])
    full, drawn = parts.sum(1)[None], bootstrap.sums(parts.T)
    with np.errstate(divide="ignore", invalid="ignore"):
        value, samples = ((m * xy - sx * sy) / (m * xx - sx * sx) for m, sx, sy, xy, xx in (full.T, drawn.T))
    return interval(float(value[0]), samples, int(bootstrap.units(parts[0] > 0)[0]))


def _equal_mass(x: Array, bins: int) -> tuple[NDArray[np.int64], int]:
    """Assign each x (M,) to one of at most ``bins`` bins of equal mass: (index (M,), number of bins in use)."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    middle = (np.cumsum(counts) - counts / 2) / x.size  # rank of a value, in 0 to 1, midway among its equals
    used, index = np.unique((bins * middle).astype(np.int64)[inverse], return_inverse=True)
    return index, used.size


def _by_prompt(values: Array, index: NDArray[np.int64], count: int, owner: ArrayLike, n: int) -> Array:
    flat = np.bincount(np.asarray(owner) * count + index, weights=values, minlength=n * count)
    return flat.reshape(n, count).astype(np.float64, copy=False)
