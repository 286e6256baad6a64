"""Preference models and their solver against known answers."""

import math

import pytest
import torch

from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm.flow.win import WinHead
from pfm.preferences import (
    BradleyTerry,
    Embedded,
    GeneralPreference,
    MeanShift,
    PreferenceEnsemble,
    PreferenceModel,
    load,
)
from pfm.preferences.base import restored, unfitted
from pfm.preferences.crossvalidation import Search
from pfm.preferences.ensemble import _stacked
from pfm.preferences.logistic import PairwiseLogistic, fit_platt, fit_temperature, pairwise_log_loss, smooth_labels
from pfm.preferences.newton import newton_logistic
from pfm.preferences.planes import SkewMoments
from pfm.preferences.ridge import Ridge


def bradley_terry_pairs(count: int, weights: torch.Tensor, seed: int = 0) -> EncodedPairs:
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, count, len(weights), generator=generator)
    first = (torch.rand(count, generator=generator) < torch.sigmoid((one - other) @ weights))[:, None]
    return EncodedPairs(torch.where(first, one, other), torch.where(first, other, one))


WEIGHTS = torch.tensor([1.0, -0.5, 0.0, 0.25])


def test_bradley_terry_recovers_the_weights_that_made_the_labels():
    model = BradleyTerry(1e-6).fit(bradley_terry_pairs(60_000, WEIGHTS))
    recovered = torch.tensor([float(model.score(row[None], torch.zeros(1, 4))) for row in torch.eye(4)])
    torch.testing.assert_close(recovered, WEIGHTS, atol=0.03, rtol=0)


def test_scores_are_skew_and_probabilities_sum_to_one():
    model = BradleyTerry().fit(bradley_terry_pairs(500, WEIGHTS))
    y, other = torch.randn(2, 7, 4)
    torch.testing.assert_close(model.score(y, other), -model.score(other, y))
    forth, back = model.win_probability(y, other[:1]), model.win_probability(other[:1], y)
    assert float(forth.mean() + back) == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(model.win_probability(y, other.expand(7, 7, 4)), model.win_probability(y, other))


def test_swapped_labels_mirror_and_shuffled_labels_tell_nothing():
    pairs = bradley_terry_pairs(20_000, WEIGHTS)
    y = torch.randn(50, 4)
    torch.testing.assert_close(
        BradleyTerry().fit(pairs.swap()).score(y, -y), -BradleyTerry().fit(pairs).score(y, -y), atol=1e-2, rtol=0
    )
    assert float(BradleyTerry().fit(pairs.shuffle_labels()).score(y, -y).abs().max()) < 0.3


def test_mean_shift_weighs_pairs_and_turns_round_with_soft_labels_below_one_half():
    chosen, rejected = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2, 2)
    shift = MeanShift().fit(EncodedPairs(chosen, rejected, probability=[1.0, 0.0]))
    assert shift.direction.tolist() == [0.5, -1.5]
    assert shift.reward(torch.tensor([[2.0, 1.0]])).tolist() == [-0.5]
    weighted = MeanShift().fit(EncodedPairs(chosen, rejected, weight=[3.0, 1.0], probability=[1.0, 0.5]))
    assert weighted.direction.tolist() == [0.75, 0.0]


def test_mean_shift_mirrors_swapped_labels_and_is_the_first_step_of_bradley_terry():
    pairs = bradley_terry_pairs(20_000, WEIGHTS)
    shift = MeanShift().fit(pairs)
    torch.testing.assert_close(MeanShift().fit(pairs.swap()).direction, -shift.direction)
    assert float(MeanShift().fit(pairs.shuffle_labels()).direction.norm()) < 0.1 * float(shift.direction.norm())
    heavy = BradleyTerry(1e4).fit(pairs)  # so strong a penalty leaves the gradient's direction only
    weights = torch.stack([heavy.score(row[None], torch.zeros(1, 4))[0] for row in torch.eye(4)])
    assert float(torch.cosine_similarity(weights, shift.direction.cpu(), dim=0)) > 0.9999


def test_the_solver_is_at_the_penalised_optimum_along_its_path():
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(800, 6, generator=generator)
    weight, probability = torch.rand(2, 800, generator=generator)
    weight = weight + 0.1
    solver = PairwiseLogistic(difference, weight, probability)
    share = weight / weight.sum()
    for l2 in (1.0, 1e-2, 1e-4):
        at = solver.fit(l2, iterations=100)
        gradient = -(share * (probability - torch.sigmoid(difference @ at))) @ difference + 2 * l2 * at
        assert float(gradient.abs().max()) < 1e-4


def test_fits_of_several_weightings_are_those_of_each_alone():
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(60, 5, generator=generator) * torch.logspace(0, -2, 5)
    label = torch.rand(60, generator=generator)
    weight = torch.rand(4, 60, generator=generator)
    weight[1, :40] = 0
    weight[2] = 0
    together = PairwiseLogistic(difference, weight, label)
    alone = [PairwiseLogistic(difference, row, label) for row in weight]
    for l2 in (1e-1, 1e-4):
        found = together.fit(l2)
        assert found.shape == (4, 5)
        torch.testing.assert_close(found, torch.stack([each.fit(l2) for each in alone]), rtol=1e-3, atol=1e-4)
        assert found[2].tolist() == [0.0] * 5
        share = weight / weight.sum(1, keepdim=True).clamp_min(1e-30)
        gradient = (share * (torch.sigmoid(found @ difference.T) - label)) @ difference + 2 * l2 * found
        assert float(gradient.abs().max()) < 1e-6


def test_the_solver_arrives_from_any_start():
    """Where the curvature is almost gone, Newton's whole step goes astray: it is halved."""
    label = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    difference = torch.tensor([[1.0], [1.0], [1.0], [1e-3], [1e-3], [1e-3]]).double()
    exact = PairwiseLogistic(difference, None, label.double()).fit(1e-6, 200)
    for start in (-30.0, 6.0, 30.0):
        solver = PairwiseLogistic(difference, None, label.double())
        solver._at.fill_(start)
        torch.testing.assert_close(solver.fit(1e-6, 200), exact, rtol=1e-3, atol=1e-3)


def test_labels_without_a_fault_are_followed_as_far_as_the_penalty_allows():
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(40, 3, generator=generator).double()
    difference = difference * torch.sign(difference[:, :1]) * torch.logspace(-3, 2, 40).double()[:, None]
    for l2 in (1e-2, 1e-5):
        at = PairwiseLogistic(difference).fit(l2, 200)
        share = torch.full((40,), 1 / 40).double()
        exact, _ = newton_logistic(difference, torch.ones(40), share, 2 * l2, iterations=500)
        torch.testing.assert_close(at, exact, rtol=1e-3, atol=1e-3)


def test_rows_of_weight_zero_do_not_decide_which_directions_count():
    """A huge difference that weighs nothing must not make the one that counts look like rounding."""
    difference = torch.tensor([[1.0, 0.0], [0.0, 1e6]])
    at = PairwiseLogistic(difference, torch.tensor([1.0, 0.0])).fit(0.1, iterations=100)
    alone = PairwiseLogistic(difference[:1]).fit(0.1, iterations=100)
    assert float(at[0]) == pytest.approx(float(alone[0]))
    assert float(torch.sigmoid(-at[0]) - 2 * 0.1 * at[0]) == pytest.approx(0, abs=1e-5)
    assert float(at[1]) == 0


def test_the_temperature_is_the_likeliest_for_smoothed_labels():
    score = torch.tensor([2.0, -1.0, 0.5, 3.0, -0.5, 1.5, -2.0, 1.0, 0.2, -0.3])
    probability = torch.tensor([1.0, 0.0, 0.7, 1.0, 0.5, 0.9, 0.3, 0.0, 1.0, 0.5])
    weight = torch.tensor([1.0, 2.0, 1.0, 0.5, 3.0, 1.0, 0.1, 1.0, 1.0, 2.0])
    found = fit_temperature(score, probability, weight)
    label = (probability * 5 + 1) / 7  # Platt's smoothing of ten labels: one of each kind more
    gradient = float((weight * (torch.sigmoid(found * score) - label) * score).sum())
    assert found > 0
    assert gradient == pytest.approx(0, abs=1e-3)
    assert fit_temperature(-score, probability, weight) == 0.0
    assert fit_temperature(score, probability, torch.ones(10)) != pytest.approx(found, rel=1e-2)


def test_platt_recovers_slope_and_offset_and_takes_a_wrong_order_for_no_evidence():
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(50_000, generator=generator) * 3
    label = (torch.rand(50_000, generator=generator) < torch.sigmoid(0.7 * score - 0.4)).float()
    slope, offset = fit_platt(score, label)
    assert slope == pytest.approx(0.7, abs=0.03)
    assert offset == pytest.approx(-0.4, abs=0.03)
    assert fit_platt(-score, label) == (0.0, 0.0)
    assert fit_platt(torch.ones(5), torch.ones(5)) == (0.0, 0.0)


def test_platt_is_not_certain_of_a_few_perfectly_ordered_labels():
    score = torch.cat([torch.arange(1.0, 11.0), -torch.arange(1.0, 11.0)])
    slope, offset = fit_platt(score, smooth_labels((score > 0).float()))
    assert 0.9 < float(torch.sigmoid(slope * score + offset).max()) < 0.999
    assert smooth_labels(torch.tensor([1.0, 0.0])).tolist() == pytest.approx([2 / 3, 1 / 3])


def test_b_is_not_certain_after_a_few_pairs_that_are_easy_to_order():
    generator = torch.Generator().manual_seed(0)
    pairs = EncodedPairs(torch.randn(50, 6, generator=generator) + 2, torch.randn(50, 6, generator=generator) - 2)
    flow = PreferenceFlow.fit(pairs, FlowConfig(residual=False), progress=False)
    b = flow.win_probability(pairs.chosen)
    assert float(b.mean()) > 0.9
    assert float(b.max()) < 0.9999


def test_log_loss_of_a_coin_is_log_two():
    assert pairwise_log_loss(torch.zeros(4), torch.ones(4), torch.tensor([0.0, 0.3, 0.5, 1.0])) == pytest.approx(
        0.693147
    )


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: BradleyTerry(0.0), "l2 must be a positive number: got 0.0"),
        (
            lambda: BradleyTerry().fit(bradley_terry_pairs(50, WEIGHTS)).reward(torch.zeros(2, 3)),
            "4 values a row: got 3",
        ),
        (
            lambda: MeanShift().fit(bradley_terry_pairs(50, WEIGHTS)).reward(torch.zeros(2, 3)),
            "4 values a row: got 3",
        ),
    ],
)
def test_bad_arguments_are_named(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_an_unfitted_model_says_so():
    with pytest.raises(RuntimeError, match="not fitted"):
        BradleyTerry().reward(torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="not fitted"):
        MeanShift().reward(torch.zeros(1, 2))


def with_outliers(pairs: EncodedPairs) -> EncodedPairs:
    """Mix in pairs of weight 0 with outlying outputs and the labels turned round."""
    count = len(pairs)
    far = 1e4 * torch.randn(2, count, pairs.dimension)
    order = torch.arange(2 * count).view(2, count).T.flatten()
    chosen, rejected = torch.cat([pairs.chosen, far[0]])[order], torch.cat([pairs.rejected, far[1]])[order]
    weight = torch.cat([torch.ones(count), torch.zeros(count)])[order]
    return EncodedPairs(chosen, rejected, weight=weight, group=torch.cat([pairs.group, pairs.group])[order])


@pytest.mark.parametrize(
    "model", [BradleyTerry(), MeanShift(), GeneralPreference(hidden=0), PreferenceEnsemble([BradleyTerry()])],
    ids=lambda model: type(model).__name__,
)  # fmt: skip
def test_weight_zero_is_removal_for_every_preference_model(model):
    pairs, y = bradley_terry_pairs(120, WEIGHTS), torch.randn(20, 4)
    kinds = [unfitted({"kind": type(model).__name__, "settings": model.settings()}) for _ in range(2)]
    plain, mixed = (
        kind.fit(part).score(y, -y) for kind, part in zip(kinds, (pairs, with_outliers(pairs)), strict=True)
    )
    assert float(plain.abs().max()) > 0.1
    torch.testing.assert_close(mixed, plain, rtol=1e-4, atol=1e-4)


def test_weight_zero_is_removal_for_flow_and_win_head():
    pairs, y = bradley_terry_pairs(120, WEIGHTS), torch.randn(20, 4)
    config = FlowConfig(residual=False, validation_share=0.3)
    flows = [PreferenceFlow.fit(part, config, progress=False) for part in (pairs, with_outliers(pairs))]
    torch.testing.assert_close(*(flow.win_probability(y) for flow in flows))
    torch.testing.assert_close(*(flow.transport(y) for flow in flows))
    one = EncodedPairs(pairs.chosen, pairs.rejected, weight=(torch.arange(120) == 7).float())
    assert bool(torch.isfinite(BradleyTerry().fit(one).score(y, -y)).all())
    head = WinHead(4, 0)
    assert head.fit(one, network=False).z < 1.645
    assert bool(torch.isfinite(head(y, None)).all())


def test_a_pair_of_weight_two_is_the_pair_twice():
    pairs = bradley_terry_pairs(60, WEIGHTS)
    y = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(60)
    weight[::3] = 2
    twice = pairs.select(torch.cat([torch.arange(60), torch.arange(0, 60, 3)]))
    heavy = EncodedPairs(pairs.chosen, pairs.rejected, weight=weight)
    torch.testing.assert_close(
        *(BradleyTerry().fit(part).score(y, -y) for part in (twice, heavy)), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("saved", [False, True])
def test_opponents_of_all_and_of_each_are_told_apart_by_the_shape_of_an_output(shape, saved, tmp_path):
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, y, opponents = torch.randn(4, 8, *shape, generator=generator)
    model = BradleyTerry().fit(EncodedPairs(chosen + 0.5, rejected))
    if saved:
        model = load(model.save(tmp_path))
    assert model.event_shape == shape
    every = torch.sigmoid(torch.stack([model.score(y, other.expand_as(y)) for other in opponents], 1))
    for count in (3, 8):  # as many opponents as outputs, too
        shared = model.win_probability(y, opponents[:count])
        torch.testing.assert_close(shared, every[:, :count].mean(1))
        own = opponents[:count].expand(8, count, *shape)
        torch.testing.assert_close(model.win_probability(y, own), shared)
    each = model.win_probability(y, opponents[:, None])
    torch.testing.assert_close(each, every.diagonal())


def test_opponents_that_fit_both_readings_are_refused_and_older_saves_go_by_y():
    chosen, rejected, y, opponents = torch.randn(4, 5, 1, 3)
    model = BradleyTerry().fit(EncodedPairs(chosen, rejected))
    shared = model.win_probability(y, opponents)
    with pytest.raises(ValueError, match=r"opponents of shape \(5, 1, 3\) may be 5 for all of y or 1 for each"):
        model.win_probability(y.flatten(1), opponents)
    torch.testing.assert_close(model.win_probability(y.flatten(1), opponents.flatten(1)), shared)
    described = model.describe()
    described["layout"] = {name: value for name, value in described["layout"].items() if name != "event_shape"}
    older = restored(described)
    older.load_state_dict(model.state_dict())
    assert older.event_shape is None
    torch.testing.assert_close(older.win_probability(y, opponents), shared)
    with pytest.raises(ValueError, match="opponents must have 3 values a row: got 6"):
        model.win_probability(y, torch.randn(4, 2, 3))


def test_folds_without_weight_judge_nothing():
    pairs = bradley_terry_pairs(100, WEIGHTS)
    difference, fold = pairs.chosen - pairs.rejected, torch.arange(100) % 5
    label = torch.ones(100)
    for weightless in (fold == 2, fold != 2):
        search = Search([difference], torch.where(weightless, 0.0, 1.0), label, fold)
        search.over([()])
        assert all(math.isfinite(loss) for loss in search._loss.values())
        assert bool(torch.isfinite(search.left_out(search.best())).all())
        if int(weightless.sum()) == 20:  # as if they had not been there
            without = Search([difference[~weightless]], torch.ones(80), label[~weightless], fold[~weightless])
            without.over([()])
            assert search.best() == without.best()
            torch.testing.assert_close(search.refit(search.best()), without.refit(without.best()), rtol=1e-3, atol=1e-3)
    assert PairwiseLogistic(difference, torch.zeros(100)).fit(1e-3).tolist() == [0.0] * 4
    assert PairwiseLogistic(difference[:0]).fit(1e-3).tolist() == [0.0] * 4


def test_of_more_columns_than_rows_the_span_gives_the_same_optimum():
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(30, 200, generator=generator).double() + 0.3
    weight = torch.rand(30, generator=generator).double() + 0.1
    weight[4] = 0
    label = torch.rand(30, generator=generator).double()
    at = PairwiseLogistic(difference, weight, label).fit(1e-2, 200)
    nothing = torch.zeros(200, 200, dtype=torch.float64)  # rows without weight: as many rows as columns
    whole = PairwiseLogistic(*(torch.cat([part, rest]) for part, rest in (
        (difference, nothing), (weight, nothing[0]), (label, nothing[0]),
    )))  # fmt: skip
    assert float(at.norm()) > 0.1
    torch.testing.assert_close(at, whole.fit(1e-2, 200), rtol=0, atol=1e-6)
    exact, _ = newton_logistic(difference, label, weight / weight.sum(), 2e-2)
    torch.testing.assert_close(at, exact, rtol=0, atol=1e-4)  # the solver's own tolerance
    ridge = Ridge(difference, label, weight).solve(0.1)
    share = weight / weight.sum()
    gram = difference.T @ (difference * share[:, None]) + 0.1 * torch.eye(200, dtype=torch.float64)
    expected = torch.linalg.solve(gram, difference.T @ (share * label))
    torch.testing.assert_close(ridge, expected, rtol=0, atol=1e-9)


def test_planes_of_more_features_than_outputs_are_those_of_the_whole_space():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 20, 60, generator=generator)
    weight = torch.rand(20, generator=generator) + 0.5
    every, label = torch.ones(20, dtype=torch.bool), torch.ones(20)
    axes = SkewMoments(one, other, weight, label).axes(every, 0.3, 4).double()
    # Straight from the definition, in all 60 dimensions.
    one, other, share = one.double(), other.double(), (weight / weight.sum()).double()[:, None]
    second = (one.T @ (one * share) + other.T @ (other * share)) / 2
    values, vectors = torch.linalg.eigh(second)
    root = vectors * (values.clamp_min(1e-9 * values[-1]) + 0.3 * values.mean()).rsqrt() @ vectors.T
    moment = one.T @ (other * share)
    inside = root @ (moment - moment.T) @ root
    leading = torch.linalg.eigh(inside.T @ inside)[1][:, -4:]
    expected = root @ leading
    torch.testing.assert_close(axes @ axes.T, expected @ expected.T, rtol=0, atol=1e-5)


class Memory(PreferenceModel):
    """Prefers what was chosen among the pairs it was fitted on, and knows nothing else."""

    seen: torch.Tensor
    slope: torch.Tensor

    def _build(self, dimension: int, count: int) -> None:
        self.dimension = dimension
        self.register_buffer("seen", torch.zeros(count, dimension))
        self.register_buffer("slope", torch.ones(()))

    def settings(self):
        return {}

    def fit(self, pairs, validation=None, *, progress=False):
        self._ready(dimension=pairs.dimension, count=len(pairs))
        self.seen.copy_(pairs.chosen)
        return self

    def embed(self, y, context):
        known = (y[:, None] == self.seen).all(2).any(1)
        return Embedded(4.0 * known * self.slope, y.new_zeros(len(y), 0))

    def _rescale(self, slope: float) -> None:
        self.slope *= slope


def test_members_of_an_ensemble_are_weighed_on_pairs_left_out():
    pairs = bradley_terry_pairs(60, 3 * WEIGHTS)
    found = PreferenceEnsemble([Memory(), MeanShift()]).fit(pairs)
    assert found.found["weights"][0] == 0
    assert found.found["weights"][1] > 0
    y, other = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    expected = found.found["weights"][1] * MeanShift().fit(pairs).score(y, other)
    torch.testing.assert_close(found.score(y, other), expected)
    told = PreferenceEnsemble([Memory(), MeanShift()]).fit(pairs, validation=pairs)  # judged where it remembers all
    assert told.found["weights"][0] > 0


def test_scores_of_negative_weight_are_left_out_and_the_others_refitted():
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(40, generator=generator) + 0.5
    pairs = EncodedPairs(torch.ones(40, 1), torch.zeros(40, 1))
    weights = _stacked(torch.stack([right, -right - 0.3 * torch.randn(40, generator=generator)], 1), pairs)
    alone = _stacked(right[:, None], pairs)
    assert float(weights[1]) == 0
    assert float(weights[0]) == pytest.approx(float(alone[0]), rel=1e-4)
    assert float(alone[0]) > 0
    assert _stacked(-right[:, None], pairs).tolist() == [0.0]
    doubled = _stacked(2 * right[:, None], pairs)
    assert float(doubled[0]) == pytest.approx(float(alone[0]) / 2, rel=1e-4)


def test_the_moment_of_a_cycle_counts_a_soft_label_for_what_it_says():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 10, 3, generator=generator)
    weight, probability = torch.rand(2, 10, generator=generator)
    every = torch.ones(10, dtype=torch.bool)
    moment = SkewMoments(chosen, rejected, weight, probability)._moments(every)[2]
    one_way = chosen.T @ (rejected * (weight * (2 * probability - 1))[:, None]) / weight.sum()
    torch.testing.assert_close(moment, (one_way - one_way.T).double())
    nothing = SkewMoments(chosen, rejected, weight, torch.full((10,), 0.5))._moments(every)[2]
    assert not bool(nothing.any())


@pytest.mark.parametrize("seed", range(3))
def test_the_reward_below_a_network_is_judged_on_other_prompts(seed):
    """Eight numbers order twenty pairs of coin labels rightly; what holds on other prompts is next to nothing."""
    one, other = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(seed))
    pairs = EncodedPairs(one, other, group=torch.arange(20))
    alone, below = BradleyTerry(1e-3).fit(pairs), BradleyTerry(1e-3, hidden=4).fit(pairs)
    assert float(alone.score(one, other).mean()) > 0.5
    assert float(below.weights.norm()) < 0.2 * float(alone.weights.norm())
