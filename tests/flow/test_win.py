"""The win-probability head against closed forms: its level, its weights, its margin, what held-out prompts judge."""

import math

import pytest
import torch
from torch import Tensor

from pfm import EncodedPairs
from pfm._internal.columns import column_statistics
from pfm.flow import win
from pfm.flow.win import CONTEXT_RIDGES, WinHead, _agreement, confirmed_margin
from pfm.preferences.logistic import pairwise_accuracy


def columns(*values: list[float]) -> list[Tensor]:
    return [torch.tensor(each) for each in values]


@pytest.mark.parametrize(
    ("gap", "weight", "probability", "margin"),
    [
        ([0.9, 0.7, 0.5, 0.3], [1.0] * 4, [1.0] * 4, 0.0),
        ([0.9, 0.7, -0.5, 0.3], [1.0] * 4, [1.0] * 4, 0.7),  # what lies below a bin that is wrong is not trusted
        ([0.3, -0.5, 0.7, 0.9], [1.0] * 4, [1.0] * 4, 0.7),  # in any order
        ([-0.9, 0.7, 0.5, 0.3], [1.0] * 4, [1.0] * 4, math.inf),
        ([0.9, 0.7, -0.5, 0.3], [1.0] * 4, [1.0, 1.0, 0.0, 1.0], 0.0),
        ([0.9, 0.7, 0.5, 0.3], [1.0] * 4, [1.0, 0.6, 0.4, 1.0], 0.7),  # a soft label counts for what it says
        ([0.9, 0.7, 0.5, 0.3], [1.0] * 4, [1.0, 0.5, 1.0, 1.0], 0.9),  # as often right as wrong is not more often
    ],
)
def test_the_margin_ends_at_the_first_bin_that_is_not_right_more_often(gap, weight, probability, margin):
    assert confirmed_margin(*columns(gap, weight, probability), bins=4) == pytest.approx(margin)


def test_the_bins_of_the_margin_hold_equally_many_pairs_by_their_weights():
    gap, weight, probability = columns([0.9, 0.7, 0.6, 0.5], [1.0, 1.0, 3.0, 1.0], [1.0, 1.0, 0.0, 1.0])
    assert confirmed_margin(gap, weight, probability, bins=2) == pytest.approx(0.7)
    assert confirmed_margin(gap, torch.tensor([1.0, 1.0, 0.5, 1.0]), probability, bins=2) == 0.0
    many = torch.linspace(0.99, 0.0, 100)
    wrong = (torch.arange(100) < 55).float()
    assert confirmed_margin(many, torch.ones(100), wrong) == pytest.approx(0.5)  # ten bins, the sixth evenly split


def test_accuracy_counts_equal_scores_half_and_pairs_by_weight_and_label():
    gap, weight, probability = columns([0.5, -0.5, 0.0, 0.5], [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0])
    assert pairwise_accuracy(gap, weight, probability) == pytest.approx(2.5 / 4)
    assert pairwise_accuracy(gap, torch.tensor([3.0, 1.0, 0.0, 0.0]), probability) == pytest.approx(0.75)
    # of labels, ties are left out
    assert pairwise_accuracy(gap, weight, torch.tensor([0.7, 0.2, 1.0, 0.5])) == pytest.approx((0.7 + 0.8 + 0.5) / 3)
    assert _agreement(gap, 2.0, probability).tolist() == [2.0, -2.0, 0.0, 2.0]


# -- the fit --------------------------------------------------------------------------------------------------------


def labelled(
    one: Tensor, other: Tensor, reward: Tensor, against: Tensor, seed: int = 0, **more: Tensor
) -> EncodedPairs:
    """Label outputs by a Bradley-Terry reward, one prompt a pair."""
    uniform = torch.rand(len(one), generator=torch.Generator().manual_seed(seed))
    first = (uniform < torch.sigmoid(reward - against))[:, None]
    return EncodedPairs(torch.where(first, one, other), torch.where(first, other, one), group=torch.arange(len(one)))


def test_b_is_one_half_on_the_mean_of_the_reference():
    """A product of correlated coordinates has a mean of its own, which b must not show."""
    one, other = torch.randn(2, 300, 2, generator=torch.Generator().manual_seed(0))
    one, other = (torch.stack([y[:, 0], 0.9 * y[:, 0] + 0.4 * y[:, 1]], 1) for y in (one, other))
    pairs = labelled(one, other, 3 * one.prod(1), 3 * other.prod(1))
    head = WinHead(2, 0)
    found = head.fit(pairs, network=False)
    assert found.accuracy > 0.75
    b = torch.sigmoid(head(torch.cat([one, other]), None))
    assert float(b.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(b.std()) > 0.2


def test_pairs_of_little_weight_do_not_make_b_uncertain():
    y = torch.randn(120, 2, generator=torch.Generator().manual_seed(1))
    up = y + torch.tensor([2.0, 0.0])
    weight = torch.ones(120)
    weight[60:] = 1e-4
    turned = EncodedPairs(
        torch.cat([up[:60], y[60:]]), torch.cat([y[:60], up[60:]]), weight=weight, group=torch.arange(120)
    )
    evenly = EncodedPairs(turned.chosen, turned.rejected, group=torch.arange(120))
    heads = [WinHead(2, 0), WinHead(2, 0)]
    found = [head.fit(pairs, network=False) for head, pairs in zip(heads, (turned, evenly), strict=True)]
    assert found[0].accuracy > 0.95
    assert found[0].log_loss < 0.3
    assert found[1].log_loss > 0.6
    gaps = [torch.sigmoid(head(up, None)) - torch.sigmoid(head(y, None)) for head in heads]
    assert float(gaps[0].mean()) > 0.4
    assert abs(float(gaps[1].mean())) < 0.3


def test_the_margin_is_infinite_where_no_order_is_confirmed():
    one, other = torch.randn(2, 200, 3, generator=torch.Generator().manual_seed(2))
    told = labelled(one, other, 3 * one[:, 0], 3 * other[:, 0])
    margins = []
    for pairs in (told, told.shuffle_labels(0), told.select(torch.arange(4))):
        head = WinHead(3, 0)
        found = head.fit(pairs, network=False)
        margins.append(float(head.margin))
        assert (found.z > 1.645) == (head.margin < math.inf)
    assert margins[0] < 0.5
    assert margins[1:] == [math.inf, math.inf]


# -- the level of a context -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "slope"), [(0, 0.0), (1, 0.0), (2, 0.3), (3, 1.0), (4, 1.0), (5, 10.0)])
def test_a_contexts_level_is_predicted_and_judged_on_other_prompts(seed, slope):
    """Ridge regressions by hand, each fold by the others; the best of four penalties, or the mean if none is better."""
    generator = torch.Generator().manual_seed(seed)
    context, weight = torch.randn(20, 3, generator=generator), torch.rand(20, generator=generator) + 0.2
    reward = slope * context @ torch.tensor([1.0, -0.5, 0.0]) + torch.randn(20, generator=generator) + 2
    head, fold = WinHead(1, 3), torch.arange(20) % 5
    mean, spread = column_statistics(context, weight)
    head.context_mean.copy_(mean)
    head.context_spread.copy_(spread)
    level = head._fit_reference_reward(context, reward, weight, fold)

    share = (weight / weight.sum()).double()
    mean = float(share @ reward.double())
    x, left = ((context - head.context_mean) / head.context_spread).double(), reward.double() - mean

    def weights(rows: Tensor, ridge: float) -> Tensor:
        own = share[rows] / share[rows].sum()
        gram = (x[rows].T * own) @ x[rows] + ridge * torch.eye(3)
        return torch.linalg.solve(gram, (x[rows].T * own) @ left[rows])

    found = {math.inf: torch.zeros(20).double()}
    for ridge in CONTEXT_RIDGES:
        found[ridge] = torch.zeros(20).double()
        for number in range(5):
            found[ridge][fold == number] = x[fold == number] @ weights(fold != number, ridge)
    best = min(found, key=lambda ridge: float(share @ (left - found[ridge]).square()))
    assert best < math.inf or slope < 1
    torch.testing.assert_close(level, (found[best] + mean).float(), atol=1e-4, rtol=1e-4)
    expected = weights(torch.ones(20, dtype=torch.bool), best) if best < math.inf else torch.zeros(3)
    torch.testing.assert_close(head.context_weights, expected.float() / head.context_spread, atol=1e-4, rtol=1e-4)


def test_without_contexts_the_level_is_the_weighted_mean():
    head = WinHead(1, 0)
    reward, weight = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 1.0, 2.0])
    level = head._fit_reference_reward(None, reward, weight, torch.arange(3))
    assert level.tolist() == pytest.approx([2.75] * 3)


def test_the_level_is_taken_off_as_it_was_in_the_calibration(monkeypatch):
    """Rewards of left-out pairs have a weighted mean of their own, which the calibration did not see."""
    head, seen = WinHead(1, 0), {}

    def fit_platt(reward, label, weight):
        seen.update(reward=reward.view(2, -1), weight=weight.view(2, -1)[0])
        return 2.0, 0.25

    def level(context, reward, weight, fold):
        seen["both"] = reward
        return fit_level(context, reward, weight, fold)

    fit_level = head._fit_reference_reward
    monkeypatch.setattr(head, "_fit_reference_reward", level)
    monkeypatch.setattr(win, "fit_platt", fit_platt)
    one = torch.tensor([1.0, 2.0, 4.0, 8.0, 3.0, 1.0, 5.0, 9.0, 2.0, 6.0])[:, None]
    head.fit(EncodedPairs(one, one.flip(0) - 3, weight=torch.arange(1.0, 11.0)), network=False)
    both, weight = seen["both"].double(), seen["weight"].double()
    mean = float(weight @ both / weight.sum())
    assert min(abs(mean), abs(mean - float(both.mean()))) > 0.005
    torch.testing.assert_close(seen["reward"].mean(0), (both - mean).float())
    assert float(head.offset) == pytest.approx(0.25 - 2 * mean, abs=1e-5)


def test_a_head_is_told_as_json_values():
    head = WinHead(1, 0)
    one = torch.linspace(1, 2, 12)[:, None]
    found = head.fit(EncodedPairs(one, -one, group=torch.arange(12)), network=False)
    assert found.to_dict()["network_kept"] is False
    assert found.to_dict()["accuracy"] == found.accuracy == 1.0
    assert all(not isinstance(value, float) or math.isfinite(value) for value in found.to_dict().values())


# -- contexts and the network ---------------------------------------------------------------------------------------


def test_b_is_the_formula_of_its_parts():
    torch.manual_seed(0)
    y, context = torch.randn(5, 2), torch.randn(5, 3)
    head = WinHead(2, 3, hidden=4)
    head.coordinates.fit(torch.randn(50, 2) * 3 + 1, torch.ones(50))
    for name, value in {
        "weights": torch.tensor([0.5, -1.0]),
        "product_weights": torch.randn(head.coordinates.products),
        "context_mean": torch.tensor([1.0, 2.0, 3.0]),
        "context_weights": torch.tensor([0.3, -0.2, 0.1]),
        "context_spread": torch.tensor([2.0, 0.5, 1.0]),
        "slope": torch.tensor(1.5),
        "offset": torch.tensor(-0.25),
        "gain": torch.tensor(0.5),
    }.items():
        getattr(head, name).copy_(value)
    assert head.network is not None
    linear, products = head.coordinates(y)
    reward = linear @ head.weights + products @ head.product_weights
    level = (context - head.context_mean) @ head.context_weights
    inputs = torch.cat([head.coordinates.standardised(y), (context - head.context_mean) / head.context_spread], 1)
    wanted = -0.25 + 1.5 * (reward - level) + 0.5 * head.network(inputs)[:, 0]
    torch.testing.assert_close(head(y, context), wanted)
    head.drop_network()
    torch.testing.assert_close(head(y, context), -0.25 + 1.5 * (reward - level))


def turned(count: int, seed: int, *, informative: bool = True, context_scale: float = 1.0) -> EncodedPairs:
    """Prefer the larger of two numbers under one context, the smaller under the other: no reward of y alone knows."""
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, count, 1, generator=generator)
    sign = torch.where(torch.rand(count, 1, generator=generator) < 0.5, 1.0, -1.0)
    odds = 6 * sign * (one - other) if informative else torch.zeros(count, 1)
    first = torch.rand(count, 1, generator=generator) < torch.sigmoid(odds)
    return EncodedPairs(
        torch.where(first, one, other),
        torch.where(first, other, one),
        context_scale * sign + 5,
        group=torch.arange(count),
    )


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_network_is_kept_where_the_context_turns_the_preference(scale):
    head = WinHead(1, 1)
    found = head.fit(turned(1200, 0, context_scale=scale), seed=1)
    assert found.network_kept
    assert found.network_gain > 0.1
    assert found.accuracy > 0.8
    assert math.isfinite(float(head.margin))
    up, down = torch.full((2, 1), 5 + scale), torch.full((2, 1), 5 - scale)
    y = torch.tensor([[1.5], [-1.5]])
    high, low = torch.sigmoid(head(y, up)).tolist()
    assert high > 0.75
    assert low < 0.25
    low, high = torch.sigmoid(head(y, down)).tolist()
    assert high > 0.75
    assert low < 0.25


def test_a_network_is_dropped_where_labels_say_nothing():
    head = WinHead(1, 1)
    found = head.fit(turned(600, 0, informative=False), seed=1)
    assert (found.network_kept, found.network_gain, head.network) == (False, 0.0, None)
    assert float(head.margin) == math.inf


def test_of_few_prompts_no_network_is_tried():
    head = WinHead(1, 1)
    found = head.fit(turned(12, 0), seed=1)  # two or three are held out
    assert (found.network_kept, found.network_gain, head.network) == (False, 0.0, None)


@pytest.mark.parametrize(("after", "kept"), [(0.895, True), (0.885, False)])
def test_a_network_that_orders_worse_by_a_hundredth_is_dropped(monkeypatch, after, kept):
    """Figures of the order before and after are given; whether the labels confirm the network is found as ever."""
    orders = iter([0.9, after])
    monkeypatch.setattr(win, "pairwise_accuracy", lambda *pairs: next(orders, None) or pairwise_accuracy(*pairs))
    assert WinHead(1, 1).fit(turned(600, 0), seed=1).network_kept == kept


def test_of_many_pairs_a_random_sample_is_fitted(monkeypatch):
    """The first fifth of the rows contradicts the rest: a sample of the first rows would learn the opposite."""
    monkeypatch.setattr("pfm.flow.win.FIT_PAIRS", 200)
    one, other = torch.randn(2, 1000, 1, generator=torch.Generator().manual_seed(0))
    wrong = (torch.arange(1000) < 200)[:, None]
    first = (one > other) != wrong
    head = WinHead(1, 0)
    head.fit(EncodedPairs(torch.where(first, one, other), torch.where(first, other, one)), network=False)
    assert float(head(torch.ones(1, 1), None) - head(-torch.ones(1, 1), None)) > 0.5
    torch.manual_seed(5)  # which rows they are depends on the seed of the fit alone
    again = WinHead(1, 0)
    found = again.fit(EncodedPairs(torch.where(first, one, other), torch.where(first, other, one)), network=False)
    assert torch.equal(again.weights, head.weights)
    assert (found.network_kept, found.network_gain) == (False, 0.0)


def test_one_prompt_in_five_judges_the_network(monkeypatch):
    judging = []

    def noted(head, batch, logit, label, held_out, group, generator):
        judging.append((held_out, group))
        head.drop_network()
        return torch.zeros_like(logit), 0.0

    monkeypatch.setattr(WinHead, "_fit_network", noted)
    one, other = torch.randn(2, 40, 2, generator=torch.Generator().manual_seed(0))
    WinHead(2, 0).fit(EncodedPairs(one, other, group=torch.arange(40) // 2))
    [(held_out, group)] = judging
    assert float(held_out.float().mean()) == pytest.approx(0.2)
    assert not set(group[held_out].tolist()) & set(group[~held_out].tolist())
