"""Parts of the preference models against closed forms on a few rows: comparing, folds, planes, ties, raters, views."""

import math

import pytest
import torch

from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm.data import PreferencePairs
from pfm.preferences import (
    BradleyTerry,
    Embedded,
    HybridPreference,
    PreferenceModel,
    TieModel,
    base,
    bradley_terry,
    general,
    reconcile,
)
from pfm.preferences.correction import Correction
from pfm.preferences.crossvalidation import Search, deal_folds
from pfm.preferences.logistic import PairwiseLogistic, pairwise_accuracy
from pfm.preferences.noise import NoiseReport, _fit_link, _Labels, _Link, _rater_rates
from pfm.preferences.planes import SkewMoments, to_planes
from pfm.preferences.raters import _Votes
from pfm.preferences.ridge import Ridge, fit_ridge


class Inner(PreferenceModel):
    """Scores outputs by their inner product with the context; fitted on nothing."""

    def _build(self, dimension: int, contexts: int) -> None:
        self.dimension, self.context_dimension = dimension, contexts
        self.register_buffer("slope", torch.ones(()))

    def fit(self, pairs, validation=None, *, progress=False):
        self._ready(dimension=pairs.dimension, contexts=pairs.context_dimension)
        return self

    def embed(self, y, context):
        assert context is not None
        return Embedded((y * context).sum(-1), y.new_zeros(*y.shape[:-1], 0))

    def _rescale(self, slope: float) -> None:
        raise NotImplementedError


@pytest.fixture(scope="module")
def inner() -> Inner:
    return Inner().fit(EncodedPairs(torch.ones(2, 2), torch.zeros(2, 2), torch.ones(2, 2)))


# -- comparing under contexts -------------------------------------------------------------------------------------


def test_one_output_is_compared_under_each_of_many_contexts(inner):
    y, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.0]])
    contexts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    expected = [0.5, 2.0, 2.5]
    assert inner.score(y, other, contexts).tolist() == pytest.approx(expected)
    assert inner.score(y.expand(3, -1), other, contexts).tolist() == pytest.approx(expected)
    assert inner.score(y, other.expand(3, -1), contexts).tolist() == pytest.approx(expected)
    assert inner.score(y.expand(3, -1), other.expand(3, -1), contexts[1]).tolist() == [2.0] * 3
    b = torch.sigmoid(torch.tensor(expected)).tolist()
    assert inner.win_probability(y, other, contexts).tolist() == pytest.approx(b)
    for bad in (torch.ones(2, 2), torch.ones(3, 3), torch.ones(1, 3, 2)):
        with pytest.raises(ValueError, match="one row an output"):
            inner.score(y.expand(3, -1), other, bad)
    with pytest.raises(ValueError, match="is missing: this model was fitted with contexts"):
        inner.score(y, other)


@pytest.mark.parametrize("values", [2**25, 9, 1])
def test_opponents_are_met_under_the_context_of_each_output(inner, monkeypatch, values):
    monkeypatch.setattr(base, "CHUNK_VALUES", values)  # rows of outputs that are embedded at a time: all, two, one
    generator = torch.Generator().manual_seed(0)
    y, contexts = torch.randn(2, 5, 2, generator=generator)
    shared, own = torch.randn(2, 2, generator=generator), torch.randn(5, 2, 2, generator=generator)
    expected = torch.sigmoid((y * contexts).sum(1)[:, None] - contexts @ shared.T).mean(1)
    torch.testing.assert_close(inner.win_probability(y, shared, contexts), expected)
    expected = torch.sigmoid((y * contexts).sum(1)[:, None] - (own * contexts[:, None]).sum(2)).mean(1)
    torch.testing.assert_close(inner.win_probability(y, own, contexts), expected)
    one = torch.sigmoid((y @ contexts[0])[:, None] - shared @ contexts[0]).mean(1)
    torch.testing.assert_close(inner.win_probability(y, shared, contexts[0]), one)
    assert inner.win_probability(y[:0], shared, contexts[:0]).shape == (0,)


# -- folds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "module"), [(BradleyTerry, bradley_terry), (HybridPreference, general)])
def test_one_prompt_in_five_judges_the_network_unless_validation_does(kind, module, monkeypatch):
    judging = []
    fit = module.fit_correction

    def noted(one, other, tries, score, held_out, group, generator, **shape):
        judging.append((held_out, group, len(score)))
        brief = [(axes, batch, training | {"updates": 1}) for axes, batch, training in tries]
        return fit(one, other, brief, score, held_out, group, generator, **shape)

    monkeypatch.setattr(module, "fit_correction", noted)
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 60, 2, generator=generator)
    weight = torch.rand(40, generator=generator) + 0.5
    pairs = EncodedPairs(one[:40], other[:40], weight=weight, group=torch.arange(40) // 2)
    validation = EncodedPairs(one[40:], other[40:], group=torch.arange(20) // 2)
    kind(hidden=2).fit(pairs)
    kind(hidden=2).fit(pairs, validation)
    (held_out, group, count), (of_validation, groups, more) = judging
    assert (count, more) == (40, 60)
    assert float(held_out.float().mean()) == pytest.approx(0.2)
    assert not set(group[held_out].tolist()) & set(group[~held_out].tolist())
    assert of_validation.tolist() == [False] * 40 + [True] * 20
    assert len(groups.unique()) == 30  # prompts of the two sets are not the same ones
    found = kind(hidden=0).fit(pairs).found
    assert "network_gain" not in found
    assert not found.get("network")


def test_folds_are_of_prompts_and_as_even_as_they_can_be():
    fold = deal_folds(torch.arange(12) // 2, torch.Generator().manual_seed(0))
    assert fold.view(6, 2).diff(dim=1).abs().sum() == 0
    assert sorted(fold[::2].bincount().tolist()) == [1, 1, 1, 1, 2]
    alone = deal_folds(torch.zeros(12), torch.Generator().manual_seed(0))  # one prompt: by pairs
    assert sorted(alone.bincount().tolist()) == [2, 2, 2, 3, 3]
    assert deal_folds(torch.zeros(3), torch.Generator()).sort().values.tolist() == [0, 1, 2]


def test_a_left_out_score_is_by_the_fits_that_did_not_see_its_fold():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 12, 2, generator=generator)
    weight, probability = torch.rand(2, 12, generator=generator) + torch.tensor([[0.1], [0.0]])
    fold = torch.arange(12) % 3
    search = Search([first, second], weight, probability.clamp(max=1.0), fold)
    search.over([(0.0,), (0.5,)], (0.1, 0.01))
    settings = [(0.1, 0.5), (0.01, 0.0)]
    expected = torch.zeros(12)
    for number in range(3):
        out = fold == number
        for penalty, scale in settings:
            rows = torch.cat([first, second * scale], 1) if scale else first
            fit = PairwiseLogistic(rows[~out], weight[~out], probability.clamp(max=1.0)[~out]).fit(penalty, 200)
            expected[out] += rows[out] @ fit / 2
    torch.testing.assert_close(search.left_out(settings), expected, atol=2e-3, rtol=0)
    blocks = search.refit(settings)
    fits = [
        PairwiseLogistic(rows, weight, probability.clamp(max=1.0)).fit(penalty, 200)
        for penalty, rows in ((0.1, torch.cat([first, second * 0.5], 1)), (0.01, first))
    ]
    torch.testing.assert_close(blocks[0], (fits[0][:2] + fits[1]) / 2, atol=2e-3, rtol=0)
    torch.testing.assert_close(blocks[1], fits[0][2:] * 0.5 / 2, atol=2e-3, rtol=0)
    assert len(search.best()) == 4
    assert all(setting[1] == 0 for setting in search.best(lambda setting: setting[1] == 0))


def test_ridge_is_the_normal_equations_and_is_chosen_on_left_out_folds():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    weight = torch.rand(40, generator=generator, dtype=torch.float64)
    value = x @ torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    share = weight / weight.sum()
    moment = (x * share[:, None]).T @ x
    expected = torch.linalg.solve(moment + 0.3 * torch.eye(3), x.T @ (share * value))
    torch.testing.assert_close(Ridge(x, value, weight).solve(0.3), expected)
    fold = torch.arange(40) % 4
    found, predicted = fit_ridge(x, value, weight, fold, (10.0, 1e-6))
    torch.testing.assert_close(found, torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64), atol=1e-4, rtol=0)
    out = fold == 2
    torch.testing.assert_close(predicted[out], x[out] @ Ridge(x[~out], value[~out], weight[~out]).solve(1e-6))
    noise = torch.randn(40, generator=generator, dtype=torch.float64)
    nothing, zeros = fit_ridge(x, noise, weight, fold, (1e-9,))  # three coefficients of noise predict worse than none
    assert not bool(nothing.any() or zeros.any())
    assert not bool(fit_ridge(x, value, weight, torch.zeros(40), (1.0,))[0].any())  # one fold judges nothing


# -- planes -------------------------------------------------------------------------------------------------------


def test_planes_are_as_many_as_asked_for_the_greatest_first():
    matrix = torch.zeros(6, 6)
    for place, size in enumerate((1.0, 3.0, 2.0)):
        matrix[2 * place, 2 * place + 1], matrix[2 * place + 1, 2 * place] = size, -size
    for count in (1, 2, 3, 4):
        planes = to_planes(matrix, torch.eye(6), count)
        assert planes.shape == (6, 2 * min(count, 3))
        form = planes[:, 0::2] @ planes[:, 1::2].T - planes[:, 1::2] @ planes[:, 0::2].T
        kept = torch.zeros(6, 6)
        for place, size in ((1, 3.0), (2, 2.0), (0, 1.0))[:count]:
            kept[2 * place, 2 * place + 1], kept[2 * place + 1, 2 * place] = size, -size
        torch.testing.assert_close(form, kept, atol=1e-5, rtol=0)


def test_standard_errors_of_the_skew_moment_are_those_of_its_terms():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 10, 3, generator=generator)
    weight, probability = torch.rand(2, 10, generator=generator)
    part = torch.arange(10) != 4
    found = SkewMoments(chosen, rejected, weight, probability)._errors(part)
    forward = weight * (2 * probability - 1)
    terms = forward[:, None, None] * (chosen[:, :, None] * rejected[:, None] - rejected[:, :, None] * chosen[:, None])
    expected = terms[part].square().sum(0).sqrt().double()
    away = ~torch.eye(3, dtype=torch.bool)
    torch.testing.assert_close(found[away], expected[away], atol=1e-4, rtol=1e-4)


def test_the_features_in_which_labels_stand_out_lead_and_have_unit_variance():
    """Features 1 and 3 form a cycle and 0 is liked; the others are noise of any unit."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 400, 5, generator=generator) * torch.tensor([1.0, 2.0, 50.0, 0.1, 1.0])
    odds = 20 * (one[:, 1] * other[:, 3] - one[:, 3] * other[:, 1])
    first = (odds > 0)[:, None]
    ones, every = torch.ones(400), torch.ones(400, dtype=torch.bool)
    moments = SkewMoments(torch.where(first, one, other), torch.where(first, other, one), ones, ones)
    axes = moments.features(every, 2)
    assert axes.count_nonzero(1).nonzero().flatten().tolist() == [1, 3]
    both = torch.cat([one, other]) @ axes
    torch.testing.assert_close(both.std(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    liked = (one[:, 0] > other[:, 0])[:, None]
    moments = SkewMoments(torch.where(liked, one, other), torch.where(liked, other, one), ones, ones)
    assert moments.features(every, 1, reward=True).nonzero()[:, 0].tolist() == [0]
    half = torch.full((400,), 0.5)  # a soft label of one half points nowhere: nothing is liked
    half[:30] = 0.0
    turned = SkewMoments(torch.where(liked, one, other), torch.where(liked, other, one), ones, half)
    assert turned.features(every, 1, reward=True).nonzero()[:, 0].tolist() == [0]


def test_a_networks_planes_have_the_strengths_that_the_context_sets():
    torch.manual_seed(0)
    shape = {"hidden": 8, "blocks": 2, "reward": True}
    gated = Correction(3, 2, 3, 2, gate=True, **shape)
    inputs, context = torch.randn(5, 3), torch.randn(5, 2)
    assert gated.gate is not None
    found = gated.body(torch.cat([inputs, context], 1))
    strength = 2 * torch.softmax(gated.gate(context), 1)
    planes = found[:, 1:] * strength.sqrt().repeat_interleave(2, 1)
    embedded = gated.of_axes(inputs, context)
    torch.testing.assert_close(embedded.reward, found[:, 0])
    torch.testing.assert_close(embedded.planes, planes)
    gated.gain.fill_(0.25)
    gated.input_axes.copy_(torch.randn(3, 3))
    gated.context_mean.fill_(0.5)
    gated.context_axes.copy_(torch.randn(2, 2))
    y, x = torch.randn(2, 3), torch.randn(2, 2)
    whole, parts = gated(y, x), gated.of_axes(y @ gated.input_axes, (x - 0.5) @ gated.context_axes)
    torch.testing.assert_close(whole.reward, 0.25 * parts.reward)
    torch.testing.assert_close(whole.planes, 0.5 * parts.planes)  # a score is a product of two planes
    unit = Correction(3, 0, 3, 0, hidden=8, blocks=2, reward=False, unit=True, temperature=4.0)
    assert unit.gate is None
    found = unit.of_axes(inputs, None)
    torch.testing.assert_close(found.planes.norm(dim=1), torch.full((5,), 0.5))
    assert not bool(found.reward.any())


# -- ties and raters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["davidson", "rao-kupper"])
def test_without_ties_both_models_are_the_logistic_one(kind):
    score, first, second = [1.0, -2.0, 0.5, 3.0], [5, 1, 2, 4], [1, 6, 3, 0]
    model = TieModel(kind).fit(score, first, second)
    assert model.width == 0
    s, one, two = (torch.tensor(values, dtype=torch.float64) for values in (score, first, second))
    spread = float(s.abs().mean())
    at = model.slope * s
    # Half a vote for either side, on a pair as far apart as the usual one.
    gradient = (s * (one - (one + two) * torch.sigmoid(at))).sum() + spread * (
        0.5 - torch.sigmoid(torch.tensor(model.slope * spread, dtype=torch.float64))
    )
    assert float(gradient) == pytest.approx(0, abs=5e-4)
    torch.testing.assert_close(model.probabilities(score)[:, 1], torch.zeros(4))
    # Of one pair the slope has a closed form, which a width that is fitted along with it does not reach.
    slope = TieModel(kind).fit([0.5], [40], [3]).slope
    assert slope == pytest.approx(2 * math.log(40.5 / 3.5), abs=2e-5)


def test_a_raters_table_is_drawn_to_that_of_all():
    pair, rater, said = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 0]), torch.tensor([0, 1, 1, 1, 0])
    votes = _Votes(pair, rater, said, 2, 2, 2, torch.zeros(2, dtype=torch.float64))
    truth = torch.tensor([[0.9, 0.1], [0.25, 0.75]], dtype=torch.float64)
    spoken = torch.nn.functional.one_hot(said, 2).double()
    counts = torch.zeros(2, 2, 2, dtype=torch.float64)
    for p, r, v in zip(pair.tolist(), rater.tolist(), said.tolist(), strict=True):
        counts[r, :, v] += truth[p]
    total = counts.sum(0) + 0.5
    total = total + torch.tensor([[total[1, 1], total[1, 0]], [total[0, 1], total[0, 0]]])
    common = total / total.sum(1, keepdim=True)
    drawn = counts + 3.0 * common
    table = votes._tables(truth, spoken, "two-coin", 3.0)
    torch.testing.assert_close(table, drawn / drawn.sum(2, keepdim=True))
    one_coin = votes._tables(truth, spoken, "one-coin", 3.0)
    right = counts.diagonal(dim1=1, dim2=2).sum(1)
    expected = (truth.mean(0) * common.diagonal()).sum()
    skill = (right + 3.0 * expected) / (counts.sum((1, 2)) + 3.0)
    torch.testing.assert_close(one_coin.diagonal(dim1=1, dim2=2), skill[:, None].expand(2, 2))
    torch.testing.assert_close(one_coin.sum(2), torch.ones(2, 2, dtype=torch.float64))


def test_the_same_responses_to_two_prompts_are_two_pairs_and_the_better_one_is_chosen():
    votes = [("p", "yes", "no", "a"), ("p", "no", "yes", "b"), ("p", "no", "yes", "c"), ("q", "yes", "no", "a")]
    rows = [{"prompt": p, "chosen": better, "rejected": worse, "rater": rater} for p, better, worse, rater in votes]
    joined = reconcile(PreferencePairs.from_rows(rows)).pairs
    assert joined.prompts == ["p", "q"]
    assert list(zip(joined.chosen, joined.rejected, strict=True)) == [("no", "yes"), ("yes", "no")]
    assert joined.probability is not None
    assert min(joined.probability) >= 0.5


# -- noise --------------------------------------------------------------------------------------------------------


def test_the_chance_of_an_observed_label_is_the_mixture_of_right_and_flipped():
    score, labels = torch.tensor([2.0, -1.0, 0.5]), _Labels(torch.tensor([1.0, 0.0, 0.7]), torch.ones(3))
    link = _Link(1.5, 0.1)
    chance = 0.1 + 0.8 * torch.sigmoid(1.5 * score)
    p = labels.probability
    torch.testing.assert_close(link.loss(score, labels), -(p * chance.log() + (1 - p) * (1 - chance).log()))
    torch.testing.assert_close(link.evidence(score, labels), (2 * p - 1) * 1.5 * score)


def test_slope_and_rate_of_a_link_are_where_the_likelihood_is_stationary():
    generator = torch.Generator().manual_seed(0)
    score = 3 * torch.randn(4000, generator=generator)
    flipped = torch.rand(4000, generator=generator) < 0.15
    first = (torch.rand(4000, generator=generator) < torch.sigmoid(0.8 * score)) ^ flipped
    labels = _Labels(first.float(), torch.rand(4000, generator=generator) + 0.5)
    link = _fit_link(score, labels, None)
    assert link.slope == pytest.approx(0.8, abs=0.1)
    assert link.rate == pytest.approx(0.15, abs=0.03)
    at = torch.tensor([link.slope, link.rate], dtype=torch.float64, requires_grad=True)
    chance = at[1] + (1 - 2 * at[1]) * torch.sigmoid(at[0] * score.double())
    p = labels.probability.double()
    loss = -(labels.weight.double() * (p * chance.log() + (1 - p) * (1 - chance).log())).mean()
    assert float(torch.autograd.grad(loss, at)[0].abs().max()) < 1e-5
    assert _fit_link(score, labels, 0.15).rate == 0.15
    assert _fit_link(torch.zeros(5), _Labels(torch.ones(5), torch.ones(5)), 0.2) == _Link(0.0, 0.2)
    assert _fit_link(-score.abs(), _Labels(torch.ones(4000), torch.ones(4000)), None).slope == 0


def test_a_raters_share_of_wrong_labels_is_drawn_to_the_mean_by_ten_labels():
    odds = torch.tensor([50.0, 50.0, -50.0, -50.0])  # certain of each label: two right, two wrong
    labels = _Labels(torch.ones(4), torch.tensor([1.0, 2.0, 1.0, 0.5]))
    rates = _rater_rates(odds, labels, torch.tensor([0, 0, 0, 1]), 2, 0.2)
    assert rates.tolist() == pytest.approx([(1 + 10 * 0.2) / 14, (0.5 + 10 * 0.2) / 10.5])


def test_a_report_of_label_noise_says_what_was_given_found_or_not_confirmed():
    def told(rate, known):
        correct = torch.tensor([0.9, 0.4, 0.5])
        return str(NoiseReport(rate, known, 0.125, 2.0, correct, 0.5, 0.0, None))

    assert (
        told(0.2, True) == "20.0% of the labels were given as flipped; 1 of 3 labels are more likely wrong than right"
    )
    assert told(0.2, False).startswith("about 20.0% of the labels are flipped (z = 2.0 against none); 1 of 3")
    assert told(0.0, False).startswith("no flipped labels confirmed (the likeliest share, 12.5%, is within the noise)")


def test_pairs_labelled_as_ties_are_no_part_of_what_is_ordered_rightly():
    score = torch.tensor([2.0, 1.0, -1.0, 0.0, 5.0, -5.0])
    label = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 0.5])
    weight = torch.tensor([1.0, 2.0, 1.0, 1.0, 30.0, 30.0])
    assert pairwise_accuracy(score, weight, label) == pytest.approx((1 + 2 + 0.5) / 5)
    assert pairwise_accuracy(score[4:], weight[4:], label[4:]) == 0.5
    assert pairwise_accuracy(score[:3], weight[:3], torch.tensor([0.8, 0.2, 0.4])) == pytest.approx(
        0.5 + 0.5 * (0.6 - 2 * 0.6 + 0.2) / 4
    )


def test_ties_leave_what_a_fit_says_of_the_other_pairs_as_it_is():
    """A flow that orders nearly all decided pairs says so, though most pairs are ties; the guard's margin likewise."""
    y, other = torch.randn(2, 300, 3, generator=torch.Generator().manual_seed(0))
    first = y[:, :1] > other[:, :1]
    chosen, rejected = torch.where(first, y, other), torch.where(first, other, y)
    config = FlowConfig(residual=False)
    found = []
    for ties in (0, 200):
        label = torch.ones(300)
        label[:ties] = 0.5
        pairs = EncodedPairs(chosen, rejected, probability=label, group=torch.arange(300))
        found.append(PreferenceFlow.fit(pairs, config, progress=False))
    plain, tied = (flow.metadata["win"]["accuracy"] for flow in found)
    assert plain > 0.97
    assert tied > 0.93
    assert found[1].guard_margin < 0.1
