"""How many draws are needed: python -m benchmarks.studies.draws [--tasks arguments alpaca captions] [--seeds 3].

Candidates of unseen prompts are drawn in random order, again and again. A rule stops, and the candidate of the highest
b so far has been scored by people or a judge. Every rule that has a price is calibrated on three quarters of the test
prompts, so that its mean score there is that of best of 8 (or half a point less), and measured on the last quarter, in
turn. Intervals are over prompts, paired: each prompt's difference from its own best of 8, averaged over seeds.

The rules: `pfm` (the library's, in waves of 1, 2 or 4 or growing ones); the same with b taken at its word, or with the
prompt's level learned from its draws alone; level and spread known, which no rule can (a bound); an exponential tail
fitted to the prompt's own draws with a bonus for what is not known (after arXiv 2510.01394); AdaBoN's two stages at the
same mean number of draws (arXiv 2505.12050); and a fixed number of draws at the same mean.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.core.tables import markdown_table
from benchmarks.studies.candidate_pools import Pool, load_pools, study_options
from pfm.refiner import Stopping, calibrate
from pfm.refiner.calibration import Replays, thresholds
from pfm.statistics import Bootstrap, Estimate

__all__ = ["adabon", "exponential_tail", "main", "replayed"]

Array = NDArray[np.float64]
Found = tuple[Array, Array, Array]  # mean score, draws and rounds of each prompt

N, MOST = 8, 16
FOLDS = 4
REPLAYS = 200
HALF_A_POINT = 0.005  # of a score between 0 and 1; for captions of their range from 1 to 3
RANGE = {"arguments": 1.0, "alpaca": 1.0, "captions": 2.0, "same_generator": 1.0, "same_generator_sentiment": 1.0}
WAVES: dict[str, int | list[int]] = {
    "1": 1,
    "2": 2,
    "4": 4,
    "1, 1, 2, 4, 8": [1, 1, 2, 4, 8],
    "2, 2, 4, 8": [2, 2, 4, 8],
}


@dataclass(frozen=True)
class Fold:
    """Holds the prompts that a rule is calibrated on, and those that it is measured on."""

    learned: list[Pool]
    tested: list[Pool]

    @cached_property
    def learned_replays(self) -> Replays:
        """Draw the candidates of the prompts that are calibrated on in random orders."""
        return _replays(self.learned)

    @cached_property
    def tested_replays(self) -> Replays:
        """Draw those of the held-out prompts."""
        return _replays(self.tested)


def _replays(pools: Sequence[Pool]) -> Replays:
    return Replays.of([(_sigmoid(pool.log_odds), pool.scores) for pool in pools], MOST, REPLAYS, 7)


def folds(pools: list[Pool]) -> list[Fold]:
    """Hold out every prompt once."""
    of = np.random.default_rng(len(pools)).permutation(len(pools)) % FOLDS
    return [
        Fold(
            [pool for pool, at in zip(pools, of, strict=True) if at != number],
            [pool for pool, at in zip(pools, of, strict=True) if at == number],
        )
        for number in range(FOLDS)
    ]


def rule_of(fold: Fold, loss: float, **settings: Any) -> Stopping:
    """Calibrate the library's rule; ``loss`` is in points of score."""
    replays = fold.learned_replays
    share = min(loss / max(replays.fixed(N).mean() - replays.random.mean(), 1e-9), 0.99)
    return calibrate(
        [_sigmoid(pool.log_odds) for pool in fold.learned], [pool.scores for pool in fold.learned],
        n=N, max_n=MOST, loss=share, replays=REPLAYS, **settings,
    )  # fmt: skip


def replayed(fold: Fold, rule: Stopping) -> Found:
    """Measure a rule on the held-out prompts, whether or not its evidence confirms it."""
    replays = fold.tested_replays
    return _columns(replays.stopped(replays.surplus(rule), thresholds(rule, rule.price)))


def level_known(fold: Fold, rule: Stopping) -> Found:
    """Measure the rule where every prompt's level and spread are known: what knowing them better could bring."""
    centred = Fold(_centred(fold.learned), _centred(fold.tested))
    return replayed(centred, rule_of(centred, 0.0, waves=rule.waves, prior=math.inf, spread_prior=math.inf))


def _centred(pools: Sequence[Pool]) -> list[Pool]:
    def own(pool: Pool) -> Array:
        return (pool.log_odds - pool.log_odds.mean()) / max(pool.log_odds.std(), 1e-9)

    return [replace(pool, log_odds=own(pool)) for pool in pools]


def exponential_tail(fold: Fold, bonus: float = 0.5) -> Found:
    """Stop above the fair cap of an exponential tail that is fitted to the draws above their median.

    With excess scale beta and median m, E[(v - tau)+] = price gives tau = m + beta log(beta / (2 price)). The scale is
    raised by ``bonus`` / sqrt(excesses) of itself. The price is calibrated like that of every rule.
    """

    def tail(replays: Replays) -> tuple[Array, Array]:
        """Return the median and the raised scale of the first k draws (P, R, N); infinite below three."""
        orders = np.diff(replays.mean * np.arange(1, MOST + 1), axis=2, prepend=0)
        median, scale = np.zeros(orders.shape), np.full(orders.shape, np.inf)
        for k in range(3, MOST):
            median[:, :, k - 1] = np.median(orders[:, :, :k], axis=2)
            above = np.maximum(orders[:, :, :k] - median[:, :, k - 1, None], 0)
            number = (above > 0).sum(2).clip(1)
            scale[:, :, k - 1] = above.sum(2) / number * (1 + bonus / np.sqrt(number)) + 1e-9
        return median, scale

    def stopped(replays: Replays, median: Array, scale: Array, price: float) -> Array:
        finite = np.where(np.isfinite(scale), scale, 1.0)
        surplus = replays.lead - (median + finite * np.log(finite / (2 * price)))
        return replays.stopped(np.where(np.isfinite(scale), surplus, -np.inf), np.zeros(MOST))

    learned, tested = fold.learned_replays, fold.tested_replays
    known, target = tail(learned), learned.fixed(N).mean()
    low, high = math.log(1e-6), math.log(10.0)
    for _ in range(18):
        middle = (low + high) / 2
        meets = stopped(learned, *known, math.exp(middle))[:, 0].mean() >= target
        low, high = (middle, high) if meets else (low, middle)
    return _columns(stopped(tested, *tail(tested), math.exp(low)))


def adabon(fold: Fold, mean_draws: float, explored: float = 0.5, replays: int = 30) -> Found:
    """Explore every prompt, estimate its law of b by a Gaussian kernel, and give the rest where it gains most.

    All prompts share the budget. A share ``explored`` of it is spent on the first stage.
    """
    pools = fold.tested
    first = max(2, round(explored * mean_draws))
    budget = round(mean_draws * len(pools))
    scores, draws = np.zeros(len(pools)), np.zeros(len(pools))
    for replay in range(replays):
        rng = np.random.default_rng([replay, 11])
        orders = [rng.permutation(len(pool.scores)) for pool in pools]
        gains = [
            _marginal(pool.log_odds[order[:first]], len(pool.scores), rng)
            for pool, order in zip(pools, orders, strict=True)
        ]
        taken = np.full(len(pools), first)
        for _ in range(budget - first * len(pools)):
            value = [
                float(gain[at - first]) if at - first < len(gain) else -1.0
                for gain, at in zip(gains, taken, strict=True)
            ]
            taken[int(np.argmax(value))] += 1
        for row, (pool, order) in enumerate(zip(pools, orders, strict=True)):
            some = order[: taken[row]]
            scores[row] += pool.scores[some[pool.log_odds[some].argmax()]] / replays
            draws[row] += len(some) / replays
    return scores, draws, np.full(len(pools), 2.0)


def _marginal(seen: Array, size: int, rng: np.random.Generator) -> Array:
    """Return what each further draw adds to the expected maximum."""
    width = max(seen.std(ddof=1), 1e-6) * len(seen) ** -0.2  # Scott's rule
    drawn = np.sort(np.maximum(rng.choice(seen, 256) + width * rng.standard_normal(256), seen.max()))
    share = np.linspace(0, 1, 257)
    best = np.array([seen.max()] + [float(np.diff(share**j) @ drawn) for j in range(1, min(size, 33) - len(seen) + 1)])
    return np.diff(best)


def fixed(fold: Fold, draws: float) -> Found:
    """Measure a fixed number of draws; between two whole numbers, both in proportion."""
    low = math.floor(draws)
    share = draws - low
    replays = fold.tested_replays
    found = (1 - share) * replays.fixed(low) + share * replays.fixed(low + 1)
    return found, np.full(len(found), draws), np.ones(len(found))


def _columns(rows: Array) -> Found:
    score, draws, rounds = rows.T
    return score, draws, rounds


def _sigmoid(values: Array) -> Array:
    return 0.5 + 0.5 * np.tanh(values / 2)


# -- the table ---------------------------------------------------------------------------------------------------


class Table:
    """Collects each prompt's figures over folds and seeds."""

    def __init__(self, unit: float) -> None:
        self.unit = unit
        self.rows: dict[str, dict[str, list[tuple[float, float, float, float]]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self.refused: list[bool] = []

    def add(self, label: str, fold: Fold, found: Found, base: Array) -> None:
        for pool, score, draws, rounds, best in zip(fold.tested, *found, base, strict=True):
            self.rows[label][pool.group].append((score, draws, rounds, score - best))

    def lines(self) -> list[list[str]]:
        found = [["rule", "draws", "saved", "rounds", "score", "minus best of 8, points"]]
        for label, groups in self.rows.items():
            score, draws, rounds, gap = np.array([np.mean(values, axis=0) for values in groups.values()]).T
            bootstrap = Bootstrap(len(score))
            gap_estimate: Estimate = bootstrap.mean(100 * gap / self.unit)
            found.append([
                label, bootstrap.mean(draws).text(decimals=2), f"{1 - draws.mean() / N:.0%}", f"{rounds.mean():.1f}",
                f"{score.mean():.3f}", gap_estimate.text(signed=True, decimals=2),
            ])  # fmt: skip
        return found


def measure(task: str, seeds: Sequence[int], labels: str, out: Path) -> Table:
    """Measure every rule on a task."""
    unit = RANGE[task]
    table = Table(unit)
    for seed in seeds:
        pools = [pool.honest() for pool in load_pools(task, seed, labels, out)]
        means: list[float] = []
        for fold in folds([pool for pool in pools if len(pool.scores) >= MOST]):
            base = fixed(fold, N)
            table.add("fixed, 8", fold, base, base[0])
            rules = {f"pfm, waves of {name}": rule_of(fold, 0.0, waves=waves) for name, waves in WAVES.items()}
            half = rule_of(fold, HALF_A_POINT * unit, waves=2)
            rules |= {"pfm, waves of 1, half a point less": rule_of(fold, HALF_A_POINT * unit, waves=1),
                      "pfm, waves of 2, half a point less": half,
                      "b at its word, waves of 1": rule_of(fold, 0.0, waves=1, prior=math.inf, spread_prior=math.inf),
                      "level learned, spread not, waves of 1": rule_of(fold, 0.0, waves=1, spread_prior=math.inf),
                      "level from own draws, waves of 1": rule_of(fold, 0.0, waves=1, prior=0.0)}  # fmt: skip
            for label, rule in rules.items():
                table.add(label, fold, replayed(fold, rule), base[0])
            served = rules["pfm, waves of 2"]
            table.refused.append(served.refusal is not None)
            table.add(
                "as served: waves of 2, else fixed", fold, base if served.refusal else replayed(fold, served), base[0]
            )
            mean = float(replayed(fold, half)[1].mean())
            means.append(mean)
            others: dict[str, Callable[[], Found]] = {
                "fixed, at the mean of waves of 2, half a point less": lambda mean=mean, fold=fold: fixed(fold, mean),
                "exponential tail": lambda fold=fold: exponential_tail(fold),
                "level and spread known (bound), waves of 1": lambda fold=fold, rules=rules: level_known(
                    fold, rules["pfm, waves of 1"]
                ),
            }
            for label, make in others.items():
                table.add(label, fold, make(), base[0])
            table.add("one draw", fold, fixed(fold, 1), base[0])
        whole = Fold([], [pool for pool in pools if len(pool.scores) >= MOST])  # one batch, nothing to calibrate
        best = fixed(whole, N)[0]
        for explored in (0.5, 0.75):
            label = f"AdaBoN at that mean, {explored:.0%} to explore"
            table.add(label, whole, adabon(whole, float(np.mean(means)), explored), best)
    return table


def main() -> None:
    """Print one table for each task and kind of labels."""
    options = study_options(__doc__)
    for task in options.tasks:
        for labels in options.labels:
            table = measure(task, range(options.seeds), labels, options.out)
            refused = f"{sum(table.refused)} of {len(table.refused)} calibrations fall back to 8 draws"
            print(f"\n## {task}, labels {labels}: {refused}\n", *markdown_table(table.lines()), sep="\n", flush=True)
            path = options.out / f"table-{task}-{labels}.json"
            path.write_text(json.dumps(table.lines(), ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
