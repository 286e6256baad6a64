"""Policies with a likelihood against closed forms: on a grid, every optimum of the fine-tuning family is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.baselines.networks import Network
from benchmarks.baselines.policies import (
    Bins,
    Grid,
    NetworkPolicy,
    PairLoss,
    PolicyMover,
    TabularPolicy,
    fit_exactly,
    pair_rows,
    reference_of,
    round_divergence,
)
from benchmarks.baselines.rewards import NetworkReward
from benchmarks.core.bench import Bench
from benchmarks.core.config import (
    DPOConfig,
    GPOConfig,
    MRPOConfig,
    RLHFConfig,
    SPPOConfig,
)
from benchmarks.laws.laws import Law, Mover
from benchmarks.methods.dpo import DPO, conservative_dpo_loss, dpo_loss, ipo_loss, robust_dpo_loss
from benchmarks.methods.gpo import CONVEX, GPO
from benchmarks.methods.mrpo import MRPO, clip_reference, tilted_reference, virtual_reference
from benchmarks.methods.rlhf import RLHF, RewardPolicy, climb
from benchmarks.methods.sppo import SPPO, win_rate_rows
from pfm import EncodedPairs

BENCH = Bench("surface", "truncate", 0, False)


@dataclass(frozen=True)
class Normal(Law):
    """A normal law cut to its box; Bradley–Terry with reward 2 y_1, or, ``cyclic``, a preference that goes round."""

    name: str = "normal"
    dimension: int = 1
    context_dimension: int = 0
    box: tuple[float, float] = (-3.0, 3.0)
    cyclic: bool = False

    def reference(self, context: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
        return torch.randn(count, self.dimension, generator=generator).clamp(-3, 3)

    def log_density(self, y: Tensor, context: Tensor | None) -> Tensor:
        return -y.square().sum(1) / 2

    def preference(self, y: Tensor, other: Tensor, context: Tensor | None) -> Tensor:
        if self.cyclic:  # y and y + 2 pi / 3 lose to each other in turn, and larger y wins a little
            return 0.5 + 0.4 * torch.sin(y[:, 0] - other[:, 0])
        return torch.sigmoid(self.reward(y, context) - self.reward(other, context))

    def supported(self, y: Tensor, context: Tensor | None) -> Tensor:
        return (y.abs() <= 3).all(1)

    def reward(self, y: Tensor, context: Tensor | None) -> Tensor:
        return 2 * y[:, 0]


@dataclass(frozen=True)
class Steered(Normal):
    """The same on the plane, the context (a unit vector) being the direction that is preferred."""

    name: str = "steered"
    dimension: int = 2
    context_dimension: int = 2

    def contexts(self, count: int, generator: torch.Generator) -> Tensor:
        angle = 2 * math.pi * torch.rand(count, generator=generator)
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    def reward(self, y: Tensor, context: Tensor | None) -> Tensor:
        assert context is not None
        return 2 * (y * context).sum(1)


class Certain(Normal):
    """The same, the larger number always winning."""

    def preference(self, y: Tensor, other: Tensor, context: Tensor | None) -> Tensor:
        return (0.5 * (1 + torch.sign(y - other)))[:, 0]


LINE, PLANE, ROUND = Normal(), Normal(dimension=2), Normal(cyclic=True)
SPENT = round_divergence(LINE)


def population(law: Law, grid: Grid, flip: float = 0.0) -> EncodedPairs:
    """Give every pair of cells, as often as it is drawn, with its preference as label; a share is flipped."""
    mass = grid.log_reference(law, None)[0].exp()
    first, second = torch.cartesian_prod(torch.arange(grid.cells), torch.arange(grid.cells)).T
    one, other = grid.centres[first], grid.centres[second]
    preference = law.preference(one, other, None)
    probability = (1 - flip) * preference + flip * (1 - preference)
    return EncodedPairs(one, other, weight=mass[first] * mass[second], probability=probability)


def fitted(law: Law, loss: PairLoss, side: int = 9, flip: float = 0.0) -> tuple[Tensor, Tensor, Grid]:
    """Give log pi and log pi_ref (K,) of the table that minimises a loss over the population."""
    grid = Grid.over(law, side)
    policy = TabularPolicy(grid, reference_of(law, grid), Bins(None), torch.float64)
    pairs = population(law, grid, flip)
    fit_exactly(policy, pair_rows(policy, loss, pairs), pairs)
    return policy.log_probability(None)[0].detach(), policy.reference(None)[0], grid


def tilted(log_reference: Tensor, energies: Tensor) -> Tensor:
    return torch.log_softmax(log_reference.double() + energies.double(), dim=0)


def win_rate(law: Law, grid: Grid, log_policy: Tensor) -> Tensor:
    """Give P(cell > pi) (K,) of every cell."""
    y = grid.centres.repeat_interleave(grid.cells, 0)
    other = grid.centres.repeat(grid.cells, 1)
    return law.preference(y, other, None).view(grid.cells, -1).double() @ log_policy.double().exp()


def far(one: Tensor, other: Tensor) -> float:
    """Give the total variation between two laws, by their logarithms."""
    return float((one.double().exp() - other.double().exp()).abs().sum() / 2)


# -- the grid ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [LINE, PLANE], ids=["line", "plane"])
def test_cells_hold_what_is_drawn_in_them_and_their_reference_probabilities_are_exact(law: Law):
    grid = Grid.over(law, 12)
    every = torch.arange(grid.cells)
    assert torch.equal(grid.index(grid.centres), every)
    drawn = grid.sample(every.repeat(50), torch.Generator().manual_seed(0))
    assert torch.equal(grid.index(drawn), every.repeat(50))
    assert float((drawn - grid.centres.repeat(50, 1)).abs().max()) <= grid.width / 2
    assert grid.index(torch.full((1, law.dimension), 99.0)).item() == grid.cells - 1
    edges = torch.linspace(-3, 3, 13, dtype=torch.float64)
    mass = torch.special.ndtr(edges).diff() / torch.special.ndtr(edges).diff().sum()
    exact = mass if law.dimension == 1 else (mass[:, None] * mass).flatten()
    assert far(grid.log_reference(law, None)[0], exact.log()) < 2e-3


def test_three_dimensions_are_refused():
    with pytest.raises(ValueError, match="normal has 3"):
        Grid.over(Normal(dimension=3))


def test_a_policy_draws_what_its_likelihood_says_whatever_the_order_of_contexts():
    law = Steered()
    grid = Grid.over(law, 6)
    table = TabularPolicy(grid, reference_of(law, grid), Bins(torch.eye(2)))
    torch.nn.init.normal_(table.table, generator=torch.Generator().manual_seed(0))
    context = torch.eye(2)[torch.randint(2, (60_000,), generator=torch.Generator().manual_seed(1))]
    y = table.sample(context, len(context), torch.Generator().manual_seed(2))
    for each in torch.eye(2):
        cells = grid.index(y[(context == each).all(1)])
        share = torch.bincount(cells, minlength=grid.cells).double() / len(cells)
        assert far(table.log_probability(each[None])[0].detach(), share.log()) < 0.02
    distinct = law.contexts(4000, torch.Generator().manual_seed(3))
    network = NetworkPolicy(grid, reference_of(law, grid), Network(2, 2))
    torch.nn.init.normal_(list(network.network.parameters())[-2], std=5.0, generator=torch.Generator().manual_seed(4))
    y = network.sample(distinct, 4000, torch.Generator().manual_seed(5))
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(6))
    likelihood = network.log_probability(distinct).detach()
    right = likelihood.gather(1, grid.index(y)[:, None]).mean()
    wrong = likelihood[order].gather(1, grid.index(y)[:, None]).mean()
    expected = (likelihood.exp() * likelihood).sum(1).mean()
    assert abs(float(right - expected)) < 0.1
    assert float(wrong) < float(right) - 0.1


@pytest.mark.parametrize("target", [0.05, 0.2, 1.0])
def test_a_divergence_is_reached_by_sharpening(target: float):
    grid = Grid.over(LINE, 64)
    table = TabularPolicy(grid, reference_of(LINE, grid), Bins(None))
    assert table.divergence(None) == pytest.approx(0, abs=1e-6)
    table.sharpen_to(target, None)
    assert table.sharpness == 0.0  # constant energies: nothing to sharpen
    table.table.data[0] = grid.centres[:, 0] * 1e-3
    table.sharpen_to(target, None)
    assert table.divergence(None) == pytest.approx(target, rel=1e-3)
    # A normal law tilted by s is shifted by s: KL = s^2 / 2, as long as the box is not felt.
    if target < 0.1:
        assert table.sharpness * 1e-3 == pytest.approx(math.sqrt(2 * target), rel=0.02)


def test_the_divergence_of_a_round_is_that_of_its_closed_form():
    # Without doubt, whatever the law: log 2 - 1/2. With sigmoid(2 y - 2 y') it is less, and never above log 2.
    assert round_divergence(Certain()) == pytest.approx(math.log(2) - 0.5, abs=1e-3)
    assert 0.05 < SPENT < 0.15
    y = torch.linspace(-3, 3, 601, dtype=torch.float64)[:, None]
    mass = LINE.log_density(y, None).softmax(0)
    b = torch.sigmoid(2 * (y - y.T)) @ mass
    assert float((mass * 2 * b * (2 * b).log()).sum()) == pytest.approx(SPENT, rel=0.02)
    assert round_divergence(LINE, 2) == pytest.approx(SPENT, rel=0.4)


# -- optima over all pairs ----------------------------------------------------------------------------------------

BETA = 1.6
FLIP = 0.2


@pytest.mark.parametrize("law", [LINE, PLANE], ids=["line", "plane"])
@pytest.mark.parametrize(
    ("loss", "over"),
    [
        (lambda rho: dpo_loss(rho, BETA), BETA),
        (lambda rho: CONVEX["logistic"](BETA * rho), BETA),
        (lambda rho: CONVEX["savage"](BETA * rho), BETA),
        (lambda rho: CONVEX["exponential"](BETA * rho), 2 * BETA),
    ],
    ids=["dpo", "logistic", "savage", "exponential"],
)
def test_on_bradley_terry_preferences_the_optimum_is_the_reference_times_exp_of_the_reward(
    law: Law, loss: PairLoss, over: float
):
    log, reference, grid = fitted(law, loss, 9 if law.dimension == 1 else 5)
    target = tilted(reference, law.reward(grid.centres, None) / over)  # pyright: ignore[reportOptionalOperand]
    assert far(log, target) < 2e-3
    assert far(reference, target) > 0.15


@pytest.mark.parametrize("law", [LINE, PLANE, ROUND], ids=["line", "plane", "cyclic"])
@pytest.mark.parametrize(
    ("loss", "over"),
    [(lambda rho: ipo_loss(rho, BETA), BETA), (lambda rho: CONVEX["squared"](BETA * rho), BETA / 2)],
    ids=["ipo", "squared"],
)
def test_on_any_preferences_the_optimum_of_the_squared_losses_is_the_reference_times_exp_of_the_win_rate(
    law: Law, loss: PairLoss, over: float
):
    log, reference, grid = fitted(law, loss, 9 if law.dimension == 1 else 5)
    assert far(log, tilted(reference, win_rate(law, grid, reference) / over)) < 1e-3
    assert far(log, reference) > 0.04


def test_the_convex_family_contains_dpo_and_ipo_pair_by_pair():
    rho = torch.linspace(-4, 4, 41)
    torch.testing.assert_close(CONVEX["logistic"](BETA * rho), dpo_loss(rho, BETA))
    torch.testing.assert_close(CONVEX["squared"](BETA * rho), BETA**2 * ipo_loss(rho, BETA / 2))
    z = torch.linspace(-3, 3, 61, requires_grad=True)
    for name, function in CONVEX.items():
        slope = torch.autograd.grad(function(z).sum(), z)[0]
        assert float(slope[30]) < 0, name  # f'(0) < 0: the chosen output gains
        assert bool((slope.diff() >= -1e-6).all()) or name == "savage"


def test_truncating_the_square_changes_nothing_where_it_does_not_bite():
    mild = Normal(cyclic=True, box=(-0.5, 0.5))
    plain, *_ = fitted(mild, lambda rho: CONVEX["squared"](BETA * rho))
    cut, *_ = fitted(mild, lambda rho: CONVEX["truncated_quadratic"](BETA * rho))
    assert far(plain, cut) < 1e-6
    strong = [fitted(LINE, lambda rho, f=f: CONVEX[f](BETA * rho))[0] for f in ("squared", "truncated_quadratic")]
    assert far(*strong) > 0.01


@pytest.mark.parametrize(
    ("loss", "margin"),
    [
        (lambda rho: CONVEX["hinge"](BETA * rho), 1 / BETA),
        (lambda rho: conservative_dpo_loss(rho, BETA, FLIP), None),
    ],
    ids=["hinge", "conservative"],
)
def test_of_two_outcomes_the_log_odds_move_by_the_minimiser_of_one_pair(loss: PairLoss, margin: float | None):
    log, reference, grid = fitted(LINE, loss, side=2)
    p = float(LINE.preference(grid.centres[1:], grid.centres[:1], None))
    if margin is None:
        flipped = (1 - FLIP) * p + FLIP * (1 - p)
        margin = math.log(flipped / (1 - flipped)) / BETA
    assert float((log - reference).diff()) == pytest.approx(margin, abs=1e-3)


def test_robust_dpo_undoes_flipped_labels_and_plain_dpo_does_not():
    target, reference, _ = fitted(LINE, lambda rho: dpo_loss(rho, BETA))
    robust, *_ = fitted(LINE, lambda rho: robust_dpo_loss(rho, BETA, FLIP), flip=FLIP)
    plain, *_ = fitted(LINE, lambda rho: dpo_loss(rho, BETA), flip=FLIP)
    conservative, *_ = fitted(LINE, lambda rho: conservative_dpo_loss(rho, BETA, FLIP))
    assert far(robust, target) < 1e-3
    assert far(plain, target) > 0.1
    # Smoothing goes the other way: on right labels it gives what plain DPO gives on flipped ones.
    assert far(conservative, plain) < 1e-3
    assert far(plain, reference) > 0.1


def test_robust_loss_has_the_mean_of_the_plain_loss_on_right_labels():
    rho = torch.linspace(-3, 3, 13)
    mean = (1 - FLIP) * robust_dpo_loss(rho, BETA, FLIP) + FLIP * robust_dpo_loss(-rho, BETA, FLIP)
    torch.testing.assert_close(mean, dpo_loss(rho, BETA))


def test_climbing_reaches_the_closed_optimum_of_the_regularised_reward():
    grid = Grid.over(LINE, 32)
    pairs = LINE.pairs(4000, torch.Generator().manual_seed(0))
    model = NetworkReward()
    model.fit(pairs)
    best = RewardPolicy(grid, reference_of(LINE, grid), model, BETA)
    policy = NetworkPolicy(grid, best.reference, Network(1, 0).standardise(pairs))
    before = far(policy.log_probability(None)[0].detach(), best.log_probability(None)[0].detach())
    climb(policy, best, None, seed=0)
    log, reference = policy.log_probability(None)[0].detach().double(), best.reference(None)[0].double()
    energies = best.energies(None)[0].detach().double()
    assert before > 0.3
    assert far(log, best.log_probability(None)[0].detach()) < 0.01
    # The objective's maximum over beta is log Z = log E_ref exp(r / beta).
    reached = log.exp() @ (energies - (log - reference))
    assert float(reached) == pytest.approx(float((reference + energies).logsumexp(0)), abs=1e-3)
    # The reward that was learned is the law's, up to a constant.
    slope = model.reward(grid.centres)[24] - model.reward(grid.centres)[8]
    assert slope.item() == pytest.approx(2 * 3.0, abs=0.8)


def test_the_virtual_reference_is_the_harmonic_mean_and_lies_below_the_geometric_one():
    grid = Grid.over(LINE, 16)
    base = reference_of(LINE, grid)(None)
    other = tilted_reference(reference_of(LINE, grid), grid, torch.tensor([1.0]), 0.7)(None)
    # A normal law tilted by s standard deviations is shifted by them.
    assert float(other.exp() @ grid.centres[:, 0]) == pytest.approx(0.7, abs=0.03)
    share = 0.3
    harmonic = 1 / (share / base.exp() + (1 - share) / other.exp())
    torch.testing.assert_close(virtual_reference(base, other, share).exp(), harmonic / harmonic.sum())
    assert bool((harmonic <= (share * base + (1 - share) * other).exp() + 1e-7).all())
    torch.testing.assert_close(virtual_reference(base, base, share), base)
    clipped = clip_reference(other, base, 0.1)
    assert bool(((clipped <= 0.9 * base + 1e-6) & (clipped >= 1.1 * base - 1e-6)).all())
    torch.testing.assert_close(clip_reference(other, base, 0.0), base)
    assert not torch.equal(clipped, other)
    empty = torch.tensor([[-math.inf, -0.5, -0.9]])
    assert virtual_reference(empty, empty, share)[0, 0].item() == -math.inf


def test_the_optimum_of_mrpo_is_the_virtual_reference_times_exp_of_the_reward():
    grid = Grid.over(LINE, 9)
    base = reference_of(LINE, grid)
    other = tilted_reference(base, grid, torch.tensor([-1.0]), 0.7)
    virtual = virtual_reference(base(None), clip_reference(other(None), base(None), 0.3), 0.5)
    policy = TabularPolicy(grid, lambda context: virtual, Bins(None), torch.float64)
    pairs = population(LINE, grid)
    fit_exactly(policy, pair_rows(policy, lambda rho: dpo_loss(rho, BETA), pairs), pairs)
    log = policy.log_probability(None)[0].detach()
    reward = LINE.reward(grid.centres, None)
    assert far(log, tilted(virtual[0], reward / BETA)) < 2e-3
    assert far(log, tilted(base(None)[0], reward / BETA)) > 0.05


@pytest.mark.parametrize("law", [LINE, ROUND], ids=["line", "cyclic"])
def test_rounds_of_sppo_are_multiplicative_weights(law: Law):
    grid, eta = Grid.over(law, 9), 1.5
    reference = reference_of(law, grid)
    expected = reference(None)[0].double()
    for _ in range(2):
        policy = TabularPolicy(grid, reference, Bins(None), torch.float64)
        now = expected
        mass = now.exp().float()
        first, second = torch.cartesian_prod(torch.arange(grid.cells), torch.arange(grid.cells)).T
        one, other = grid.centres[first], grid.centres[second]
        pairs = EncodedPairs(
            one, other, weight=mass[first] * mass[second], probability=law.preference(one, other, None)
        )
        fit_exactly(policy, win_rate_rows(policy, eta, pairs), pairs)
        expected = tilted(now, eta * win_rate(law, grid, now))
        assert far(policy.log_probability(None)[0].detach(), expected) < 1e-3
        assert far(expected, now) > 0.02
        reference = policy.log_probability


# -- learning from votes ------------------------------------------------------------------------------------------

NAMED: dict[str, Any] = {"name": "x", "family": "x", "label": "x"}
TABLE: dict[str, Any] = NAMED | {"policy": "tabular", "cells": 24}
MOVERS: dict[str, Callable[[], PolicyMover]] = {
    "dpo": lambda: DPO(DPOConfig(**NAMED)),
    "dpo_tabular": lambda: DPO(DPOConfig(**TABLE)),
    "robust": lambda: DPO(DPOConfig(**TABLE, loss="robust", flip=0.05)),
    "conservative": lambda: DPO(DPOConfig(**TABLE, loss="conservative", flip=0.05)),
    "ipo": lambda: DPO(DPOConfig(**TABLE, loss="ipo")),
    "hinge": lambda: GPO(GPOConfig(**TABLE, function="hinge")),
    "rlhf": lambda: RLHF(RLHFConfig(**NAMED)),
    "mrpo": lambda: MRPO(MRPOConfig(**TABLE)),
    "sppo": lambda: SPPO(SPPOConfig(**TABLE)),
}


@cache
def votes() -> EncodedPairs:
    return LINE.pairs(3000, torch.Generator().manual_seed(0))


def mean_after(mover: PolicyMover, law: Law, pairs: EncodedPairs) -> float:
    mover.learn(law, pairs, BENCH)
    generator = torch.Generator().manual_seed(1)
    y = mover.move(law.reference(None, 4000, generator), None, generator)
    assert y.shape == (4000, law.dimension)
    return float(y[:, 0].mean())


@pytest.mark.parametrize("name", MOVERS)
def test_policies_learn_from_votes_mirror_swapped_ones_and_gain_nothing_from_shuffled_ones(name: str):
    assert isinstance(MOVERS[name](), Mover)
    gain = mean_after(MOVERS[name](), LINE, votes())
    swapped = mean_after(MOVERS[name](), LINE, votes().swap())
    shuffled = mean_after(MOVERS[name](), LINE, votes().shuffle_labels(1))
    # A normal law at this divergence is shifted by sqrt(2 KL) = 0.45; mrpo's reference is itself shifted.
    neutral = mean_after(MOVERS[name](), LINE, votes().shuffle_labels(2)) if name == "mrpo" else 0.0
    assert gain - neutral == pytest.approx(math.sqrt(2 * SPENT), abs=0.15)
    assert swapped - neutral == pytest.approx(neutral - gain, abs=0.15)
    assert abs(shuffled - neutral) < 0.15  # a table spends its divergence on noise: it moves, but nowhere


def test_a_given_beta_is_kept_and_a_matched_divergence_is_the_same_policy_at_another_beta():
    notes = {}
    for beta in (2.0, 4.0, None):
        mover = DPO(DPOConfig(**TABLE, beta=beta))
        notes[beta] = mover.learn(LINE, votes(), BENCH)
    assert notes[2.0]["beta"] == 2.0
    # r = 2 y tilts a normal law by 2 / beta.
    assert notes[2.0]["divergence"] == pytest.approx(0.5, rel=0.25)
    assert notes[4.0]["divergence"] == pytest.approx(0.125, rel=0.25)
    assert notes[None]["divergence"] == pytest.approx(SPENT, rel=1e-3)
    assert notes[None]["beta"] == pytest.approx(2 / math.sqrt(2 * SPENT), rel=0.2)


def test_sppo_asks_for_votes_on_its_own_draws_and_goes_further_every_round():
    mover = SPPO(SPPOConfig(**TABLE, rounds=2))
    mover.learn(LINE, votes(), BENCH)
    assert mover.labels == 2 * len(votes())
    generator = torch.Generator().manual_seed(1)
    stages = mover.stages(torch.zeros(4000, 1), None, generator)
    means = [float(y.mean()) for y in stages.values()]
    assert list(stages) == [1, 2]
    assert means[0] == pytest.approx(math.sqrt(2 * SPENT), abs=0.1)
    assert means[1] > means[0] + 0.2


@pytest.mark.parametrize("kind", ["network", "tabular"])
def test_contexts_steer_a_policy_and_shuffled_contexts_do_not(kind: str):
    law = Steered()
    pairs = law.pairs(6000, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    context = law.contexts(600, generator)
    gains = []
    for order in (torch.arange(6000), torch.randperm(6000, generator=generator)):
        assert pairs.context is not None
        mover = DPO(DPOConfig(**NAMED, policy=kind, cells=12))
        mover.learn(law, EncodedPairs(pairs.chosen, pairs.rejected, pairs.context[order]), BENCH)
        y = mover.move(torch.zeros(600, 2), context, generator)
        gains.append(float(law.reward(y, context).mean()))
    # At this divergence the right tilt is worth 2 sqrt(2 KL).
    assert gains[0] > 1.4 * math.sqrt(2 * SPENT)
    assert abs(gains[1]) < 0.2


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: DPO(DPOConfig(**NAMED, loss="slic")), "method.loss must be"),
        (lambda: DPO(DPOConfig(**NAMED, flip=0.5)), r"method.flip must lie in \[0, 0.5\)"),
        (lambda: GPO(GPOConfig(**NAMED, function="cubic")), "method.function must be one of logistic"),
        (lambda: RLHF(RLHFConfig(**NAMED, optimum="ppo")), "method.optimum must be"),
        (lambda: MRPO(MRPOConfig(**NAMED, share=1.0)), "method.share must lie between"),
        (lambda: MRPO(MRPOConfig(**NAMED, clip=1.0)), "method.clip must lie in"),
        (lambda: SPPO(SPPOConfig(**NAMED, rounds=0)), "method.rounds must be at least 1"),
        (lambda: DPO(DPOConfig(**NAMED, beta=0.0)), "method.beta must be positive"),
        (lambda: DPO(DPOConfig(**NAMED, policy="forest")), "method.policy must be"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], PolicyMover], told: str):
    with pytest.raises(ValueError, match=told):
        make()
