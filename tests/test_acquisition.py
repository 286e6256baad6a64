"""What a label is worth: the posterior against quadrature, values against brute force, choices against chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.linear_pairs import labelled

from pfm import EncodedPairs
from pfm.acquisition import CRITERIA, Beliefs, LaplacePosterior, _expectations, choose_pairs, ensemble_beliefs
from pfm.preferences import BradleyTerry


def exact(pairs: EncodedPairs, precision: float, scale: float, low: float = -12, high: float = 12, nodes: int = 200):
    """Integrate the posterior of one or two weights on a grid: mean, covariance, log evidence."""
    rows = ((pairs.chosen - pairs.rejected).double() / scale).numpy()
    axis = np.linspace(low, high, nodes)
    grid = np.stack(np.meshgrid(*[axis] * rows.shape[1], indexing="ij"), -1).reshape(-1, rows.shape[1])
    score = grid @ rows.T
    log = -np.logaddexp(0, -score).sum(1) - precision / 2 * (grid**2).sum(1)
    log += rows.shape[1] / 2 * math.log(precision / (2 * math.pi))
    cell = (axis[1] - axis[0]) ** rows.shape[1]
    evidence = log.max() + math.log(np.exp(log - log.max()).sum() * cell)
    share = np.exp(log - log.max())
    share /= share.sum()
    mean = share @ grid
    return mean, (grid - mean).T @ ((grid - mean) * share[:, None]), evidence, grid, share


@pytest.mark.parametrize("dimension", [1, 2])
@pytest.mark.parametrize("count", [200, 12])
def test_the_posterior_is_the_exact_one(dimension: int, count: int) -> None:
    pairs, _ = labelled(count, dimension, seed=3, weights=torch.tensor([1.0, -0.7])[:dimension])
    model = LaplacePosterior(precision=1.0).fit(pairs)
    mean, covariance, evidence, grid, share = exact(pairs, 1.0, model._scale)
    # The Gaussian's error falls as the labels grow.
    many = count == 200
    spread = np.sqrt(np.diag(covariance))
    weights = (model.weights * model._scale).numpy()
    assert np.abs((weights - mean) / spread).max() < (0.15 if many else 0.25)
    found = (model.covariance * model._scale**2).numpy()
    assert np.abs(found / covariance - 1).max() < (0.04 if many else 0.2)
    assert model.evidence == pytest.approx(evidence, abs=0.02 if many else 0.06)
    # What is expected of a new pair, mean probability and information, against the same grid.
    y, other = (torch.randn(5, dimension, generator=torch.Generator().manual_seed(9)) for _ in range(2))
    p = 1 / (1 + np.exp(-grid @ ((y - other).double() / model._scale).numpy().T))
    entropy = -(p * np.log(p) + (1 - p) * np.log1p(-p))
    average = share @ p
    information = -(average * np.log(average) + (1 - average) * np.log1p(-average)) - share @ entropy
    beliefs = model.beliefs(y, other)
    found, entropies, fisher = (part.numpy() for part in _expectations(beliefs.mean, beliefs.variance))
    np.testing.assert_allclose(found, average, atol=0.01 if many else 0.05)
    np.testing.assert_allclose(fisher, share @ (p * (1 - p)), atol=0.01 if many else 0.05)
    told = -(found * np.log(found) + (1 - found) * np.log1p(-found)) - entropies
    np.testing.assert_allclose(told, information, rtol=0.1 if many else 0.5, atol=1e-3)


def test_expectations_are_those_of_many_draws() -> None:
    mean = torch.tensor([0.0, 1.5, -3.0, 8.0], dtype=torch.float64)
    variance = torch.tensor([0.0, 0.3, 16.0, 100.0], dtype=torch.float64)
    draws = mean + variance.sqrt() * torch.randn(
        400_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    p = torch.sigmoid(draws)
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    for found, drawn in zip(_expectations(mean, variance), (p, entropy, p * (1 - p)), strict=True):
        torch.testing.assert_close(found, drawn.mean(0), atol=5e-3, rtol=0)


def test_fewer_labels_than_dimensions_give_the_same_posterior() -> None:
    """In the span of few differences, or with the dimensions in the way: the same numbers."""
    pairs, _ = labelled(10, 25)
    model = LaplacePosterior(precision=2.0).fit(pairs)
    rows = (pairs.chosen - pairs.rejected).double() / model._scale
    w = model.weights * model._scale
    p = torch.sigmoid(rows @ w)
    gradient = rows.T @ (p - 1) + 2.0 * w
    assert float(gradient.abs().max()) < 1e-5
    hessian = (rows * (p * (1 - p))[:, None]).T @ rows + 2.0 * torch.eye(25, dtype=torch.float64)
    torch.testing.assert_close(model.covariance * model._scale**2, torch.linalg.inv(hessian), atol=1e-8, rtol=1e-6)


def test_the_evidence_knows_noise_from_signal() -> None:
    strong, _ = labelled(300, 4, weights=torch.full((4,), 3.0))
    noise = strong.shuffle_labels(1)
    assert LaplacePosterior().fit(noise).precision > 10 * LaplacePosterior().fit(strong).precision


def test_values_are_what_the_definitions_say() -> None:
    pairs, _ = labelled(30, 3)
    model = LaplacePosterior(precision=1.0).fit(pairs)
    pool, _ = labelled(40, 3, seed=5)
    beliefs = model.beliefs(pool.chosen, pool.rejected)
    draws = (
        beliefs.mean
        + torch.randn(100_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ beliefs.factor.T
    )
    p = torch.sigmoid(draws)
    average = p.mean(0)
    entropy = torch.special.entr(average) + torch.special.entr(1 - average)
    told = entropy - (torch.special.entr(p) + torch.special.entr(1 - p)).mean(0)
    fisher = (p * (1 - p)).mean(0)
    covariance = beliefs.factor @ beliefs.factor.T
    # The variance that is left of all after a label of precision f on one, by the formula of Sherman and Morrison.
    shrunk = torch.stack(
        [(covariance[:, i] ** 2).sum() * fisher[i] / (1 + fisher[i] * covariance[i, i]) for i in range(40)]
    )
    expected = {"information": told, "win": shrunk, "disagreement": p.var(0), "uncertainty": entropy}
    for by, value in expected.items():
        choice = choose_pairs(pool, 1, by=by, model=model)
        best = int(value.argmax())
        assert float(choice.value[0]) == pytest.approx(float(value[best]), rel=0.04)
        assert float(value[choice.index[0]]) == pytest.approx(float(value[best]), rel=0.04)


@pytest.mark.parametrize("by", ["information", "win"])
def test_a_batch_is_worth_what_each_pair_adds(by: str) -> None:
    """The kept-up values equal those of beliefs updated from scratch after every choice."""
    pairs, _ = labelled(20, 4)
    model = LaplacePosterior(precision=1.0).fit(pairs)
    pool, _ = labelled(30, 4, seed=5)
    choice = choose_pairs(pool, 6, by=by, model=model, most_similar=1.0)
    beliefs = model.beliefs(pool.chosen, pool.rejected)
    covariance = beliefs.factor @ beliefs.factor.T
    taken: list[int] = []
    for place, value in zip(choice.index.tolist(), choice.value.tolist(), strict=True):
        variance = covariance.diagonal()
        p, entropy, fisher = _expectations(beliefs.mean, variance)
        if by == "win":
            worth = covariance.square().sum(0) * fisher / (1 + fisher * variance)
        else:
            worth = torch.special.entr(p) + torch.special.entr(1 - p) - entropy
        worth[taken] = -1
        assert value == pytest.approx(float(worth.max()), rel=1e-6)
        assert float(worth[place]) == pytest.approx(float(worth.max()), rel=1e-6)
        column = covariance[:, place]
        covariance = covariance - torch.outer(column, column) * fisher[place] / (1 + fisher[place] * variance[place])
        taken.append(place)


@pytest.mark.parametrize("by", CRITERIA)
def test_no_near_duplicates_in_a_batch(by: str) -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(6, 8, generator=generator)
    y = kinds.repeat(20, 1) + 0.001 * torch.randn(120, 8, generator=generator)
    choice = choose_pairs((y, torch.zeros_like(y)), 6, by=by)
    assert len(set(choice.index.tolist())) == 6
    if by != "random":
        assert {int(place) % 6 for place in choice.index} == set(range(6))
    every = choose_pairs((y, torch.zeros_like(y)), 120, by=by)  # when nothing else is left, the rest comes too
    assert sorted(every.index.tolist()) == list(range(120))


def test_the_order_of_two_outputs_does_not_matter() -> None:
    pairs, _ = labelled(40, 5)
    pool, _ = labelled(60, 5, seed=4)
    for by in CRITERIA:
        one, two = (choose_pairs(part, 5, by=by, labelled=pairs) for part in (pool, pool.swap()))
        assert torch.equal(one.index, two.index)
        torch.testing.assert_close(one.probability, 1 - two.probability, atol=1e-5, rtol=0)


def test_an_ensemble_asks_where_its_members_disagree() -> None:
    """Members know the first coordinate; of the second they know nothing."""
    pairs, _ = labelled(400, 2, weights=torch.tensor([2.0, 0.0]))
    members = []
    for seed, sign in enumerate((1.0, -1.0, 1.0, -1.0)):
        part = pairs.select(torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:200])
        chosen, rejected = part.chosen.clone(), part.rejected.clone()
        chosen[:, 1], rejected[:, 1] = sign, 0.0  # each has been told another tale of it
        members.append(BradleyTerry().fit(EncodedPairs(chosen, rejected)))
    y = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    beliefs = ensemble_beliefs(members, y, torch.zeros_like(y))
    assert beliefs.variance.argmax() == 1
    for by in ("information", "disagreement", "win"):
        assert choose_pairs((y, torch.zeros_like(y)), 1, by=by, model=members).index.tolist() == [1]


def test_it_learns_from_fewer_labels_than_chance() -> None:
    """A pool that mostly repeats one direction: choosing must find the rest; shuffled labels teach nothing."""

    def error(by: str, seed: int, shuffled: bool = False) -> float:
        generator = torch.Generator().manual_seed(seed)
        truth = torch.randn(10, generator=generator) * 2
        spread = torch.full((500, 10), 0.02)
        spread[:, 0] = 1.0
        spread[:30] = 1.0
        y, other = spread * torch.randn(500, 10, generator=generator), torch.zeros(500, 10)
        first = torch.rand(500, generator=generator) < torch.sigmoid(y @ truth)
        if shuffled:
            first = first[torch.randperm(500, generator=generator)]
        known: list[int] = []
        labels = None
        for _ in range(4):
            left = torch.tensor([place for place in range(500) if place not in set(known)])
            pick = choose_pairs((y[left], other[left]), 10, by=by, labelled=labels, seed=seed).index
            known += left[pick].tolist()
            at = first[known][:, None]
            labels = EncodedPairs(torch.where(at, y[known], other[known]), torch.where(at, other[known], y[known]))
        test = torch.randn(2000, 10, generator=generator)
        model = LaplacePosterior().fit(labels)
        return float(((model.reward(test) > 0) != (test @ truth > 0)).float().mean())

    seeds = range(5)
    chosen, chance, noise = (
        np.array([error(by, seed, shuffled) for seed in seeds])
        for by, shuffled in (("information", False), ("random", False), ("information", True))
    )
    gain = chance - chosen
    assert gain.mean() - 2 * gain.std(ddof=1) / math.sqrt(len(gain)) > 0.03
    assert abs(noise.mean() - 0.5) < 0.1


def test_what_cannot_be_meant_is_refused() -> None:
    pool, _ = labelled(10, 3)
    for options, message in (
        ({"by": "bald"}, "by must be one of information"),
        ({"count": 11}, "whole number from 1 to 10"),
        ({"count": 0}, "whole number from 1 to 10"),
        ({"most_similar": 0.0}, "most_similar must lie in"),
        ({"model": [BradleyTerry().fit(pool)]}, "at least two models"),
        ({"labelled": labelled(5, 4)[0]}, "outputs of 3 values"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_pairs(pool, **{"count": 2, **options})
    with pytest.raises(ValueError, match="chosen must be finite"):
        choose_pairs((torch.full((3, 2), math.nan), torch.zeros(3, 2)), 1)
    with pytest.raises(TypeError, match="candidates must be EncodedPairs"):
        choose_pairs(torch.zeros(3, 2), 1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="precision must be a positive number"):
        LaplacePosterior(precision=0)
    with pytest.raises(RuntimeError, match="not fitted"):
        LaplacePosterior().reward(torch.zeros(2, 2))
    assert Beliefs(torch.zeros(2), torch.ones(2, 3)).variance.tolist() == [3.0, 3.0]


def test_beliefs_of_models_have_the_mean_and_variance_of_their_scores() -> None:
    models = [BradleyTerry(10.0**-power).fit(labelled(60, 2, seed=power)[0]) for power in range(1, 5)]
    y, other = torch.randn(2, 10, 2, generator=torch.Generator().manual_seed(0))
    scores = torch.stack([model.score(y, other) for model in models]).double()
    found = ensemble_beliefs(models, y, other)
    torch.testing.assert_close(found.mean, scores.mean(0))
    torch.testing.assert_close(found.variance, scores.var(0))  # unbiased: of n - 1
    torch.testing.assert_close(found.factor @ found.factor.T, torch.cov(scores.T))
