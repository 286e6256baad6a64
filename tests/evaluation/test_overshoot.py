"""Best-of-n curves in closed form, the choice of n and strength, and the warning in the report."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from pfm.evaluation import Report, Scored, best_of_curve, choose_selection
from pfm.evaluation.overshoot import past_its_best


def by_hand(b, scores, k):
    found = []
    for subset in map(list, itertools.combinations(range(len(b)), k)):
        best = b[subset].max()
        found.append(np.mean([scores[i] for i in subset if b[i] == best]))
    return float(np.mean(found))


@pytest.mark.parametrize("ties", [False, True])
def test_the_curve_is_the_mean_over_all_subsets(ties):
    rng = np.random.default_rng(0)
    b, scores = rng.random(7).round(1 if ties else 6), rng.random(7)
    if ties:
        b[3] = b[5]
    wanted = [by_hand(b, scores, k) for k in range(1, 8)]
    if not ties:
        assert best_of_curve(b, scores) == pytest.approx(wanted)
    else:
        assert best_of_curve(b, scores)[[0, 6]] == pytest.approx([wanted[0], wanted[6]])


def test_best_of_k_of_its_own_scores_is_the_expected_maximum():
    curve = best_of_curve(np.arange(1, 101) / 101, np.arange(1, 101) / 101)
    assert curve[[0, 1, 7]] == pytest.approx([1 / 2, 2 / 3, 8 / 9], abs=1e-9)  # k / (k + 1)
    with pytest.raises(ValueError, match="equally many"):
        best_of_curve([0.5], [])


def pools(attacked: bool, prompts: int = 60):
    rng = np.random.default_rng(1)
    b = [rng.random(32) for _ in range(prompts)]
    return b, [np.where(values > 0.94, 0.0, values) if attacked else values for values in b]


def test_attackers_make_more_candidates_worse_and_validation_finds_fewer():
    b, scores = pools(attacked=True)
    found = choose_selection(b, scores)
    assert found.n < 32
    assert found.gain.low > 0.1
    past = past_its_best(b, scores)
    assert past is not None
    assert past[0] < 16
    assert past[1].low > 0.1


def test_where_b_is_right_the_most_candidates_and_the_sharpest_choice_stay():
    b, scores = pools(attacked=False)
    found = choose_selection(b, scores)
    assert (found.n, found.strength) == (32, math.inf)
    assert found.options == {"n": 32}
    assert found.gain.value == 0
    assert past_its_best(b, scores) is None


def test_where_b_knows_nothing_nothing_is_found_to_be_past_its_best():
    rng = np.random.default_rng(2)
    b, scores = ([rng.random(16) for _ in range(40)] for _ in range(2))
    assert past_its_best(b, scores) is None
    assert choose_selection(b, scores).gain.low < 0 < choose_selection(b, scores).gain.high


def test_soft_selection_is_chosen_where_one_candidate_lies_and_the_rest_is_even():
    # The highest b is a lie; among the others b tells the best, so that a draw in proportion to a power of b wins.
    rng = np.random.default_rng(3)
    b, scores = [], []
    for _ in range(60):
        quality = rng.uniform(0.5, 0.9, 12)
        b.append(np.append(quality, 0.92))
        scores.append(np.append(quality, -3.0))
    found = choose_selection(b, scores, sizes=(13,))
    assert found.strength < math.inf
    assert found.options == {"n": 13, "by": "sample", "strength": found.strength}


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (([[0.5]], [[1.0]]), {}, "two prompts"),
        (([[0.5], [0.5]], [[1.0], [1.0, 2.0]]), {}, "prompt 1"),
        (([[0.5], [0.5]], [[1.0], [math.nan]]), {}, "prompt 1"),
        (([[0.5], [0.5]], [[1.0], [1.0]]), {"sizes": []}, "sizes must"),
        (([[0.5], [0.5]], [[1.0], [1.0]]), {"strengths": [-1]}, "strengths"),
    ],
)
def test_what_cannot_be_chosen_from_is_said(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        choose_selection(*arguments, **settings)


def scored(attacked: bool) -> list[Scored]:
    b, scores = pools(attacked)
    return [
        Scored(
            f"p{row}", [f"{row} {n}" for n in range(32)], score, {"pfm": int(np.argmax(values))}, probabilities=values
        )
        for row, (values, score) in enumerate(zip(b, scores, strict=True))
    ]


def test_the_report_says_when_n_is_past_its_best():
    warned = Report.from_scored(scored(attacked=True)).verdict.warnings
    assert any("32 candidates are past the best number" in warning for warning in warned)
    assert not any(
        "past the best" in warning for warning in Report.from_scored(scored(attacked=False)).verdict.warnings
    )
