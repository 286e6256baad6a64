"""The replays of the draws study, on candidates whose law is known, and its attackers where the data are there."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.studies import unknown_level
from benchmarks.studies.candidate_pools import Pool
from benchmarks.studies.draws import MOST, Fold, N, adabon, exponential_tail, fixed, level_known, replayed, rule_of
from benchmarks.studies.overshoot import KINDS, SIZES, curves


def pool(row: int, size: int = 48, shift: float = 0.0, scale: float = 1.0) -> Pool:
    """Make a prompt whose score is the quantile of b, up to a level and a spread of b."""
    u = np.random.default_rng(row).random(size)
    odds = shift + scale * (np.log(u) - np.log1p(-u))
    return Pool(str(row), odds, u, np.ones(size), np.zeros(size, np.int64))


@pytest.fixture(scope="module")
def even() -> Fold:
    return Fold([pool(row) for row in range(40)], [pool(row) for row in range(40, 70)])


def test_the_rule_saves_at_equal_score_what_a_fixed_number_does_not(even):
    score, draws, _ = replayed(even, rule_of(even, 0.0, waves=1))
    best = fixed(even, N)[0].mean()
    assert best == pytest.approx(8 / 9, abs=0.015)
    assert score.mean() == pytest.approx(best, abs=0.01)
    assert draws.mean() < 5.4
    assert fixed(even, float(draws.mean()))[0].mean() < best - 0.03


def test_half_a_point_given_up_saves_more(even):
    full, half = (replayed(even, rule_of(even, loss, waves=2)) for loss in (0.0, 0.005))
    assert half[1].mean() < full[1].mean()
    assert half[0].mean() == pytest.approx(full[0].mean() - 0.005, abs=0.006)


def test_a_fixed_number_between_two_whole_ones_is_their_mixture(even):
    low, middle, high = (fixed(even, draws)[0] for draws in (4, 4.25, 5))
    assert middle == pytest.approx(0.75 * low + 0.25 * high)


def test_knowing_level_and_spread_is_a_bound():
    rng = np.random.default_rng(0)
    shifts, scales = rng.normal(size=70), rng.uniform(0.5, 2, 70)
    made = [pool(row, shift=shifts[row], scale=scales[row]) for row in range(70)]
    fold = Fold(made[:40], made[40:])
    rule = rule_of(fold, 0.0, waves=1)
    learned, known = replayed(fold, rule), level_known(fold, rule)
    assert known[1].mean() < learned[1].mean() < MOST
    assert known[0].mean() == pytest.approx(learned[0].mean(), abs=0.015)


def test_the_rivals_keep_to_their_budget_and_their_target(even):
    score, draws, rounds = adabon(even, 6.0)
    assert draws.mean() == pytest.approx(6, abs=1e-9)
    assert rounds.max() == 2
    assert fixed(even, 1)[0].mean() < score.mean() < fixed(even, N)[0].mean()
    score, draws, _ = exponential_tail(even)
    assert score.mean() == pytest.approx(fixed(even, N)[0].mean(), abs=0.015)
    assert 3 <= draws.min() <= draws.max() <= MOST


def test_attackers_of_the_highest_b_and_the_lowest_score_turn_the_curve():
    real = pool(0)
    liars = Pool(
        "0", np.append(real.log_odds, [math.inf, 9.0]), np.append(real.scores, [0.0, 0.0]), np.ones(50),
        np.append(real.kind, [1, 2]),
    )  # fmt: skip
    alone, attacked = curves([liars], KINDS["no attackers"])["0"], curves([liars], KINDS["both"])["0"]
    assert alone.argmax() == len(SIZES) - 1
    assert attacked.argmax() < 4
    assert attacked[-1] == pytest.approx(0)


def test_the_optimal_rule_is_weitzmans_where_the_level_is_known_and_looks_further_where_it_is_not(monkeypatch):
    monkeypatch.setattr(unknown_level, "SCENARIOS", 200)
    price = 0.02
    known = unknown_level.policy(math.inf, price, 1)
    index = unknown_level.ndtri(1 - math.sqrt(2 * price))  # E[(u - t)+] = price of a uniform quantile u
    assert known[:-1] == pytest.approx(np.full(MOST - 1, index), abs=0.02)
    assert known[-1] == -math.inf
    assert unknown_level.policy(math.inf, price, 1, ahead=False) == pytest.approx(known, abs=1e-9)
    optimal, ahead = (unknown_level.policy(0.5, price, 1, far) for far in (True, False))
    assert (optimal >= ahead - 1e-9).all()  # it goes on wherever one wave more is worth its price, and further
    assert optimal[-2] == ahead[-2]  # before the cap there is one wave
    assert (np.diff(optimal[:-1]) <= 0).all()  # with every draw less is left to learn of the level
    pairs = unknown_level.policy(2.0, price, 2)
    assert np.isinf(pairs[0::2]).all()
    assert np.isfinite(pairs[1:-1:2]).all()


def test_the_ensemble_of_the_studies_is_that_of_the_benchmarks():
    from benchmarks.studies.candidate_pools import ensemble

    assert len(ensemble()._kinds_of) == 4
