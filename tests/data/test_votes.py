"""Votes: soft labels, ties and raters, against known answers."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from pfm import EncodedPairs, PreferencePairs
from pfm.data import PreferenceDataError
from pfm.preferences import BradleyTerry, TieModel, fit_prior, fit_raters, rater_index, reconcile, soft_labels
from pfm.preferences.logistic import pairwise_log_loss

# -- soft labels --------------------------------------------------------------------------------------------------


def test_soft_labels_count_a_tie_half_and_add_the_prior():
    labels = soft_labels([3, 1, 0], [1, 0, 5], [1, 0, 0], prior=1.0, weight="effective")
    assert labels.probability.tolist() == pytest.approx([4.5 / 7, 2 / 3, 1 / 7])
    # n votes of one pair share its p, whose intra-class correlation under Beta(1, 1) is 1/3.
    assert labels.weight.tolist() == pytest.approx([5 / (1 + 4 / 3), 1.0, 5 / (1 + 4 / 3)])
    plain = soft_labels([3, 0], [1, 1], [2, 0])
    assert plain.probability.tolist() == pytest.approx([2 / 3, 0.0])
    assert plain.weight.tolist() == [6, 1]
    assert plain.prior == 0.0
    turned = soft_labels([1, 0, 5], [3, 1, 0], [1, 0, 0], prior=1.0)
    torch.testing.assert_close(turned.probability, 1 - labels.probability)


@pytest.mark.parametrize("a", [0.3, 1.0, 5.0])
def test_the_prior_is_found_and_its_labels_are_nearer_to_the_truth_than_plain_shares(a: float):
    torch.manual_seed(0)
    p = torch.distributions.Beta(a, a).sample((4000,))
    first = torch.binomial(torch.full((4000,), 5.0), p)
    assert fit_prior(first, 5 - first) == pytest.approx(a, rel=0.15)
    found = soft_labels(first, 5 - first, prior=None)
    assert float((found.probability - p).square().mean()) < 0.95 * float((first / 5 - p).square().mean())


def test_plain_shares_teach_a_model_what_people_hold_and_drawn_in_ones_that_they_are_less_sure():
    generator = torch.Generator().manual_seed(0)
    y, other, *new = (torch.randn(4000, 3, generator=generator) for _ in range(4))
    taste = torch.tensor([1.5, -1.0, 0.5])
    first = torch.binomial(torch.ones(4000), torch.sigmoid((y - other) @ taste), generator=generator)
    truth = torch.sigmoid((new[0] - new[1]) @ taste)
    losses = []
    for prior in (0.0, None):
        labels = soft_labels(first, 1 - first, prior=prior)
        pairs = EncodedPairs(y, other, probability=labels.probability, weight=labels.weight)
        losses.append(pairwise_log_loss(BradleyTerry(1e-6).fit(pairs).score(*new), None, truth))
    assert losses[0] < losses[1] - 0.02
    assert losses[0] < 1.02 * float(-(truth * truth.log() + (1 - truth) * (1 - truth).log()).mean())


def test_one_vote_a_pair_leaves_every_share_as_likely_as_any_other():
    assert fit_prior([1, 0, 1], [0, 1, 0]) == 1.0
    assert soft_labels([1, 0], [0, 1], prior=None).probability.tolist() == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("first", "second", "tie", "options", "message"),
    [
        ([1, 0], [0, 0], None, {}, "pair 1 has no votes"),
        ([0, 0], [0, 0], [2, 1], {}, "all votes on all 2 pairs are ties"),
        ([1, math.nan], [0, 1], None, {}, "first must be finite"),
        ([1, -1], [0, 3], None, {}, "first must hold counts >= 0: row 1 is -1"),
        ([1, 0], [0, 1, 1], None, {}, "second must be"),
        ([1], [0], None, {"prior": -1.0}, "prior must be"),
        ([1], [0], None, {"weight": "sum"}, "weight must be"),
    ],
)
def test_bad_counts_are_named(first: list, second: list, tie: list | None, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        soft_labels(first, second, tie, **options)


# -- rows ---------------------------------------------------------------------------------------------------------


COUNTED = [
    {"prompt": "p", "a": "one", "b": "two", "votes_a": 1, "votes_b": 3, "votes_tie": 1},
    {"prompt": "q", "a": "three", "b": "four", "votes_a": 1, "votes_b": 0},
]


def test_rows_of_counts_take_a_prior_given_or_found():
    pairs = PreferencePairs.from_votes(COUNTED, prior=1.0, weight="effective")
    assert pairs.probability == pytest.approx([4.5 / 7, 2 / 3])
    assert pairs.weight == pytest.approx([5 / (1 + 4 / 3), 1.0])
    found = PreferencePairs.from_votes(COUNTED, prior=None)
    a = fit_prior([1, 1], [3, 0], [1, 0])
    assert found.probability == pytest.approx([(3.5 + a) / (5 + 2 * a), (1 + a) / (1 + 2 * a)])
    with pytest.raises(ValueError, match="prior must be"):
        PreferencePairs.from_votes(COUNTED, prior=math.nan)


def test_a_column_of_votes_gives_the_label_unless_the_row_has_one():
    row = {"prompt": "p", "chosen": "one", "rejected": "two", "votes": {"chosen": 2, "rejected": 1, "tie": 1}}
    pairs = PreferencePairs.from_rows([row, row | {"chosen": "three", "probability": 0.9}])
    assert pairs.probability == [0.625, 0.9]
    assert pairs.weight == [4, 1]
    with pytest.raises(PreferenceDataError, match="nobody voted"):
        PreferencePairs.from_rows([row | {"votes": {"chosen": 0, "rejected": 0}}])
    with pytest.raises(PreferenceDataError, match="column 'chosen'"):
        PreferencePairs.from_rows([row | {"votes": {"chosen": math.nan, "rejected": 0}}])


# -- ties ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["davidson", "rao-kupper"])
def test_tie_models_recover_what_made_the_votes(kind: str):
    torch.manual_seed(0)
    score = 2 * torch.randn(20_000)
    truth = TieModel(kind)
    truth.slope, truth.width = 0.7, 0.8
    chances = truth.probabilities(score)
    torch.testing.assert_close(chances.sum(1), torch.ones(len(score)))
    torch.testing.assert_close(chances, truth.probabilities(-score).flip(1))
    torch.testing.assert_close(truth.win_probability(score) + truth.win_probability(-score), torch.ones(len(score)))
    votes = one_hot(torch.multinomial(chances, 1)[:, 0], 3)
    found = TieModel(kind).fit(score, votes[:, 0], votes[:, 2], votes[:, 1])
    assert found.slope == pytest.approx(0.7, abs=0.04)
    assert found.width == pytest.approx(0.8, abs=0.04)
    assert TieModel(kind).fit(-score, votes[:, 0], votes[:, 2], votes[:, 1]).slope == 0.0
    without = TieModel(kind).fit(score, votes[:, 0], votes[:, 2] + votes[:, 1])
    assert without.width == 0.0
    assert float(without.probabilities(score)[:, 1].max()) == 0.0


def test_half_votes_have_the_slope_of_davidsons_likelihood():
    model = TieModel("davidson")
    model.width = 0.8
    score = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64, requires_grad=True)
    for place, share in ((0, 1.0), (1, 0.5), (2, 0.0)):
        (slope,) = torch.autograd.grad(model.probabilities(score)[:, place].log().sum(), score)
        torch.testing.assert_close(slope, share - model.win_probability(score.detach()))


def test_few_votes_make_no_tie_model_certain_and_ties_alone_are_refused():
    assert float(TieModel().fit([1.0, 2.0], [1, 1], [0, 0]).probabilities([1.0])[0, 0]) < 0.9
    with pytest.raises(ValueError, match="are ties"):
        TieModel().fit([1.0], [0], [0], [1])
    with pytest.raises(ValueError, match="score must be finite"):
        TieModel().fit([math.inf], [1], [0])
    with pytest.raises(ValueError, match="kind must be"):
        TieModel("thurstone")


# -- raters -------------------------------------------------------------------------------------------------------

SKILLS = torch.linspace(0.55, 0.95, 9)


@pytest.fixture(scope="module")
def panel() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give truth (I,), and pair, rater and vote (V,) of four raters a pair; rater 99 has cast one vote."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(1000, generator=generator) < 0.5
    pair = torch.arange(1000).repeat_interleave(4)
    rater = torch.randint(len(SKILLS), (len(pair),), generator=generator)
    right = torch.rand(len(pair), generator=generator) < SKILLS[rater]
    vote = torch.where(right, truth[pair], ~truth[pair]).float()
    last = torch.tensor
    return truth, torch.cat([pair, last([0])]), torch.cat([rater, last([99])]), torch.cat([vote, last([1.0])])


def test_reliable_raters_are_told_from_others_and_their_words_count_more(panel):
    truth, pair, rater, vote = panel
    found = fit_raters(pair, rater, vote)
    skill = found.reliability[[found.raters.index(r) for r in range(len(SKILLS))]]
    assert float((skill - SKILLS).abs().max()) < 0.06
    majority = torch.zeros(len(truth)).index_add_(0, pair, 2 * vote - 1)
    counted = ((majority > 0) == truth).float() * (majority != 0) + 0.5 * (majority == 0)
    assert float(((found.probability > 0.5) == truth).float().mean()) > float(counted.mean()) + 0.02
    # A posterior that says p is right p of the time.
    certain = torch.maximum(found.probability, 1 - found.probability)
    assert float(certain.mean()) == pytest.approx(float(((found.probability > 0.5) == truth).float().mean()), abs=0.02)
    assert found.settled


def test_a_rater_of_one_vote_is_near_the_mean(panel):
    _, pair, rater, vote = panel
    found = fit_raters(pair, rater, vote)
    assert found.single == [99]
    assert float(found.reliability[found.raters.index(99)]) == pytest.approx(found.mean_reliability, abs=0.03)
    assert "1 raters of one vote" in str(found)


def test_random_votes_show_no_skill_and_find_no_truth(panel):
    truth, pair, rater, vote = panel
    found = fit_raters(pair, rater, (torch.rand(len(vote), generator=torch.Generator().manual_seed(1)) < 0.5).float())
    assert found.mean_reliability < 0.56 < 0.7 < fit_raters(pair, rater, vote).mean_reliability
    assert float(((found.probability > 0.5) == truth).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_which_output_is_called_first_changes_nothing_with_one_coin(panel):
    truth, pair, rater, vote = panel
    turn = torch.arange(len(truth)) % 3 == 0
    one, other = (fit_raters(pair, rater, v).probability for v in (vote, torch.where(turn[pair], 1 - vote, vote)))
    torch.testing.assert_close(torch.where(turn, 1 - other, other), one, atol=1e-4, rtol=0)


def test_two_coins_see_a_liking_for_what_is_shown_first(panel):
    truth, pair, rater, vote = panel
    careless = torch.rand(len(vote), generator=torch.Generator().manual_seed(2)) < 0.3
    vote = torch.where(careless, torch.ones(()), vote)
    right = [
        float(((fit_raters(pair, rater, vote, model=model).probability > 0.5) == truth).float().mean())
        for model in ("one-coin", "two-coin")
    ]
    assert right[1] > right[0] + 0.02
    assert float(fit_raters(pair, rater, vote, model="two-coin").first_bias.mean()) > 0.15


def test_ties_are_votes_too(panel):
    truth, pair, rater, vote = panel
    equal = torch.arange(len(truth)) % 5 == 0
    undecided = torch.rand(len(vote), generator=torch.Generator().manual_seed(3)) < torch.where(equal, 0.8, 0.1)[pair]
    vote = torch.where(undecided, torch.full((), 0.5), vote)
    vote[pair == 10] = 0.5
    found = fit_raters(pair, rater, vote)
    assert float(found.tied[equal].mean()) > 0.75 > 0.1 > float(found.tied[~equal].mean())
    assert float(((found.probability > 0.5) == truth)[~equal].float().mean()) > 0.85
    assert float(found.probability[10]) == pytest.approx(0.5, abs=1e-6)


def test_predictions_take_the_place_of_further_votes():
    generator = torch.Generator().manual_seed(0)
    odds = 3 * torch.randn(3000, generator=generator)
    truth = torch.rand(3000, generator=generator) < torch.sigmoid(odds)
    rater = torch.arange(3000) % 2
    right = torch.rand(3000, generator=generator) < torch.tensor([0.6, 0.95])[rater]
    vote = torch.where(right, truth, ~truth).float()
    found = fit_raters(torch.arange(3000), rater, vote, log_odds=odds)
    torch.testing.assert_close(found.reliability, torch.tensor([0.6, 0.95]), atol=0.04, rtol=0)
    with pytest.raises(ValueError, match="no pair has more than one vote"):
        fit_raters(torch.arange(3000), rater, vote)


@pytest.mark.parametrize(
    ("pair", "rater", "vote", "options", "message"),
    [
        ([0, 0], ["a", "b"], [0.5, 0.5], {}, "all 2 votes are ties"),
        ([0, 0], ["a", "b"], [1, math.nan], {}, "vote must be finite"),
        ([0, 0], ["a", "b"], [1, 0.7], {}, "vote 1 is 0.7"),
        ([0, 0], ["a"], [1, 0], {}, "one entry a vote: got 1 for 2"),
        ([0, 0], ["a", None], [1, 0], {}, "rater of vote 1 is None"),
        ([0, 0], ["a", math.nan], [1, 0], {}, "rater of vote 1 is nan"),
        ([0.0, 1.0], ["a", "b"], [1, 0], {}, "pair must be one-dimensional integers"),
        ([0, 0], ["a", "b"], [1, 0], {"model": "three-coin"}, "model must be"),
        ([0, 0], ["a", "b"], [1, 0], {"prior": 0.0}, "prior must be"),
        ([0, 0], ["a", "b"], [1, 0], {"log_odds": [1.0, 2.0]}, "log_odds must be \\(1,\\)"),
    ],
)
def test_bad_votes_are_named(pair: list, rater: list, vote: list, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        fit_raters(pair, rater, vote, **options)


def test_rows_that_are_votes_become_one_row_a_pair(panel):
    truth, pair, rater, vote = panel
    texts = [("better", "worse") if said else ("worse", "better") for said in vote.tolist()]
    rows = [
        {"prompt": f"prompt {p}", "chosen": c, "rejected": r, "rater": f"rater {k}", "topic": p % 5, "id": i}
        for i, (p, k, (c, r)) in enumerate(zip(pair.tolist(), rater.tolist(), texts, strict=True))
    ]
    votes = PreferencePairs.from_rows(rows)
    assert rater_index(votes)[0][0] == rows[0]["rater"]
    joined = reconcile(votes)
    assert len(joined.pairs) == len(truth)
    assert joined.pairs.probability is not None
    said = torch.tensor([text == "better" for text in joined.pairs.chosen])
    expected = fit_raters(pair, rater, vote).probability
    found = torch.tensor(joined.pairs.probability)
    torch.testing.assert_close(torch.where(said, found, 1 - found), expected, atol=1e-4, rtol=0)
    assert list(joined.pairs.extra) == ["topic"]  # the votes of a pair agree in it, and have different ids
    with pytest.raises(ValueError, match="column 'rater' is missing"):
        reconcile(joined.pairs)


def test_votes_on_one_prompt_are_on_one_pair_however_it_is_written():
    rows = [
        {"prompt": prompt, "chosen": "yes", "rejected": "no", "rater": rater}
        for prompt, rater in [
            ("Is it so?", "a"),
            ("  is it  so?\n", "b"),
            ("Is it so\uff1f", "c"),
            ("Is it not so?", "a"),
        ]
    ]
    joined = reconcile(PreferencePairs.from_rows(rows))
    assert joined.pairs.prompts == ["Is it so?", "Is it not so?"]
    assert joined.pairs.probability is not None
    assert joined.pairs.probability[0] > joined.pairs.probability[1]  # three votes against one


def test_votes_without_a_prompt_are_told_apart_by_their_group():
    rows = [
        {"chosen": "yes", "rejected": "no", "group": group, "rater": rater}
        for group, rater in [("x", "a"), ("x", "b"), ("y", "a")]
    ]
    assert len(reconcile(PreferencePairs.from_rows(rows)).pairs) == 2


@pytest.mark.parametrize("model", ["one-coin", "two-coin"])
def test_nobody_need_have_voted_for_the_second_output(model: str):
    agreed = fit_raters([0, 0, 1, 1], ["a", "b"] * 2, [1, 1, 1, 1], model=model)
    assert bool((agreed.probability > 0.9).all())
    with_tie = fit_raters([0, 0, 1, 1, 2, 2], ["a", "b"] * 3, [1, 1, 0.5, 0.5, 1, 1], model=model)
    assert with_tie.tied[1] > 0.5 > with_tie.tied[0]
    assert bool((with_tie.probability[[0, 2]] > 0.9).all())
