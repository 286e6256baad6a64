"""Details of the preference models' fits: what decides nothing, what counts alike, what mirrors."""

import pytest
import torch

from pfm import EncodedPairs
from pfm.data import PreferencePairs
from pfm.preferences import BradleyTerry, GeneralPreference, TieModel, ViewPreference, fit_raters, reconcile
from pfm.preferences.correction import Correction
from pfm.preferences.ensemble import _parts
from pfm.preferences.noise import _from_other_prompts, _Labels, _with_outputs, corrected
from pfm.preferences.planes import to_planes
from pfm.preferences.view import FAR


def test_a_view_is_cut_on_both_sides():
    view = ViewPreference(BradleyTerry(), 0, 2, standardise=True)
    y = torch.tensor([[1e6, -1e6], [-1e6, 1e6], [1.0, -1.0], [-1.0, 1.0]])
    pairs = EncodedPairs(y[2:], y[2:].flip(0))
    view.fit(pairs)
    seen = view._see(y, None) * 2**0.5
    torch.testing.assert_close(seen, torch.tensor([[FAR, -FAR], [-FAR, FAR], [1.0, -1.0], [-1.0, 1.0]]))


def test_without_a_reward_every_output_has_the_reward_zero():
    planes = Correction(3, 0, 3, 0, hidden=8, blocks=2, reward=False)
    found = planes.of_axes(torch.randn(5, 3), None)
    assert found.reward.tolist() == [0.0] * 5
    assert found[:2].reward.shape == (2,)


def test_a_network_is_built_in_the_sizes_that_were_saved():
    model = GeneralPreference(blocks=1, hidden=4)
    model._build(dimension=3, contexts=2, planes=0, network={"inputs": 2, "context_inputs": 1})
    assert model.network is not None
    assert model.network.sizes == {"inputs": 2, "context_inputs": 1}


def test_a_direction_that_no_output_reaches_carries_no_plane():
    """Outputs on one line: a skew form has no plane there, and rounding in the other directions makes none."""
    along = torch.tensor([1.0, 2.0, -1.0]) / 6**0.5
    second = 4e10 * torch.outer(along, along)
    skew = torch.tensor([[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, -3.0, 0.0]])
    assert to_planes(skew, second, 2).shape == (3, 0)


def test_fewer_prompts_than_parts_are_dealt_by_pairs():
    part = _parts(torch.tensor([7, 7, 7, 7, 9, 9]), 3, 0)
    assert sorted(part.bincount().tolist()) == [2, 2, 2]
    prompts = _parts(torch.arange(6) // 2, 3, 0)
    assert prompts.view(3, 2).diff(dim=1).abs().sum() == 0


@pytest.mark.parametrize("kind", ["davidson", "rao-kupper"])
def test_ties_are_fitted_alike_from_either_side(kind):
    score, one, two, tie = [1.0, -2.0, 0.5], [1, 0, 1], [5, 9, 3], [2, 1, 3]  # the second output wins nearly always
    ours = TieModel(kind).fit(score, one, two, tie)
    theirs = TieModel(kind).fit([-s for s in score], two, one, tie)
    assert (ours.slope, ours.width) == pytest.approx((theirs.slope, theirs.width), rel=1e-4)
    assert ours.width > 0


# -- raters -------------------------------------------------------------------------------------------------------


def test_raters_without_a_side_have_no_bias_and_a_tied_pair_is_a_half():
    pair = torch.arange(12).repeat_interleave(3)
    rater = ["a", "b", "c"] * 12
    vote = torch.tensor([1.0, 0.0, 0.5]).repeat(4)[pair]  # all three agree on every pair
    found = fit_raters(pair, rater, vote, model="two-coin")
    assert found.first_bias.abs().max() < 0.05
    assert found.probability[2::3].tolist() == pytest.approx([0.5] * 4, abs=0.02)
    assert found.tied[2::3].min() > 0.9


def test_votes_are_reconciled_by_the_column_that_is_named():
    rows = [{"prompt": "p", "chosen": "yes", "rejected": "no", "who": name} for name in ("a", "b")]
    assert reconcile(PreferencePairs.from_rows(rows), column="who").raters.raters == ["a", "b"]


# -- wrong labels -------------------------------------------------------------------------------------------------


def noisy_pairs() -> EncodedPairs:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(20, 3, generator=generator)
    one, other = (torch.randint(20, (60,), generator=generator) for _ in range(2))
    other = torch.where(one == other, (other + 1) % 20, other)
    first = y[one, 0] > y[other, 0]
    group = torch.arange(60) // 6
    return EncodedPairs.from_table(y, one.where(first, other), other.where(first, one), group=group).flip_labels(0.2)


def test_folds_of_outputs_depend_on_the_seed_alone():
    """Outputs whose worth nothing but other labels tells, so that the log-odds depend on the folds of those."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.combinations(torch.arange(12)).T
    worth, y = torch.randn(12, generator=generator), torch.randn(12, 2, generator=generator)
    first = worth[one] > worth[other]
    pairs = EncodedPairs.from_table(y, one.where(first, other), other.where(first, one), group=torch.zeros(66))
    labels, none = _Labels.of(pairs), torch.zeros(66)
    found = [_with_outputs(pairs, labels, none, 0.1, torch.Generator().manual_seed(seed), [1.0]) for seed in (1, 1, 2)]
    assert found[0][1] == 1.0
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], found[2][0])
    reports = [corrected(pairs, flip_rate=0.1, seed=1).report for _ in range(2)]
    assert reports[0].spread > 0
    assert torch.equal(reports[0].correct, reports[1].correct)


def test_rows_of_weight_zero_set_no_unit():
    pairs = noisy_pairs()
    weight = torch.ones(60)
    weight[::6] = 0
    plain = EncodedPairs(pairs.chosen, pairs.rejected, weight=weight, group=pairs.group)
    far = torch.where(weight[:, None] == 0, 1e4 * torch.tensor([1.0, -2.0, 0.5]), 0.0)
    spoilt = EncodedPairs(pairs.chosen + far, pairs.rejected - far, weight=weight, group=pairs.group)
    ours, theirs = (
        _from_other_prompts(each, _Labels.of(each), torch.Generator().manual_seed(0)) for each in (plain, spoilt)
    )
    assert float(ours.abs().mean()) > 0.1
    torch.testing.assert_close(theirs[weight > 0], ours[weight > 0], rtol=1e-3, atol=1e-3)
