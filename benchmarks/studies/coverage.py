"""How often 95% intervals hold the truth: python -m benchmarks.studies.coverage [--parts seeds prompts ece length].

- seeds: means over seeds, each with prompts of its own, where seeds differ as much as prompts, or not at all.
- prompts: means of win rates and of skewed scores over few prompts.
- ece: the calibration error of calibrated and of overconfident probabilities, several candidates a prompt.
- length: the length-controlled win rate, whose true value between changed outputs of equal length is 80% or 50%.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from benchmarks.core.measures import SeedBootstrap, interquartile_mean
from pfm.statistics import Bootstrap, Estimate, interval, length_controlled, reliability

__all__ = ["PARTS", "calibration", "length_control", "main", "over_prompts", "over_seeds"]

Found = tuple[Estimate, float]  # an estimate, and the truth
RESAMPLES = 400


def over_seeds(seeds: int, between: float, rng: np.random.Generator, *, prompts: int = 20) -> Found:
    """Estimate the mean of prompts' values with deviation 1, and of seeds' with ``between``, around 0."""
    seed_of = np.repeat(np.arange(seeds), prompts)
    values = rng.normal(size=seeds * prompts) + between * rng.normal(size=seeds)[seed_of]
    return SeedBootstrap(seed_of, RESAMPLES, int(rng.integers(2**31))).mean(values), 0.0


def over_seeds_interquartile(seeds: int, rng: np.random.Generator) -> Found:
    """Estimate the interquartile mean of one figure a seed."""
    values = rng.normal(size=seeds)
    drawn = interquartile_mean(values[rng.integers(seeds, size=(RESAMPLES, seeds))])
    found = interval(float(interquartile_mean(values)), drawn, seeds)
    assert found is not None
    return found, 0.0


def over_prompts(prompts: int, law: str, rng: np.random.Generator) -> Found:
    """Estimate a mean over prompts of "wins" (1, ½ or 0) or of "skewed" scores (exponential)."""
    if law == "wins":
        values, truth = rng.choice([1.0, 0.5, 0.0], p=[0.5, 0.2, 0.3], size=prompts), 0.6
    else:
        values, truth = rng.exponential(size=prompts), 1.0
    bounds = (0.0, 1.0) if law == "wins" else None
    return Bootstrap(prompts, RESAMPLES, int(rng.integers(2**31))).mean(values, bounds), truth


def calibration(prompts: int, slope: float, rng: np.random.Generator, *, candidates: int = 4) -> Found:
    """Estimate the ECE of probabilities p whose outcomes have probability ½ + slope (p - ½)."""
    p = rng.beta(3, 3, size=prompts * candidates)
    true = 0.5 + slope * (p - 0.5)
    bins = 10 * np.argsort(np.argsort(p)) // p.size
    truth = float(np.abs(np.bincount(bins, true - p)).sum() / p.size)
    owner = np.arange(p.size) // candidates
    bootstrap = Bootstrap(prompts, RESAMPLES, int(rng.integers(2**31)))
    return reliability(p, (rng.random(p.size) < true).astype(float), owner, bootstrap).ece, truth


def length_control(prompts: int, kept: float, equal: float, rng: np.random.Generator, *, bias: float = 2.0) -> Found:
    """Estimate the win rate at equal length, ``equal`` between changed outputs, with a share ``kept`` unchanged."""
    gap = rng.normal(100, 300, size=prompts)
    unchanged = rng.random(prompts) < kept
    odds = np.log(equal / (1 - equal)) + bias * np.tanh(gap / 300)
    win = np.where(unchanged, 0.5, rng.random(prompts) < 1 / (1 + np.exp(-odds)))
    bootstrap = Bootstrap(prompts, RESAMPLES, int(rng.integers(2**31)))
    found = length_controlled(win, np.where(unchanged, 0.0, gap), bootstrap, changed=~unchanged)
    assert found is not None
    return found, kept / 2 + (1 - kept) * equal


def covered(study: Callable[[np.random.Generator], Found], repeats: int, seed: int = 0) -> tuple[float, float, float]:
    """Return how often a study's interval holds the truth, and the means of estimate and truth."""
    rng = np.random.default_rng(seed)
    rows: NDArray[np.float64] = np.array(
        [(e.low <= truth <= e.high, e.value, truth) for e, truth in (study(rng) for _ in range(repeats))]
    )
    share, estimate, truth = rows.mean(0)
    return float(share), float(estimate), float(truth)


def _line(name: str, study: Callable[[np.random.Generator], Found], repeats: int) -> str:
    share, estimate, truth = covered(study, repeats)
    return f"{name} | {truth:.3f} | {estimate:.3f} | {share:.3f}"


def _seeds(repeats: int) -> Iterator[str]:
    for seeds in (3, 5, 10):
        for between in (0.0, 1.0):
            yield _line(f"{seeds} seeds, deviation between {between:g}", partial(over_seeds, seeds, between), repeats)
        yield _line(f"{seeds} seeds, interquartile mean", partial(over_seeds_interquartile, seeds), repeats)


def _prompts(repeats: int) -> Iterator[str]:
    for prompts in (5, 10, 20, 50, 200):
        for law in ("wins", "skewed"):
            yield _line(f"{prompts} prompts, {law}", partial(over_prompts, prompts, law), repeats)


def _ece(repeats: int) -> Iterator[str]:
    for prompts in (20, 50, 200):
        for slope in (1.0, 0.5):
            yield _line(f"{prompts} prompts, slope {slope:g}", partial(calibration, prompts, slope), repeats)


def _length(repeats: int) -> Iterator[str]:
    for prompts in (100, 300):
        for equal in (0.8, 0.5):
            for kept in (0.0, 0.1, 0.3, 0.5):
                yield _line(
                    f"{prompts} prompts, {kept:.0%} unchanged, {equal:.0%} between changed",
                    partial(length_control, prompts, kept, equal), repeats,
                )  # fmt: skip


PARTS: dict[str, Callable[[int], Iterator[str]]] = {
    "seeds": _seeds, "prompts": _prompts, "ece": _ece, "length": _length,
}  # fmt: skip


def main() -> None:
    """Print one table for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=500, help="simulated data sets a row")
    options = parser.parse_args()
    for part in options.parts:
        print(f"\n{part}\nstudy | truth | mean estimate | coverage of the 95% interval")
        for line in PARTS[part](options.repeats):
            print(line, flush=True)


if __name__ == "__main__":
    main()
