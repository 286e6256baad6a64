"""What any stopping rule can save where a prompt's level is unknown: python -m benchmarks.studies.unknown_level.

Draws of a prompt are normal about its level with spread 1, and levels are normal with variance 1 / ``prior``, so that
knowing the law of levels is worth ``prior`` draws. With unknown location and recall (Rothschild 1974) the state is the
lead of the best draw over the posterior mean of the level, and the number of draws: dynamic programming gives the rule
that no other beats at a price a draw. Looking one wave ahead (Weitzman 1979), as ``n="auto"`` does, is beside it, and
so is the library's own rule, calibrated on simulated prompts. Every rule has the price at which its mean quantile is
that of best of 8, n / (n + 1). Draws are counted over simulated prompts that nothing was fitted on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr, ndtri

from benchmarks.core.tables import markdown_table
from pfm.refiner import calibrate
from pfm.refiner.calibration import Replays, thresholds

__all__ = ["draws_at_equal_quality", "library_draws", "main", "policy"]

Array = NDArray[np.float64]

N, CAP = 8, 16
LEADS = np.linspace(-1.5, 4.5, 601)
SCENARIOS = 800  # of a wave
PRIORS = (math.inf, 16.0, 8.0, 4.0, 2.0, 1.5, 1.0, 0.5)


def policy(prior: float, price: float, wave: int, ahead: bool = True) -> Array:
    """Return the least lead (CAP,) at which to stop after each number of draws; infinite within a wave.

    Args:
        prior: draws that the law of levels is worth. price: of a draw, in quantiles. wave: draws at once.
        ahead: look ahead to the cap, which is optimal; else one wave.
    """
    even = (np.arange(SCENARIOS) + 0.5) / SCENARIOS
    shuffled = [np.random.default_rng(number).permutation(even) for number in range(wave)]
    own, common = np.stack([ndtri(each) for each in shuffled]), ndtri(np.random.default_rng(wave).permutation(even))
    limits, stops = np.full(CAP, math.inf), range(wave, CAP, wave)
    limits[CAP - 1] = -math.inf
    value = _quantile(LEADS, CAP, prior)
    for k in reversed(stops):
        # Draws to come, about the posterior mean: what is unknown of the level is common to them.
        fresh = own + common / math.sqrt(prior + k)
        later = np.maximum(LEADS[:, None], fresh.max(axis=0)) - fresh.sum(axis=0) / (prior + k + wave)
        known = np.interp(later, LEADS, value) if ahead else _quantile(later, k + wave, prior)
        go_on, now = known.mean(axis=1) - wave * price, _quantile(LEADS, k, prior)
        if (now >= go_on).any():
            limits[k - 1] = LEADS[np.argmax(now >= go_on)]
        value = np.maximum(now, go_on)
    return limits


def _quantile(lead: Array, drawn: int, prior: float) -> Array:
    """Return the expected quantile of a draw at a lead over the level, of which ``drawn`` draws are known."""
    return ndtr(lead / math.sqrt(1 + 1 / (prior + drawn)))


def draws_at_equal_quality(prior: float, wave: int, ahead: bool, prompts: int = 100_000, seed: int = 0) -> float:
    """Return the mean draws of a rule at the price at which its mean quantile is that of best of 8."""
    noise = np.random.default_rng(seed).standard_normal((prompts, CAP))
    level = np.random.default_rng(seed + 1).standard_normal((prompts, 1)) / math.sqrt(prior)
    best, values = np.maximum.accumulate(noise, axis=1), noise + level
    weight = prior / (prior + np.arange(1, CAP + 1)) if math.isfinite(prior) else np.ones(CAP)
    mean = (1 - weight) * np.cumsum(values, axis=1) / np.arange(1, CAP + 1)
    lead = np.maximum.accumulate(values, axis=1) - mean

    def reached(price: float) -> tuple[float, float]:
        at = (lead >= policy(prior, price, wave, ahead)).argmax(axis=1)
        return float(ndtr(best[np.arange(prompts), at]).mean()), float(at.mean() + 1)

    target = ndtr(best[:, N - 1]).mean()  # of the same draws, so that their luck cancels
    low, high = math.log(1e-4), math.log(0.3)
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(math.exp(middle))[0] >= target else (low, middle)
    return reached(math.exp(low))[1]


def library_draws(prior: float, wave: int, prompts: int = 500, seed: int = 0) -> tuple[float, float]:
    """Return the mean draws of the calibrated rule, and its mean quantile minus that of best of 8, on fresh prompts."""

    def made(number: int) -> list[tuple[Array, Array]]:
        rng = np.random.default_rng([seed, number])
        noise = rng.standard_normal((prompts, 48))
        level = rng.standard_normal((prompts, 1)) / math.sqrt(prior)
        return list(zip(expit(noise + level), ndtr(noise), strict=True))

    b, scores = zip(*made(0), strict=True)
    rule = calibrate(b, scores, n=N, max_n=CAP, waves=wave, replays=50)
    replays = Replays.of(made(1), CAP, 50, 1)
    score, draws, _ = replays.stopped(replays.surplus(rule), thresholds(rule, rule.price)).mean(axis=0)
    return float(draws), float(score - replays.fixed(N).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print draws and the share saved by prior, for waves of one and of two."""
    from tqdm.auto import tqdm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waves", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--prompts", type=int, default=100_000)
    options = parser.parse_args(arguments)
    if not all(1 <= wave <= N for wave in options.waves) or options.prompts < 1:
        parser.error(f"--waves must be from 1 to {N}, and --prompts at least 1")
    shown: Callable[[float], str] = lambda draws: f"{draws:.2f} ({1 - draws / N:.0%})"  # noqa: E731
    rows = [
        ["waves", "prior, draws", "optimal", "one wave ahead", "the library's rule", "its quantile minus best of 8"]
    ]
    pairs = [(wave, prior) for wave in options.waves for prior in PRIORS]
    for wave, prior in tqdm(pairs, unit="rule"):
        optimal, ahead = (draws_at_equal_quality(prior, wave, far, options.prompts) for far in (True, False))
        own, difference = library_draws(prior, wave)
        told = "known" if math.isinf(prior) else f"{prior:g}"
        rows.append([str(wave), told, shown(optimal), shown(ahead), shown(own), f"{difference:+.4f}".replace("-", "−")])
    report: Callable[[str], None] = print
    report("\n".join(markdown_table(rows)))


if __name__ == "__main__":
    main()
