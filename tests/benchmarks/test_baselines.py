"""Movers without a likelihood against their closed forms, each beside the control that must fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from benchmarks.baselines.networks import Network, fit_early_stopped, pair_loss
from benchmarks.baselines.rewards import NetworkReward
from benchmarks.core.bench import Bench
from benchmarks.core.config import AscentConfig, BestOfConfig, RegressionConfig, ShiftConfig
from benchmarks.laws.laws import Law, Mover
from benchmarks.methods.ascent import Ascent, OffData, climb, log_win
from benchmarks.methods.best_of import BestOf
from benchmarks.methods.regression import Regression, fit_ridge
from benchmarks.methods.shift import Shift
from pfm import EncodedPairs

BENCH = Bench("surface", "truncate", 0, False)
NAMED: dict[str, Any] = {"name": "x", "family": "x", "label": "x"}


@dataclass(frozen=True)
class Unit(Law):
    """U(0, 1), of which the larger number always wins."""

    name: str = "unit"
    dimension: int = 1
    context_dimension: int = 0
    box: tuple[float, float] = (0.0, 1.0)

    def reference(self, context: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, self.dimension, generator=generator)

    def log_density(self, y: Tensor, context: Tensor | None) -> Tensor:
        return torch.where(self.supported(y, context), 0.0, -torch.inf)

    def preference(self, y: Tensor, other: Tensor, context: Tensor | None) -> Tensor:
        return (0.5 * (1 + torch.sign(y - other)))[:, 0]

    def supported(self, y: Tensor, context: Tensor | None) -> Tensor:
        return ((y >= 0) & (y <= 1)).all(1)

    def reward(self, y: Tensor, context: Tensor | None) -> Tensor | None:
        return y[:, 0]


@dataclass(frozen=True)
class Circle(Unit):
    """A blurred circle of radius 1 on the plane; Bradley–Terry, the context (a unit vector) being the best direction.

    ``cyclic`` in its place: an output beats what lies up to half a turn behind it, and no reward can say so.
    """

    name: str = "circle"
    dimension: int = 2
    context_dimension: int = 2
    box: tuple[float, float] = (-1.5, 1.5)
    cyclic: bool = False

    def contexts(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(count, 2, generator=generator), dim=1)

    def reference(self, context: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        angle = torch.nn.functional.normalize(torch.randn(count, 2, generator=generator), dim=1)
        return angle * (1 + 0.05 * torch.randn(count, 1, generator=generator))

    def preference(self, y: Tensor, other: Tensor, context: Tensor | None) -> Tensor:
        if self.cyclic:
            turn = torch.atan2(y[:, 1], y[:, 0]) - torch.atan2(other[:, 1], other[:, 0])
            return 0.5 + 0.5 * torch.sin(turn)
        reward, rival = self.reward(y, context), self.reward(other, context)
        assert reward is not None
        assert rival is not None
        return torch.sigmoid(reward - rival)

    def supported(self, y: Tensor, context: Tensor | None) -> Tensor:
        return (y.norm(dim=1) - 1).abs() < 0.2

    def reward(self, y: Tensor, context: Tensor | None) -> Tensor | None:
        if self.cyclic:
            return None
        assert context is not None
        return 3 * (torch.nn.functional.normalize(y, dim=1) * context).sum(1)


UNIT, CIRCLE = Unit(), Circle()


@cache
def votes(law: Law, count: int = 8000) -> EncodedPairs:
    # Another seed than shuffle_labels(1) takes: one stream of numbers would be draws and coins at once.
    return law.pairs(count, torch.Generator().manual_seed(0))


def moved(
    mover: Any, law: Law, pairs: EncodedPairs, count: int = 20_000
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """Give draws, what becomes of them, their contexts, and what the method noted."""
    assert isinstance(mover, Mover)
    notes = mover.learn(law, pairs, BENCH)
    generator = torch.Generator().manual_seed(1)
    context = law.contexts(count, generator)
    y = law.reference(context, count, generator)
    after = mover.move(y, context, generator)
    assert after.shape == y.shape
    assert not after.requires_grad
    return y, after, context, notes


def gain(mover: Any, pairs: EncodedPairs) -> float:
    y, after, context, _ = moved(mover, CIRCLE, pairs, 4000)
    before, reward = CIRCLE.reward(y, context), CIRCLE.reward(after, context)
    assert before is not None
    assert reward is not None
    return float((reward - before).mean())


# -- mean shift -------------------------------------------------------------------------------------------------


def test_the_shift_is_a_third_of_the_line_from_losers_and_a_sixth_from_the_reference():
    for source, length in (("rejected", 1 / 3), ("reference", 1 / 6)):
        y, after, _, _ = moved(Shift(ShiftConfig(**NAMED, source=source)), UNIT, votes(UNIT))
        torch.testing.assert_close(after - y, torch.full_like(y, float((after - y)[0])))
        assert float((after - y).mean()) == pytest.approx(length, abs=0.01)
    # From the reference the mean of best of two, 2/3, is met: E[y1 - y0] with y0 a fair coin's pick.
    pairs, coin = votes(UNIT), torch.rand(8000, 1, generator=torch.Generator().manual_seed(2)) < 0.5
    picked = torch.where(coin, pairs.chosen, pairs.rejected)
    assert float((pairs.chosen - picked).mean()) == pytest.approx(float((after - y).mean()), abs=0.01)
    half = Shift(ShiftConfig(**NAMED, strength=0.5))
    assert torch.equal(
        moved(half, UNIT, pairs)[1], moved(Shift(ShiftConfig(**NAMED, source="reference")), UNIT, pairs)[1]
    )


def test_the_shift_mirrors_swapped_votes_and_stands_still_for_shuffled_ones():
    there, back, nowhere = (
        float((after - y).mean())
        for y, after, _, _ in (
            moved(Shift(ShiftConfig(**NAMED)), UNIT, pairs)
            for pairs in (votes(UNIT), votes(UNIT).swap(), votes(UNIT).shuffle_labels(1))
        )
    )
    assert back == pytest.approx(-there, abs=1e-6)
    assert abs(nowhere) < 0.02


# -- regression -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["ridge", "network"])
def test_regression_gives_the_mean_of_what_beats_the_draw_and_halves_the_spread(model: str):
    y, after, _, _ = moved(Regression(RegressionConfig(**NAMED, model=model)), UNIT, votes(UNIT))
    assert float((after - (1 + y) / 2).abs().mean()) < 0.015
    assert float(after.std() / y.std()) == pytest.approx(0.5, abs=0.05)
    y, after, _, _ = moved(Regression(RegressionConfig(**NAMED, model=model)), UNIT, votes(UNIT).swap())
    assert float((after - y / 2).abs().mean()) < 0.015
    # What was chosen by a coin says nothing of what was not: the mean of all.
    _, after, _, _ = moved(Regression(RegressionConfig(**NAMED, model=model)), UNIT, votes(UNIT).shuffle_labels(1))
    assert float((after - 0.5).abs().max()) < 0.1


def test_regression_collapses_a_circle_into_its_inside():
    _, after, context, _ = moved(Regression(RegressionConfig(**NAMED)), CIRCLE, votes(CIRCLE))
    assert context is not None
    assert float((after * context).sum(1).mean()) > 0.2  # the right way
    assert float(CIRCLE.supported(after, context).float().mean()) < 0.2  # and into the void


def test_a_soft_label_counts_as_both_pairs_and_a_ridge_takes_weights():
    pairs = votes(UNIT, 400)
    soft = EncodedPairs(pairs.chosen, pairs.rejected, probability=torch.full((400,), 0.75))
    both = EncodedPairs(
        torch.cat([pairs.chosen, pairs.rejected]),
        torch.cat([pairs.rejected, pairs.chosen]),
        weight=torch.cat([torch.full((400,), 0.75), torch.full((400,), 0.25)]),
    )
    y = torch.linspace(0, 1, 5)[:, None]
    torch.testing.assert_close(fit_ridge(soft, 0)[0](y, None), fit_ridge(both, 0)[0](y, None), atol=2e-3, rtol=0)


# -- rewards and ascent -----------------------------------------------------------------------------------------


def test_a_network_reward_recovers_what_no_line_can_and_shuffled_votes_leave_it_flat():
    generator = torch.Generator().manual_seed(3)
    context = CIRCLE.contexts(2000, generator)
    y, other = (CIRCLE.reference(context, 2000, generator) for _ in range(2))
    truth = cast(Tensor, CIRCLE.reward(y, context)) - cast(Tensor, CIRCLE.reward(other, context))
    found = []
    for pairs in (votes(CIRCLE), votes(CIRCLE).shuffle_labels(1)):
        model = NetworkReward()
        fit = model.fit(pairs)
        assert fit.confirmed == (pairs is votes(CIRCLE))
        with torch.no_grad():
            found.append(model.reward(y, context) - model.reward(other, context))
    assert float(torch.corrcoef(torch.stack([found[0], truth]))[0, 1]) > 0.95
    assert float(found[0].std() / truth.std()) == pytest.approx(1, abs=0.25)
    assert float(found[1].std() / truth.std()) < 0.1
    with pytest.raises(RuntimeError, match="not fitted"):
        NetworkReward().reward(y)


def test_climbing_follows_the_gradient_of_a_known_hill():
    start = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    path = climb(lambda y, context: -y.square().sum(1) / 2, start, None, 0.1, 5)
    assert len(path) == 5
    for number, y in enumerate(path, 1):
        torch.testing.assert_close(y, start * 0.9**number)


def test_fresh_draws_are_off_the_data_once_in_a_hundred_and_the_void_always():
    generator = torch.Generator().manual_seed(0)
    draws = CIRCLE.reference(None, 9000, generator)
    off = OffData(draws[:4000], draws[4000:6000])
    assert off.share(draws[6000:]) == pytest.approx(0.01, abs=0.007)
    assert off.share(torch.zeros(10, 2)) == 1.0
    assert off.share(2 * draws[:100]) == 1.0


@pytest.mark.parametrize("reward", ["win", "network"])
def test_ascent_gains_within_its_support_and_shuffled_votes_move_nothing(reward: str):
    config = AscentConfig(**NAMED, reward=reward)
    mover = Ascent(config)
    y, after, context, notes = moved(mover, CIRCLE, votes(CIRCLE, 1500), 2000)
    assert context is not None
    assert notes["off_data"] <= config.off_support
    assert mover.evaluations == notes["steps"] > 0
    assert float(((after - y) * context).sum(1).mean()) > 0.04
    # The chosen settings are the judge's best among those on the data.
    allowed = [each for each in notes["tried"] if each["off_data"] <= config.off_support]
    best = max(allowed, key=lambda each: each["rated"])
    assert (best["size"], best["steps"]) == (notes["size"], notes["steps"])
    # The longest climbs leave the circle: without the rule this would be what the model likes best.
    assert max(each["off_data"] for each in notes["tried"]) > 0.3
    if reward == "win":  # of shuffled votes it is a coin's, as the next test finds
        return
    y, after, context, _ = moved(Ascent(config), CIRCLE, votes(CIRCLE, 1500).shuffle_labels(1), 2000)
    assert context is not None
    assert abs(float(((after - y) * context).sum(1).mean())) < 0.01


def test_the_slope_of_log_b_is_that_of_its_differences_and_a_coin_has_none():
    pairs, y = votes(CIRCLE, 500), torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.6, 0.8]])
    context = torch.eye(2)[[0, 0, 1]]
    rating = log_win(pairs, 0)
    step = climb(rating, y, context, 1.0, 1)[0] - y
    along = torch.tensor([0.0, 1e-2])
    numeric = (rating(y + along, context) - rating(y - along, context)) / 2e-2
    assert float(step.abs().max()) > 0.1
    torch.testing.assert_close(step[:, 1], numeric.detach(), atol=0.02, rtol=0.02)
    coin = log_win(pairs.shuffle_labels(1), 0)
    assert torch.equal(climb(coin, y, context, 1.0, 1)[0], y)
    torch.testing.assert_close(coin(y, context).exp().detach(), torch.full((3,), 0.5))


# -- selection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("by", "candidates"), [("oracle", 2), ("oracle", 8), ("bradley_terry", 4)])
def test_best_of_n_has_the_law_of_the_largest_of_n(by: str, candidates: int):
    mover = BestOf(BestOfConfig(**NAMED, by=by, candidates=candidates))
    y, after, _, _ = moved(mover, UNIT, votes(UNIT, 1000))
    assert mover.draws == candidates
    assert float(after.mean()) == pytest.approx(candidates / (candidates + 1), abs=0.01)
    # Distribution function u^n, at its median.
    assert float((after < 0.5 ** (1 / candidates)).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert bool((after >= y).all())
    assert list(mover.stages(y[:10], None, torch.Generator())) == [round(math.log2(candidates))]


def test_resampling_by_b_reaches_best_of_two_as_candidates_grow():
    mover = BestOf(BestOfConfig(**NAMED, by="win", rule="resample", candidates=32))
    y, after, _, _ = moved(mover, UNIT, votes(UNIT, 1500), 10_000)
    law = {32: after[:, 0].sort().values}
    mover.draws = 2
    law[2] = mover.move(y, None, torch.Generator().manual_seed(2))[:, 0].sort().values
    assert list(mover.stages(y[:10], None, torch.Generator())) == [1]
    exact = ((torch.arange(10_000) + 0.5) / 10_000).sqrt()
    few, many = (float((law[n] - exact).abs().mean()) for n in (2, 32))
    assert many < 0.02
    assert few > 2 * many


def test_without_a_reward_the_oracle_takes_the_winner_of_a_round_robin():
    cyclic = Circle(cyclic=True, context_dimension=0)
    mover = BestOf(BestOfConfig(**NAMED, by="oracle", candidates=4))
    mover.learn(cyclic, votes(CIRCLE, 100), BENCH)
    generator = torch.Generator().manual_seed(0)
    candidates = torch.stack([cyclic.reference(None, 500, generator) for _ in range(4)], dim=1)
    wins = mover._oracle(candidates, None)
    torch.testing.assert_close(wins.sum(1), torch.full((500,), 8.0))  # 16 meetings, each worth 1/2 to either side
    first = sum(cyclic.preference(candidates[:, 0], candidates[:, place], None) for place in range(4))
    torch.testing.assert_close(wins[:, 0], first)


def test_selection_by_context_gains_and_its_controls_do_not():
    def mover() -> BestOf:
        return BestOf(BestOfConfig(**NAMED, by="network", candidates=4))

    given = gain(mover(), votes(CIRCLE))
    assert given > 1.5
    assert gain(mover(), votes(CIRCLE).swap()) == pytest.approx(-given, abs=0.2)
    assert abs(gain(mover(), votes(CIRCLE).shuffle_labels(1))) < 0.1
    oracle = gain(BestOf(BestOfConfig(**NAMED, by="oracle", candidates=4)), votes(CIRCLE))
    assert oracle + 0.05 > given > 0.9 * oracle
    # One line for all contexts has nothing to say.
    assert abs(gain(BestOf(BestOfConfig(**NAMED, candidates=4)), votes(CIRCLE))) < 0.15


# -- training ---------------------------------------------------------------------------------------------------


def test_early_stopping_keeps_the_weights_that_held_out_pairs_like_best_and_repeats_itself():
    pairs = votes(UNIT, 300)
    fits = []
    for labels in (pairs, pairs, pairs.shuffle_labels(1)):
        network = Network(1, 0).standardise(labels)
        batch = labels.gather(torch.arange(300))

        def loss(index: Tensor, network: Network = network, batch: Any = batch) -> Tensor:
            margin = (network(batch.chosen[index], None) - network(batch.rejected[index], None)).squeeze(-1)
            return pair_loss(lambda m: torch.nn.functional.softplus(-m), margin, batch.probability[index])

        fits.append(fit_early_stopped(network, loss, labels, seed=0, updates=150))
        held = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:30]
        kept = fits[-1].held_out if fits[-1].confirmed else math.log(2)
        assert float(loss(held).mean().detach()) == pytest.approx(kept, abs=1e-6)
    assert fits[0] == fits[1]
    assert fits[0].confirmed
    assert fits[0].held_out < 0.3 < math.log(2) - 0.1 < fits[2].held_out + 0.2
    assert not fits[2].confirmed


# -- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Shift(ShiftConfig(**NAMED, source="chosen")), "method.source must be"),
        (lambda: Regression(RegressionConfig(**NAMED, model="forest")), "method.model must be"),
        (lambda: Ascent(AscentConfig(**NAMED, reward="oracle")), "method.reward must be"),
        (lambda: BestOf(BestOfConfig(**NAMED, by="judge")), "method.by must be"),
        (lambda: BestOf(BestOfConfig(**NAMED, rule="worst")), "method.rule must be"),
        (lambda: BestOf(BestOfConfig(**NAMED, by="network", rule="resample")), "needs method.by='win'"),
        (lambda: BestOf(BestOfConfig(**NAMED, candidates=1)), "method.candidates must be at least 2"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], object], told: str):
    with pytest.raises(ValueError, match=told):
        make()
