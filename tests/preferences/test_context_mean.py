"""The mean of a number given a context: its formula, and what it finds where there is something and where not."""

import math

import pytest
import torch

from pfm.preferences import context_mean
from pfm.preferences.context_mean import BANDWIDTHS, SHRINKAGES, ContextMean


def fitted(context: torch.Tensor, value: torch.Tensor, weight: torch.Tensor | None = None, seed: int = 0):
    """Fit on rows that are prompts of their own; give the estimator and its estimates there."""
    mean = ContextMean(context.shape[1])
    weight = torch.ones(len(value)) if weight is None else weight
    there = mean.fit(context, value, weight, torch.arange(len(value)), torch.Generator().manual_seed(seed))
    torch.testing.assert_close(mean(context), there)
    return mean, there


def test_the_estimate_is_the_formula_of_its_parts():
    mean = ContextMean(2, 3)
    mean.centre.copy_(torch.tensor([1.0, -1.0]))
    mean.spread.copy_(torch.tensor([2.0, 0.5]))
    mean.slope.copy_(torch.tensor([0.3, -0.2]))
    mean.offset.fill_(0.7)
    mean.anchors.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]))
    mean.sums.copy_(torch.tensor([3.0, -1.0, 2.0]))
    mean.counts.copy_(torch.tensor([4.0, 1.0, 2.0]))
    mean.width.fill_(0.5)
    context = torch.tensor([[1.0, -1.0], [3.0, -0.5]])  # (0, 0) and (1, 1) in units of the spread
    linear = torch.tensor([0.7, 0.7 + 0.3 - 0.2])
    torch.testing.assert_close(mean(context), linear)  # shrinkage is infinite: no neighbour counts
    mean.shrinkage.fill_(2.0)
    near = torch.exp(-torch.tensor([[0.0, 1.0, 4.0], [2.0, 1.0, 2.0]]))  # squared distances over twice the width
    expected = linear + near @ mean.sums / (near @ mean.counts + 2.0)
    torch.testing.assert_close(mean(context), expected)
    anchors = mean.anchors * mean.spread + mean.centre
    torch.testing.assert_close(mean.nearness(context, anchors), near)
    assert ContextMean(2)(context).tolist() == [0.0, 0.0]
    assert set(mean.state_dict()) == {
        "centre", "spread", "slope", "offset", "anchors", "sums", "counts", "width", "shrinkage"
    }  # fmt: skip


def test_where_nothing_depends_on_the_context_the_mean_remains():
    generator = torch.Generator().manual_seed(1)
    context, weight = torch.randn(60, 3, generator=generator), torch.rand(60, generator=generator) + 0.1
    mean, there = fitted(context, torch.full((60,), 0.5), weight)
    torch.testing.assert_close(there, torch.full((60,), 0.5))
    assert math.isinf(float(mean.shrinkage))
    x = (context - mean.centre) / mean.spread
    distance = 2 * float((x.square().sum(1) * weight).sum() / weight.sum())
    assert float(mean.width) == pytest.approx(BANDWIDTHS[0] * distance, rel=1e-5)
    value = torch.randn(60, generator=generator)
    assert float(fitted(context, value, weight)[0].offset) == pytest.approx(float(value @ weight / weight.sum()))


def test_a_linear_dependence_is_found_without_neighbours():
    context = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0])
    value = 0.5 + context @ torch.tensor([1.0, 0.01])
    mean, there = fitted(context, value)
    torch.testing.assert_close(there, value, atol=0.02, rtol=0)
    torch.testing.assert_close(mean(2 * context), 2 * value - 0.5, atol=0.05, rtol=0)


def test_what_contexts_of_many_rows_show_beyond_a_line_is_shrunk_to_it():
    place = torch.tensor([-1.0, 0.0, 1.0]).repeat(40)
    level = torch.where(place == 0, -2.0, 1.0)  # of mean 0 and without slope
    noise = 0.1 * torch.randn(120, generator=torch.Generator().manual_seed(0))
    mean, there = fitted(place[:, None], level + noise)
    assert float(mean.shrinkage) == SHRINKAGES[0]
    shares = 40 / (40 + SHRINKAGES[0])
    torch.testing.assert_close(there, level * shares, atol=0.05, rtol=0)
    # Between the contexts that were seen nothing is near, and the line remains.
    assert float(mean(torch.tensor([[0.5]]))) == pytest.approx(0, abs=0.1)
    torch.testing.assert_close(mean.counts, torch.full((3,), 40.0))


def test_a_row_takes_no_part_in_its_own_estimate():
    """Contexts that are all different: by its own value every row would be estimated best, and noise found in them."""
    generator = torch.Generator().manual_seed(3)
    mean, _ = fitted(1e3 * torch.eye(80), torch.randn(80, generator=generator))
    assert math.isinf(float(mean.shrinkage))


def test_of_many_contexts_some_are_kept_with_their_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(context_mean, "ANCHORS", 2)
    place = torch.tensor([-1.0, 0.0, 1.0]).repeat(40)
    level = torch.where(place == 0, -2.0, 1.0)
    mean, there = fitted(place[:, None], level)
    assert mean.anchors.shape == (2, 1)
    assert mean.counts.tolist() == [40.0, 40.0]
    kept = (mean.anchors * mean.spread + mean.centre).flatten().round().tolist()
    for context, sums in zip(kept, mean.sums.tolist(), strict=True):
        assert sums == pytest.approx(40 * (-2.0 if context == 0 else 1.0), rel=1e-4)
    known = torch.tensor([value in kept for value in place.tolist()])
    torch.testing.assert_close(there[known], level[known] * 40 / (40 + float(mean.shrinkage)), atol=0.05, rtol=0)
    assert float(there[~known].abs().max()) < 0.05


@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_distances_by_a_product_are_those_of_differences(spread):
    """Contexts far from zero and a millionth of that apart: a product in float32 loses their distances altogether."""
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)) * spread + 100 * spread
    other = torch.cat([x[:10] + 1e-4 * spread, x[10:]])
    exact = (x.double()[:, None] - other.double()).square().sum(2)
    torch.testing.assert_close(context_mean.squared_distances(x, other).double(), exact, rtol=1e-5, atol=0)


def test_rows_in_pieces_are_the_same_rows(monkeypatch: pytest.MonkeyPatch):
    place = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).repeat(6, 1)
    mean, there = fitted(place, place[:, 0].sign())
    assert not math.isinf(float(mean.shrinkage))
    monkeypatch.setattr(context_mean, "ROWS", 7)
    torch.testing.assert_close(mean(place), there, rtol=0, atol=1e-6)
    assert mean(place[:0]).shape == (0,)
