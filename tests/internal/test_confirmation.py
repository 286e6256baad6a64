"""The one test by which parts are kept or dropped: closed forms, and how often nothing is confirmed as something."""

import math
from itertools import product

import pytest
import torch
from scipy import stats

from pfm._internal.significance import CONFIRMED, choose_crosswise, confirmable, confirmed, halves, standard_errors
from pfm.flow.rounds import _beyond


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_groups_are_tested_by_students_t():
    means = normal(30) + 0.4
    found = confirmed(means.repeat_interleave(3), torch.arange(30).repeat_interleave(3))
    statistic = means.mean() / (means.std() / math.sqrt(30))
    assert found.p_value == pytest.approx(float(stats.t.sf(statistic, 29)))
    assert found.z == pytest.approx(-stats.norm.ppf(found.p_value))
    assert (found.groups, found.degrees) == (30, pytest.approx(29))
    for scale, weight in ((1e-15, 1.0), (1.0, 1e8)):
        assert confirmed(scale * means, torch.arange(30), weight * torch.ones(30)).z == pytest.approx(found.z)
    groups = torch.arange(20).repeat_interleave(torch.arange(1, 21))
    equal = torch.full((210,), 0.7, dtype=torch.float64)  # groups' means differ by rounding alone
    assert confirmed(equal, groups).p_value == 2.0**-20
    assert confirmed(1 + torch.arange(12) / 100, torch.arange(12)).p_value == 2.0**-12  # all sign flips are listed


@pytest.mark.parametrize("largest", [15.0, 200.0])
def test_unequal_groups_are_tested_by_the_cluster_robust_t_in_matrices(largest):
    """CR2 of a weighted mean of G group means of one variance, and Satterthwaite's degrees of freedom of it."""
    size = torch.tensor([*range(1, 15), largest], dtype=torch.float64)
    means, share = normal(15) + 0.4, size / size.sum()
    found = confirmed(means, torch.arange(15), size)
    residual = torch.eye(15, dtype=torch.float64) - share
    form = residual.T @ (share.square() / (1 - share)).diag() @ residual  # of the estimated variance, up to a factor
    variance = means @ form @ means * share.square().sum() / form.trace()
    degrees = form.trace() ** 2 / (form @ form).trace()
    assert found.degrees == pytest.approx(float(degrees))
    assert (found.degrees < 2) == (largest == 200)  # one group weighs most
    assert found.p_value == pytest.approx(float(stats.t.sf(share @ means / variance.sqrt(), degrees)))


@pytest.mark.parametrize("gain", [0.0, 0.5, 1.0, 1.5, 2.5])
def test_few_groups_are_tested_by_all_sign_flips_of_their_totals(gain):
    total = torch.tensor([3.0, -2.0, 1.0, 0.5, -0.25, 2.0], dtype=torch.float64) + gain
    flipped = torch.tensor(list(product((1.0, -1.0), repeat=6)), dtype=torch.float64) @ total
    exact = float((flipped >= total.sum() - 1e-9).double().mean())
    t = float(stats.t.sf(total.mean() / (total.std() / math.sqrt(6)), 5))
    assert confirmed(total, torch.arange(6)).p_value == pytest.approx(max(exact, t))


@pytest.mark.parametrize("groups", range(1, 8))
def test_equal_gains_are_worth_the_sign_flip_test(groups):
    found = confirmed(torch.ones(groups), torch.arange(groups))
    assert found.p_value == pytest.approx(1.0 if groups == 1 else 2.0**-groups)
    assert bool(found) == confirmable(torch.arange(groups)) == (groups >= 5)


def test_scale_row_order_and_rows_of_weight_zero_do_not_matter():
    value, group, weight = normal(60) + 0.3, torch.arange(60) % 9, torch.rand(60)
    found = confirmed(value, group, weight)
    order = torch.randperm(60)
    for other in (
        confirmed(1e-9 * value, group, weight),
        confirmed(value, group, 1e6 * weight),
        confirmed(value[order], group[order], weight[order]),
        confirmed(torch.cat([value, -value]), torch.cat([group, group + 9]), torch.cat([weight, 0 * weight])),
    ):
        assert (other.z, other.groups) == (pytest.approx(found.z), 9)


def test_rows_of_one_prompt_count_by_their_units():
    pairs = normal(7) + 1
    rows = pairs.repeat(500) + 0.01 * normal(3500, seed=1)
    unit = torch.arange(7).repeat(500)
    found = confirmed(rows, torch.zeros(3500, dtype=torch.long), unit=unit)
    assert found.groups == 7
    assert found.z == pytest.approx(confirmed(pairs, torch.arange(7)).z, abs=0.05)
    assert not bool((halves(torch.zeros(3500), unit).view(500, 7) != halves(torch.zeros(7))).any())


def test_units_count_where_there_is_one_prompt_and_prompts_where_there_are_several():
    one, two = torch.zeros(10), torch.arange(10) // 5
    for units in (4, 5):
        unit = torch.arange(10) % units
        assert confirmable(one, unit) == (units == 5)
        assert not confirmable(two, unit)
        assert halves(one, unit).tolist() == (unit % 2 == 0).tolist()
    assert not confirmable(one[:0])
    assert halves(torch.tensor([3, 3, 5, 7])).tolist() == [True, True, False, True]


def test_z_is_finite_and_signed_and_the_best_of_many_tests_needs_more():
    ones, groups = torch.ones(3000), torch.arange(3000)
    assert 30 < standard_errors(ones, groups) < 40
    assert -9 < confirmed(-ones, groups).z < -5
    assert confirmed(0 * ones, groups).z == pytest.approx(0, abs=1e-9)
    value = normal(40)
    value = (value - value.mean()) / value.std() + 0.32
    found = confirmed(value, torch.arange(40))
    assert found
    assert found.z > CONFIRMED
    assert not confirmed(value, torch.arange(40), tests=20)
    assert confirmed(value, torch.arange(40), cross_fitted=True).z == pytest.approx(found.z / math.sqrt(2), rel=0.05)
    far = confirmed(value + 0.4, torch.arange(40), cross_fitted=True)
    assert far.p_value == pytest.approx(float(stats.t.sf(0.72 * math.sqrt(40 / 2), 39)))
    nothing = confirmed(torch.zeros(0), torch.zeros(0))
    assert (nothing.z, nothing.p_value, nothing.groups, nothing.degrees) == (0.0, 1.0, 0, 0.0)


def test_each_half_chooses_for_the_other_by_its_weighted_losses():
    loss = torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0], [1.0, 0.2, 1.0, 1.0, 0.0], [1.5, 0.0, 1.0, 1.0, 1.0]])
    half, weight = torch.arange(5) < 2, torch.tensor([1.0, 3.0, 1.0, 1.0, 4.0])
    assert choose_crosswise(loss, weight, half).tolist() == [1, 1, 2, 2, 2]
    assert choose_crosswise(loss, torch.ones(5), half).tolist() == [0] * 5


def test_the_best_of_many_candidates_is_judged_on_other_rows():
    generator = torch.Generator().manual_seed(0)
    half, groups, weight = halves(torch.arange(40)), torch.arange(40), torch.ones(40)
    crosswise = naive = 0
    for _ in range(200):
        loss = torch.randn(30, 40, generator=generator)
        chosen = choose_crosswise(loss, weight, half)
        assert int(chosen[half].unique()) == int(loss[:, ~half].sum(1).argmin())
        crosswise += bool(confirmed(-loss[chosen, groups], groups))
        naive += bool(confirmed(-loss[loss.sum(1).argmin()], groups))
    assert naive > 150
    assert crosswise <= 18


def test_rounds_are_compared_as_the_best_of_many_tests():
    values = normal(40)
    values = (values - values.mean()) / values.std() + 0.32
    assert _beyond(values, 1)
    assert not _beyond(values, 20)
    assert not _beyond(torch.ones(2), 1)


def test_nothing_to_tell_is_a_z_score_of_zero():
    group = torch.arange(2)
    assert confirmed(torch.tensor([1.0, -1.0]), group).z == 0.0
    assert confirmed(torch.tensor([1.0, -0.9]), group).z == 0.0  # half of the sign flips reach it
    assert confirmed(torch.zeros(8), torch.arange(8)).z == 0.0
    assert confirmed(torch.zeros(8), torch.arange(8)).p_value == 1.0
    assert confirmed(torch.ones(1), torch.zeros(1)).z == 0.0
    assert -4 < confirmed(torch.tensor([-1.0, -0.5, -0.8, -1.2, -0.9, -1.1]), torch.arange(6)).z < -2
