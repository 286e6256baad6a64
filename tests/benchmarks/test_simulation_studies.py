"""Intervals, tests and levels of b, simulated against known truth: small versions of the studies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.studies.confirmation import LAWS, SIZES, mean_rate, pairs_of_prompts
from benchmarks.studies.context_level import KINDS, mean_of_b
from benchmarks.studies.coverage import calibration, covered, length_control, over_prompts, over_seeds
from benchmarks.studies.few_votes import Votes, drawn, losses
from benchmarks.studies.tuning import confirmed_gains, shift_of
from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm._internal.significance import CONFIRMED
from pfm.flow.win import WinHead
from pfm.preferences import BradleyTerry
from pfm.preferences.correction import fit_correction
from pfm.statistics import (
    Bootstrap,
    interval,
)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("groups", [2, 3, 5, 10, 50])
def test_symmetric_values_of_mean_zero_are_confirmed_in_one_of_twenty(groups, sizes):
    assert max(mean_rate(groups, sizes, law, repeats=250) for law in ("normal", "signs")) <= 0.08


def test_a_real_gain_is_confirmed():
    assert mean_rate(10, "equal", "normal", mean=1.0, repeats=100) > 0.8
    assert mean_rate(50, "1 to G", "normal", mean=0.5, repeats=100) > 0.8
    assert set(LAWS) == {"normal", "signs", "right-skewed", "left-skewed"}


@pytest.mark.parametrize("count", [3, 12])
def test_few_held_out_pairs_confirm_no_residual(count):
    pairs = pairs_of_prompts(count, count, 2, seed=1)
    flow = PreferenceFlow.fit(pairs, FlowConfig(epochs=20), progress=False)
    assert not flow.metadata["residual_kept"]
    assert flow.metadata["training"]["z"] < CONFIRMED


def test_coin_labels_keep_no_network_of_few_prompts_and_little_of_many():
    kept = 0
    for seed in range(6):
        pairs = pairs_of_prompts(200, 40, 4, seed)
        batch, generator = pairs.gather(torch.arange(200)), torch.Generator().manual_seed(seed)
        for group in (pairs.group, pairs.group % 4):
            fitted = fit_correction(
                batch.chosen, batch.rejected, [(torch.eye(4), batch, {"updates": 150})], torch.zeros(200),
                pairs.group % 5 == 0, group, generator, hidden=16, blocks=2, reward=True,
            )  # fmt: skip
            assert group is pairs.group or fitted.network is None
            kept += fitted.network is not None
    assert kept <= 1


def test_the_guard_opens_on_an_order_and_not_on_few_prompts():
    told = pairs_of_prompts(120, 40, 3, seed=0, signal=4.0)
    few = EncodedPairs(told.chosen, told.rejected, group=told.group % 4)
    heads = [WinHead(3, 0), WinHead(3, 0)]
    fits = [head.fit(pairs, network=False) for head, pairs in zip(heads, (told, few), strict=True)]
    assert fits[0].z > CONFIRMED
    assert [bool(torch.isfinite(head.margin)) for head in heads] == [True, False]


@pytest.mark.parametrize(("kept", "truth"), [(0.1, 0.77), (0.3, 0.71), (0.5, 0.65)])
def test_unchanged_outputs_are_ties_and_do_not_pull_the_others_to_a_half(kept, truth):
    rng = np.random.default_rng(0)
    found = [length_control(300, kept, 0.8, rng)[0] for _ in range(30)]
    assert np.mean([each.value for each in found]) == pytest.approx(truth, abs=0.015)
    assert sum(each.low <= truth <= each.high for each in found) >= 25


@pytest.mark.parametrize("between", [0.0, 1.0])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_over_few_seeds_hold_the_truth(seeds, between):
    assert 0.90 <= covered(lambda rng: over_seeds(seeds, between, rng, prompts=8), 250)[0] <= 0.99


def test_intervals_over_few_prompts_hold_the_truth_and_stay_in_bounds():
    assert covered(lambda rng: over_prompts(10, "wins", rng), 250)[0] >= 0.9
    found = Bootstrap(10, 500).mean([1.0] * 9 + [0.0], (0.0, 1.0))
    assert found.low < 0.7
    assert found.high == 1
    stretched, plain = (interval(0.5, np.linspace(0, 1, 1001), units) for units in (3, None))
    assert stretched is not None
    assert plain is not None
    assert (stretched.high - 0.5) / (plain.high - 0.5) == pytest.approx(4.3027 / 1.96 * math.sqrt(1.5), rel=1e-3)


@pytest.mark.parametrize("slope", [1.0, 0.5])
def test_the_calibration_error_is_free_of_noise_and_its_interval_holds_the_truth(slope):
    share, estimate, truth = covered(lambda rng: calibration(60, slope, rng), 60)
    assert share >= 0.85
    assert estimate == pytest.approx(truth, abs=0.035)


@pytest.mark.parametrize("kind", KINDS)
def test_b_is_one_half_on_the_mean_of_every_context(kind):
    means = mean_of_b(kind, BradleyTerry(1e-3), pairs=1500)
    assert float((means - 0.5).square().mean().sqrt()) < 0.06
    assert float((means - 0.5).abs().max()) < 0.2


def test_a_true_gain_is_confirmed_and_a_move_that_no_label_is_about_is_not():
    y, other = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    for gain in (0.05, 0.2):
        b = torch.sigmoid(2 * (y + shift_of(gain) - other))
        assert float(b.mean()) - 0.5 == pytest.approx(gain, abs=0.005)
    found = [confirmed_gains(120, seed, dimension=2, gains=(0.0, 0.2)) for seed in range(3)]
    assert sum(each["0.0"] for each in found) <= 1  # one in twenty may be
    assert all(each["0.2"] for each in found)


def test_few_votes_are_drawn_of_those_there_are_and_shrunk_labels_predict_a_coin():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 90, 2, generator=generator)
    won = torch.binomial(torch.full((90,), 5.0), torch.sigmoid(3 * (first - second)[:, 0]), generator=generator).long()
    counts = torch.stack([won, 5 - won, torch.zeros_like(won)], 1).numpy()
    few = drawn(counts, 3, seed=1)
    assert (few.sum(1) == 3).all()
    assert ((few >= 0) & (few <= counts)).all()
    assert (drawn(counts, 9, seed=1) == counts).all()
    votes = Votes(first, second, counts, np.arange(90) % 9)
    learned, coin = losses(votes, few, 0.0, seed=0), losses(votes, few, 1e5, seed=0)
    torch.testing.assert_close(coin, torch.full((90,), math.log(2), dtype=torch.float64), atol=1e-3, rtol=0)
    assert float(learned.mean()) < 0.55
    assert float(losses(votes, few[:, [1, 0, 2]], 0.0, seed=0).mean()) > 1
