"""Closed forms of the estimates behind the report card."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pfm.statistics
from pfm.statistics import (
    Bootstrap,
    Estimate,
    _multiples,
    binned,
    interval,
    length_controlled,
    pairwise_agreement,
    reliability,
    sign_test,
    small_sample_factor,
    win_share,
    win_share_among,
)


def sigmoid(z):
    return 1 / (1 + np.exp(-np.asarray(z)))


# ---- bootstrap


@pytest.mark.parametrize("prompts", [1, 2, 5, 6, 40])
def test_a_share_on_which_all_prompts_agree_has_the_exact_binomial_limit(prompts):
    bootstrap, one = Bootstrap(prompts, 50), np.ones(prompts)
    limit = 0.025 ** (1 / prompts)  # Clopper and Pearson, for all of n
    top, bottom = bootstrap.share(one, one), bootstrap.share(0 * one, one)
    assert top is not None
    assert bottom is not None
    assert (top.value, top.low, top.high) == pytest.approx((1.0, limit, 1.0))
    assert (bottom.value, bottom.low, bottom.high) == pytest.approx((0.0, 0.0, 1 - limit))
    assert bootstrap.share(3 * one, 3 * one) == top  # several pairs of a prompt are no further prompts
    unused = np.r_[one, 0.0]
    assert Bootstrap(prompts + 1, 50).share(unused, unused) == top
    assert bootstrap.share(0 * one, 0 * one) is None


def test_one_prompt_says_nothing_of_others_and_ties_of_many_are_no_outcomes():
    alone = Bootstrap(1, 50).share([1], [2])
    assert alone is not None
    assert (alone.value, alone.low, alone.high) == pytest.approx((0.5, 0.0125, 0.9875))
    assert Bootstrap(9, 50).share([0.5] * 9, [1] * 9) == Estimate(0.5, 0.5, 0.5)


@pytest.mark.parametrize("prompts", [5, 10, 30])
def test_intervals_of_a_share_near_one_hold_it(prompts):
    bootstrap, true = Bootstrap(prompts, 400), 0.95
    coverage = {"share": 0.0, "ratio": 0.0}
    for won in range(prompts + 1):
        outcomes = np.arange(prompts) < won
        chance = math.comb(prompts, won) * true**won * (1 - true) ** (prompts - won)
        for name, found in (
            ("share", bootstrap.share(outcomes, np.ones(prompts))),
            ("ratio", bootstrap.ratio(outcomes, np.ones(prompts), (0, 1))),
        ):
            assert found is not None
            assert 0 <= found.low <= found.value <= found.high <= 1
            coverage[name] += chance * (found.low <= true <= found.high)
    assert coverage["share"] >= 0.95  # nominal
    assert coverage["ratio"] < 0.8  # what the limit is for


def test_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=900)
    estimate = Bootstrap(900, 4000).mean(values)
    half = 1.96 * values.std() / 30
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.high - estimate.value == pytest.approx(half, rel=0.1)
    assert estimate.value - estimate.low == pytest.approx(half, rel=0.1)


def test_interval_covers_the_truth_95_times_in_100():
    rng, bootstrap = np.random.default_rng(1), Bootstrap(80, 400)
    covered = 0
    for _ in range(400):
        estimate = bootstrap.mean(rng.random(80) < 0.6)
        covered += estimate.low <= 0.6 <= estimate.high
    assert 0.91 <= covered / 400 <= 0.98


def test_resamples_are_shared_so_that_differences_are_paired():
    rng, bootstrap = np.random.default_rng(2), Bootstrap(50, 300, seed=7)
    a, b = rng.normal(size=(2, 50))
    np.testing.assert_allclose(bootstrap.sums(a) - bootstrap.sums(b), bootstrap.sums(a - b), atol=1e-12)
    np.testing.assert_array_equal(bootstrap.sums(a), Bootstrap(50, 300, seed=7).sums(a))
    assert not np.array_equal(bootstrap.sums(a), Bootstrap(50, 300, seed=8).sums(a))
    # a constant lead is known exactly, however much both scores vary
    assert bootstrap.mean((a + 1) - a).low == pytest.approx(1)


def test_counts_drawn_anew_equal_those_kept(monkeypatch):
    values = np.random.default_rng(3).normal(size=(40, 2))
    monkeypatch.setattr(pfm.statistics, "_CHUNK_COUNTS", 1000)
    kept = Bootstrap(40, 130).sums(values)
    monkeypatch.setattr(pfm.statistics, "_CACHED_COUNTS", 0)
    anew = Bootstrap(40, 130)
    np.testing.assert_array_equal(anew.sums(values), kept)
    np.testing.assert_array_equal(anew.sums(values), kept)


def test_ratio_without_denominator_is_undefined():
    bootstrap = Bootstrap(3, 50)
    assert bootstrap.ratio([0, 0, 0], [0, 0, 0]) is None
    one = bootstrap.ratio([0, 2, 0], [0, 4, 0])
    assert one == Estimate(0.5, 0.5, 0.5)


@pytest.mark.parametrize(("n", "resamples"), [(0, 10), (5, 0)])
def test_bootstrap_refuses_nothing_to_resample(n, resamples):
    with pytest.raises(ValueError, match="at least 1"):
        Bootstrap(n, resamples)


# ---- comparisons

SCORES = st.lists(st.integers(-3, 3), min_size=2, max_size=9)


@given(SCORES)
@settings(max_examples=60, deadline=None)
def test_win_share_among_counts_every_other_candidate(scores):
    shares = win_share_among(scores)
    for i, share in enumerate(shares):
        others = [s for j, s in enumerate(scores) if j != i]
        expected = sum(1.0 if scores[i] > s else 0.5 if scores[i] == s else 0.0 for s in others) / len(others)
        assert share == pytest.approx(expected)
    assert shares.mean() == pytest.approx(0.5)


@given(SCORES, st.randoms())
@settings(max_examples=60, deadline=None)
def test_pairwise_agreement_counts_every_pair(scores, random):
    probabilities = [random.choice([0.1, 0.4, 0.4, 0.9]) for _ in scores]
    right, pairs = pairwise_agreement(probabilities, scores)
    expected = 0.0
    different = [(i, j) for i in range(len(scores)) for j in range(i) if scores[i] != scores[j]]
    for i, j in different:
        product = (scores[i] - scores[j]) * (probabilities[i] - probabilities[j])
        expected += 1.0 if product > 0 else 0.5 if product == 0 else 0.0
    assert (right, pairs) == (pytest.approx(expected), len(different))
    assert pairwise_agreement(scores, scores) == (len(different), len(different))
    assert pairwise_agreement([-s for s in scores], scores) == (0, len(different))
    assert pairwise_agreement([0.9, 0.1], [True, False]) == (1, 1)  # a judge may say yes and no


def test_values_in_half_precision_are_added_up_in_double():
    values = np.full(5000, 0.1, np.float16)  # of which half precision itself adds up no more than a few hundred
    found = Bootstrap(5000, 20).ratios(values, np.ones(5000))[0]
    assert found is not None
    assert found.value == pytest.approx(float(values[0]), rel=1e-9)
    assert found.low == pytest.approx(found.high)


def test_intervals_are_rough_below_a_number_of_prompts():
    few = pfm.statistics.FEW_PROMPTS
    assert pfm.statistics.warn_of_few(few) is None
    assert str(pfm.statistics.warn_of_few(few - 1)).startswith(f"Only {few - 1} prompts:")


def test_win_share_mirrors():
    a, b = np.random.default_rng(4).integers(0, 4, size=(2, 200))
    np.testing.assert_array_equal(win_share(a, b) + win_share(b, a), 1)
    assert set(win_share(a, b)) == {0, 0.5, 1}


def test_sign_test_is_exact():
    assert sign_test(5, 0) == pytest.approx(2 / 2**5)
    assert sign_test(0, 6) == pytest.approx(2 / 2**6)
    assert sign_test(7, 3) == pytest.approx(2 * sum(math.comb(10, k) for k in (7, 8, 9, 10)) / 2**10)
    assert sign_test(4, 4) == sign_test(0, 0) == 1
    assert all(0.99999 < sign_test(half + 1, half) <= 1 for half in range(200))  # half of all outcomes, twice
    z = (52_000 - 0.5 - 50_000) / math.sqrt(25_000)
    assert sign_test(52_000, 48_000) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-2)


# ---- length control


def drawn(n, a, b, seed=0):
    """Wins with P = sigmoid(a + b · tanh(gap / std(gap))), and gaps with a mean of their own."""
    rng = np.random.default_rng(seed)
    gap = rng.normal(150, 300, size=n)
    return (rng.random(n) < sigmoid(a + b * np.tanh(gap / gap.std()))).astype(float), gap


@pytest.mark.parametrize("a", [-1.0, 0.0, 0.7])
def test_length_control_recovers_a_known_figure(a):
    win, gap = drawn(4000, a, 2.0)
    estimate = length_controlled(win, gap, Bootstrap(4000, 300))
    assert estimate is not None
    assert estimate.value == pytest.approx(sigmoid(a), abs=0.03)
    assert estimate.low < sigmoid(a) < estimate.high
    assert abs(win.mean() - sigmoid(a)) > 0.05  # the plain figure is off


def test_length_control_takes_away_wins_by_length_alone():
    gap = np.random.default_rng(5).normal(100, 300, size=3000)
    estimate = length_controlled((gap > 0).astype(float), gap, Bootstrap(3000, 200))
    assert estimate is not None
    assert (gap > 0).mean() > 0.6
    assert estimate.value == pytest.approx(0.5, abs=0.05)


def test_length_control_equals_an_exact_fit():
    win, gap = drawn(300, 0.4, -1.0, seed=6)
    win[::7] = 0.5
    x = torch.tensor(np.tanh(gap / gap.std()))
    y = torch.tensor(win)
    theta = torch.zeros(2, dtype=torch.double, requires_grad=True)
    optimiser = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        logit = theta[0] + theta[1] * x
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, y, reduction="sum")
        loss = loss + 0.005 * theta.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    estimate = length_controlled(win, gap, Bootstrap(300, 100))
    assert estimate is not None
    assert estimate.value == pytest.approx(float(theta.detach()[0].sigmoid()), abs=5e-4)


def test_length_control_mirrors():
    win, gap = drawn(200, 0.5, 1.0)
    bootstrap = Bootstrap(200, 100)
    there, back = length_controlled(win, gap, bootstrap), length_controlled(1 - win, -gap, bootstrap)
    assert there is not None
    assert back is not None
    assert back.value == pytest.approx(1 - there.value, abs=1e-6)
    assert back.low == pytest.approx(1 - there.high, abs=1e-5)


def test_length_control_weighs_rows_of_one_prompt():
    win, gap = drawn(100, 0.5, 1.0)
    bootstrap = Bootstrap(100, 100)
    plain = length_controlled(win, gap, bootstrap)
    doubled = length_controlled(
        np.repeat(win, 2), np.repeat(gap, 2), bootstrap, owner=np.repeat(np.arange(100), 2), weight=np.full(200, 0.5)
    )
    assert plain is not None
    assert doubled is not None
    assert doubled.value == pytest.approx(plain.value)
    assert doubled.low == pytest.approx(plain.low)


def test_length_control_counts_a_weight_as_that_many_rows():
    win, gap = drawn(40, 0.5, 1.0, seed=3)
    bootstrap, times = Bootstrap(40, 100), np.where(gap > np.median(gap), 3, 1)
    weighted = length_controlled(win, gap, bootstrap, weight=times)
    repeated = length_controlled(
        np.repeat(win, times), np.repeat(gap, times), bootstrap, owner=np.repeat(np.arange(40), times)
    )
    assert weighted is not None
    assert repeated is not None
    for name in ("value", "low", "high"):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name), abs=1e-9)


def test_length_control_in_degenerate_cases():
    bootstrap = Bootstrap(6, 100)
    win = np.array([1, 1, 0, 1, 0.5, 1])
    assert length_controlled(win, np.zeros(6), bootstrap) == bootstrap.mean(win, (0.0, 1.0))
    assert length_controlled(win, np.full(6, 40.0), bootstrap) is None
    assert length_controlled(np.full(6, 0.5), np.zeros(6), bootstrap) == Estimate(0.5, 0.5, 0.5)
    always = length_controlled(np.ones(6), np.arange(6.0) - 2, bootstrap)
    assert always is not None
    assert 0.95 < always.value <= 1


def test_length_alone_stays_at_one_half_with_unchanged_outputs_or_without():
    rng = np.random.default_rng(1)
    gap = rng.normal(100, 300, size=3000)
    gap[::4] = 0
    win = np.where(gap == 0, 0.5, gap > 0)
    found = length_controlled(win, gap, Bootstrap(3000, 100))
    assert found is not None
    assert win.mean() > 0.58
    assert found.value == pytest.approx(0.5, abs=0.04)


def test_unchanged_rows_count_by_their_weight_whatever_their_recorded_win():
    win, gap = drawn(200, 0.8, 1.0)
    bootstrap = Bootstrap(200, 100)
    alone = length_controlled(win, gap, bootstrap)
    rows = np.r_[win, np.ones(200)], np.r_[gap, np.full(200, 7.0)]
    found = length_controlled(
        *rows, bootstrap, owner=np.tile(np.arange(200), 2), weight=np.repeat([0.25, 0.75], 200),
        changed=np.repeat([True, False], 200),
    )  # fmt: skip
    assert alone is not None
    assert found is not None
    assert found.value == pytest.approx(0.25 * alone.value + 0.375, abs=5e-3)  # the ridge weighs more


def test_ties_of_equal_length_count_as_unchanged_unless_the_caller_knows_better():
    win, gap = drawn(60, 0.8, 1.0)
    win[:20], gap[:20] = 0.5, 0.0
    win[20], gap[21] = 0.5, 0.0  # a tie of another length, and a win at equal length, are changes
    bootstrap = Bootstrap(60, 100)
    by_default = length_controlled(win, gap, bootstrap)
    assert by_default == length_controlled(win, gap, bootstrap, changed=np.arange(60) >= 20)
    assert by_default != length_controlled(win, gap, bootstrap, changed=np.full(60, True))


def test_the_interval_of_length_control_is_stretched_for_few_prompts(monkeypatch):
    win, gap = drawn(12, 0.0, 0.5, seed=4)
    stretched = length_controlled(win, gap, Bootstrap(12, 300))
    monkeypatch.setattr(pfm.statistics, "small_sample_factor", lambda units: 1.0)
    plain = length_controlled(win, gap, Bootstrap(12, 300))
    assert stretched is not None
    assert plain is not None
    factor = small_sample_factor(12)
    assert factor > 1.1
    low, high = (stretched.value + factor * (end - plain.value) for end in (plain.low, plain.high))
    assert (stretched.low, stretched.high) == (pytest.approx(max(low, 0.0)), pytest.approx(min(high, 1.0)))
    assert stretched != plain


# ---- intervals of few


# ---- calibration


def test_perfect_predictions_have_no_calibration_error():
    p = np.random.default_rng(8).random(3000)
    r = reliability(p, p, np.arange(3000) // 5, Bootstrap(600, 100))
    assert r.ece.value == pytest.approx(0, abs=1e-12)
    assert r.slope is not None
    assert r.slope.value == pytest.approx(1)
    assert [b.x for b in r.bins] == pytest.approx([b.outcome.value for b in r.bins])
    assert [b.count for b in r.bins] == [300] * 10


def test_noise_floor_is_the_error_of_a_calibrated_predictor():
    rng = np.random.default_rng(9)
    p = rng.beta(4, 4, size=800)
    owner, bootstrap = np.arange(800) // 4, Bootstrap(200, 400)
    reports = [reliability(p, rng.random(800) < p, owner, bootstrap) for _ in range(40)]
    shown = np.mean([r.measured_ece or math.nan for r in reports])
    assert np.mean([r.noise_floor for r in reports]) == pytest.approx(shown, rel=0.15)
    assert np.mean([r.within_noise for r in reports]) > 0.8
    assert np.mean([r.ece.value for r in reports]) < shown / 2
    assert np.mean([r.ece.low == 0 for r in reports]) > 0.9


def test_noise_floor_and_ceiling_are_those_of_a_normal_error():
    """Of one bin the plain error is |N(0, s)|: its mean is s sqrt(2 / pi), its 95% quantile 1.96 s."""
    y = np.r_[np.ones(200), np.zeros(200)]
    r = reliability(np.full(400, 0.5), y, np.arange(400), Bootstrap(400, 4000))
    s = 0.5 / math.sqrt(400)
    assert r.measured_ece == 0
    assert r.noise_floor == pytest.approx(s * math.sqrt(2 / math.pi), rel=0.05)
    assert r.noise_ceiling == pytest.approx(1.96 * s, rel=0.05)


def test_the_noise_of_a_bin_goes_by_the_prompts_that_are_in_it():
    """One bin of two prompts, one of ten: a bin of m prompts has taken 1 / m of its noise into its own gap."""
    owner = np.r_[0, 1, np.arange(10)]
    p = np.r_[0.1, 0.1, np.full(10, 0.9)]
    y = np.r_[0.0, 1.0, np.tile([0.0, 1.0], 5)]
    bootstrap = Bootstrap(10, 300)
    found = reliability(p, y, owner, bootstrap, bins=2)
    gaps, rows = np.zeros((2, 10, 2))
    for place, prompt in enumerate(owner):
        gaps[prompt, int(p[place] > 0.5)] += y[place] - p[place]
        rows[prompt, int(p[place] > 0.5)] += 1
    noise = bootstrap.sums(gaps) - bootstrap.sums(rows) * gaps.sum(0) / rows.sum(0)
    noise /= bootstrap.sums(rows).sum(1, keepdims=True)
    noise *= np.sqrt([2 / 1, 10 / 9])
    noise *= small_sample_factor(10) * math.sqrt(9 / 10)
    assert found.noise_floor == pytest.approx(np.abs(noise).sum(1).mean())
    assert found.noise_ceiling == pytest.approx(np.quantile(np.abs(noise).sum(1), 0.95))


def test_the_slope_is_that_of_least_squares_with_an_interval_of_few_prompts():
    p = np.array([0.1, 0.3, 0.4, 0.6, 0.8, 0.9])
    y = np.array([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    bootstrap = Bootstrap(6, 200)
    found = reliability(p, y, np.arange(6), bootstrap).slope
    slopes = [
        np.polyfit(p, y, 1, w=np.sqrt(count))[0]
        for count in np.concatenate(list(bootstrap._draw()))
        if (count > 0).sum() > 1
    ]
    expected = interval(float(np.polyfit(p, y, 1)[0]), np.array(slopes), 6)
    assert found is not None
    assert expected is not None
    for name in ("value", "low", "high"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-6)
    few = reliability(p, y, np.zeros(6, dtype=int), Bootstrap(1, 20)).slope  # one prompt: no spread is known
    assert few is not None
    assert (few.low, few.high) == pytest.approx((few.value, few.value))


def test_multiples_of_the_calibration_gaps_have_closed_forms():
    gap = np.array([0.1, -0.3])
    assert _multiples(gap, np.zeros((50, 2)), 0.4) == pytest.approx((1.0, 1.0, 1.0), abs=1e-3)
    assert _multiples(gap, np.zeros((50, 2)), 1.2) == pytest.approx((3.0, 3.0, 3.0), abs=2e-3)
    assert _multiples(gap, np.zeros((50, 2)), 0.0) == (0.0, 0.0, 0.0)
    noise = np.linspace(-0.1, 0.1, 4001)[:, None]  # s |gap| + noise: its quantiles are s |gap| + 0.095, 0 and -0.095
    low, middle, high = _multiples(np.array([0.5]), noise, 0.5)
    assert (low, middle, high) == pytest.approx((0.81, 1.0, 1.19), abs=2e-3)
    assert _multiples(np.array([0.5]), noise, 0.02)[:2] == (0.0, 0.0)


def test_overconfidence_is_measured_and_above_the_noise():
    rng = np.random.default_rng(10)
    sure = rng.choice([-1, 1], size=4000)
    p, truth = 0.5 + 0.4 * sure, 0.5 + 0.2 * sure
    r = reliability(p, rng.random(4000) < truth, np.arange(4000), Bootstrap(4000, 200))
    assert r.ece.value == pytest.approx(0.2, abs=0.03)
    assert r.ece.low <= r.ece.value <= r.ece.high
    assert not r.within_noise
    assert r.slope is not None
    assert r.slope.value == pytest.approx(0.5, abs=0.05)
    assert r.slope.high < 1


def test_equal_probabilities_share_one_bin():
    r = reliability([0.5] * 40, [0, 1] * 20, np.arange(40) // 2, Bootstrap(20, 50))
    assert len(r.bins) == 1
    assert r.ece.value == 0
    assert r.slope is None
    bins = binned([0.2] * 35 + [0.8] * 5, [0] * 35 + [1] * 5, np.arange(40), Bootstrap(40, 50))
    assert [(b.x, b.count) for b in bins] == [(pytest.approx(0.2), 35), (pytest.approx(0.8), 5)]


# ---- writing


@pytest.mark.parametrize(
    ("estimate", "options", "written"),
    [
        (Estimate(0.4123, 0.3891, 0.4371), {}, "0.412 [0.389, 0.437]"),
        (Estimate(0.612, 0.57, 0.654), {"percent": True}, "61.2% [57.0, 65.4]"),
        (Estimate(0.2, -0.5, 0.9), {"signed": True}, "+0.2 [−0.5, +0.9]"),
        (Estimate(1532.4, 1480.2, 1590.9), {}, "1532 [1480, 1591]"),
        (Estimate(0.0, 0.0, 0.0), {}, "0.0 [0.0, 0.0]"),
        (Estimate(-0.00004, -0.2, 0.2), {}, "0.00 [−0.20, 0.20]"),
    ],
)
def test_estimates_are_written_to_their_certainty(estimate, options, written):
    assert estimate.text(**options) == written
