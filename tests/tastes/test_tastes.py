"""Compositions of flows against closed forms, and tastes found by votes against those that cast them."""

import itertools
import math

import pytest
import torch
from support.rounding import assert_same
from support.spelled import Spelled

from pfm import EncodedPairs, FlowConfig, PreferenceFlow, wrap
from pfm.flow.composition import Composition, compose, simplex
from pfm.preferences import BradleyTerry, MeanShift
from pfm.tastes import TasteMixture, append_code, number_raters, taste_flows, with_code
from pfm.tastes.likelihood import mixed_log_odds
from pfm.tastes.mixture import held_out_votes

VARIANCE = torch.tensor([1.0, 2.0, 0.5])
TASTES = (torch.tensor([0.8, 0.0, 0.0]), torch.tensor([0.0, 0.5, 0.3]))
LINEAR = FlowConfig(residual=False)


def probit_pairs(weights: torch.Tensor, count: int, seed: int) -> EncodedPairs:
    """Draw pairs of N(0, VARIANCE) labelled by P(y > y') = Phi(w.(y - y') / sqrt 2)."""
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, count, 3, generator=generator) * VARIANCE.sqrt()
    chance = torch.special.ndtr((one - other) @ weights / math.sqrt(2))
    first = (torch.rand(count, generator=generator) < chance)[:, None]
    return EncodedPairs(torch.where(first, one, other), torch.where(first, other, one))


def winners_mean(weights: torch.Tensor) -> torch.Tensor:
    """Give the mean of 2 N(0, S) Phi(a.y), a skew normal law (Azzalini): sqrt(2 / pi) S a / sqrt(1 + a'Sa)."""
    slope = weights / math.sqrt(2 + float(weights.square() @ VARIANCE))
    return math.sqrt(2 / math.pi) * VARIANCE * slope / math.sqrt(1 + float(slope.square() @ VARIANCE))


@pytest.fixture(scope="module")
def flows() -> list[PreferenceFlow]:
    return [PreferenceFlow.fit(probit_pairs(w, 10_000, seed), LINEAR, progress=False) for seed, w in enumerate(TASTES)]


@pytest.fixture(scope="module")
def draws() -> torch.Tensor:
    return torch.randn(6000, 3, generator=torch.Generator().manual_seed(9)) * VARIANCE.sqrt()


# -- composition -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.5, 0.5), (0.2, 0.8)])
def test_composed_displacements_are_the_weighted_sum_of_the_skew_normal_means(flows, draws, weights):
    moved = compose(list(zip(flows, weights, strict=True))).transport(draws) - draws
    exact = torch.stack([w * winners_mean(taste) for w, taste in zip(weights, TASTES, strict=True)]).sum(0)
    torch.testing.assert_close(moved.mean(0), exact, atol=0.03, rtol=0)
    each = torch.stack([w * (flow.transport(draws) - draws) for w, flow in zip(weights, flows, strict=True)]).sum(0)
    # Exact for fields of one slope; these differ by the squares of the displacements.
    assert float((moved - each).norm() / each.norm()) < 0.05


@pytest.mark.slow
def test_the_composition_of_one_flow_is_that_flow_and_order_and_batch_do_not_matter(flows, draws):
    y = draws[:1500]  # more than one chunk
    composed = compose([(flows[0], 0.3), (flows[1], 0.7)], names=["one", "two"])
    alone = composed.transport(y, weights=[0.0, 1.0])
    torch.testing.assert_close(alone, flows[1].transport(y, steps=composed.steps), atol=1e-5, rtol=0)
    turned = compose([(flows[1], 0.7), (flows[0], 0.3)])
    torch.testing.assert_close(turned.transport(y), composed.transport(y), atol=1e-5, rtol=0)
    torch.testing.assert_close(composed.transport(y[1400:]), composed.transport(y)[1400:], atol=1e-5, rtol=0)
    own = torch.tensor([[1.0, 0.0], [0.3, 0.7]]).repeat(750, 1)
    rows = composed.transport(y, weights=own)
    torch.testing.assert_close(rows[1::2], composed.transport(y)[1::2], atol=1e-5, rtol=0)
    torch.testing.assert_close(rows[::2], composed.transport(y, weights=[1, 0])[::2], atol=1e-5, rtol=0)
    path = composed.trajectory(y[:5], times=[0.0, 0.5, 1.0])
    torch.testing.assert_close(path[0], y[:5])
    torch.testing.assert_close(path[2], composed.transport(y[:5]), atol=1e-2, rtol=0)
    assert torch.equal(composed.transport(y, strength=0.0), y)
    double = composed.transport(y, strength=2.0) - y
    torch.testing.assert_close(double, 2 * (composed.transport(y) - y), atol=1e-5, rtol=0)
    velocity = 0.3 * flows[0].velocity(0.5, y) + 0.7 * flows[1].velocity(0.5, y)
    torch.testing.assert_close(composed.velocity(0.5, y), velocity, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_composed_b_is_the_mean_of_the_tastes_and_the_trade_off_runs_from_one_to_the_other(flows, draws):
    composed = compose([(flow, 0.5) for flow in flows], names=["first", "second"])
    each = torch.stack([flow.win_probability(draws[:50]) for flow in flows])
    torch.testing.assert_close(composed.win_probability(draws[:50]), each.mean(0))
    opponents = draws[3000:3500]

    def exact(weights):
        return lambda y, context: torch.special.ndtr((y[:, None] - opponents) @ weights / math.sqrt(2)).mean(1)

    found = composed.trade_off(draws[:1000], points=5, judges=[exact(w) for w in TASTES])
    assert found.win.shape == (5, 2)
    assert torch.equal(found.weights, simplex(2, 5))
    assert bool((found.win[:, 0].diff() > 0).all())
    assert bool((found.win[:, 1].diff() < 0).all())
    # Pure compositions leave one taste at a coin toss; the worst-off taste is best served in between.
    assert float(found.worst[[0, -1]].max()) < 0.52 < float(found.worst[found.maxmin])
    assert found.maxmin not in (0, 4)
    assert float(found.average.max() - found.average.min()) < 0.05
    assert set(found.rows()[0]) >= {"weight first", "win second", "worst", "average"}


def test_the_lattice_holds_all_weights():
    assert simplex(1).tolist() == [[1.0]]
    assert len(simplex(3, 5)) == 15
    torch.testing.assert_close(simplex(3, 5).sum(1), torch.ones(15))
    assert len(torch.unique(simplex(4, 4), dim=0)) == len(simplex(4, 4)) == math.comb(6, 3)


@pytest.mark.slow
def test_bad_compositions_are_refused_by_name(flows, draws):
    with pytest.raises(ValueError, match=r"weights must sum to 1: got \[0.5, 0.2\] with sum 0.7"):
        compose([(flows[0], 0.5), (flows[1], 0.2)])
    with pytest.raises(ValueError, match="weights must be at least 0"):
        compose([(flows[0], 1.5), (flows[1], -0.5)])
    with pytest.raises(ValueError, match="weights must be finite"):
        compose([(flows[0], math.nan), (flows[1], 1.0)])
    with pytest.raises(ValueError, match="at least one"):
        compose([])
    with pytest.raises(TypeError, match="number 0"):
        compose([flows[0]])  # pyright: ignore[reportArgumentType]
    composed = compose([(flows[0], 0.5), (flows[1], 0.5)])
    with pytest.raises(ValueError, match=r"weights must be \(2,\) or \(6000, 2\)"):
        composed.transport(draws, weights=torch.full((7, 2), 0.5))
    with pytest.raises(ValueError, match="1 of 2 rows hold NaN"):
        composed.transport([[0.0, 0.0, 0.0], [0.0, math.nan, 0.0]])
    other = PreferenceFlow((2,))
    with pytest.raises(ValueError, match=r"flow 0 moves \(3,\), flow 1 \(2,\)"):
        compose([(flows[0], 0.5), (other, 0.5)])
    with pytest.raises(ValueError, match=r"contexts of one dimension, or none: got \[1, 4\]"):
        compose([(PreferenceFlow((3,), 1), 0.5), (PreferenceFlow((3,), 4), 0.5)])
    distilled = flows[0].distill(draws[:100], config=LINEAR, progress=False)
    with pytest.raises(ValueError, match="flow 1 is distilled"):
        compose([(flows[0], 0.5), (distilled, 0.5)])
    with pytest.raises(ValueError, match="names must be 2 different names"):
        Composition(flows, [0.5, 0.5], ["a", "a"])
    apart = [PreferenceFlow((3,), metadata={"encoder": {"name": name}}) for name in ("one", "two")]
    with pytest.raises(ValueError, match=r"flow 0 was fitted on \{'name': 'one'\}, flow 1 on \{'name': 'two'\}"):
        compose([(flow, 0.5) for flow in apart])


@pytest.mark.slow
def test_a_composition_is_loaded_as_it_was_saved(flows, draws, tmp_path):
    composed = compose([(flows[0], 0.3), (flows[1], 0.7)], names=["one", "two"])
    loaded = Composition.load(composed.save(tmp_path / "both"))
    assert repr(loaded) == repr(composed)
    assert_same(loaded.transport(draws[:20]), composed.transport(draws[:20]))
    (tmp_path / "both" / "composition.json").write_text('{"names": ["one", "two"]}')
    with pytest.raises(ValueError, match=r"composition\.json is damaged"):
        Composition.load(tmp_path / "both")
    with pytest.raises(FileNotFoundError, match=r"holds no composition\.json"):
        Composition.load(tmp_path)


@pytest.mark.slow
def test_a_composition_stands_where_a_flow_does_in_a_wrapped_generator(flows):
    texts = ["0 0 0", "1.5 0 0", "0 2 0.5"]
    for weights, best in (((1.0, 0.0), 1), ((0.0, 1.0), 2)):
        composed = compose(list(zip(flows, weights, strict=True)))
        assert composed.guard_margin == pytest.approx(flows[best - 1].guard_margin)
        refined = wrap(lambda prompt, n: texts, composed, encoder=Spelled(3), n=3)("any prompt")
        assert refined.text == texts[best]
        along = wrap(None, composed, encoder=Spelled(3), n=3, by="alignment", margin=0).refine([texts], ["any prompt"])
        assert along[0].text == texts[best]
    both = compose([(flows[0], 0.25), (flows[1], 0.75)])
    assert both.guard_margin == pytest.approx(0.25 * flows[0].guard_margin + 0.75 * flows[1].guard_margin)
    y = Spelled(3).encode(texts)
    expected = 0.25 * flows[0].win_probability(y) + 0.75 * flows[1].win_probability(y)
    torch.testing.assert_close(both.candidate_probabilities(y, None, torch.zeros(3)), expected)


# -- tastes ----------------------------------------------------------------------------------------------------------

WANTS = torch.zeros(3, 6)
WANTS[0, 0], WANTS[1, 1], WANTS[2, 0], WANTS[2, 2] = 2.0, 2.0, -1.0, 1.5


def votes(wants: torch.Tensor, seed: int) -> EncodedPairs:
    """Let each row of wants (N, D), a linear reward, vote on one pair."""
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, *wants.shape, generator=generator)
    chance = torch.sigmoid(((one - other) * wants).sum(1))
    first = (torch.rand(len(wants), generator=generator) < chance)[:, None]
    return EncodedPairs(torch.where(first, one, other), torch.where(first, other, one))


@pytest.fixture(scope="module")
def crowd() -> tuple[EncodedPairs, torch.Tensor, torch.Tensor]:
    """Give votes of 48 raters, 20 each, their raters, and each rater's taste."""
    taste = torch.arange(48) % 3
    raters = torch.arange(48).repeat_interleave(20)
    return votes(WANTS[taste[raters]], 0), raters, taste


@pytest.fixture(scope="module")
def mixture(crowd) -> TasteMixture:
    pairs, raters, _ = crowd
    return TasteMixture(3, restarts=2).fit(pairs, [f"rater {number:02}" for number in raters.tolist()])


def expected_loss(score: torch.Tensor, y: torch.Tensor, other: torch.Tensor, wants: torch.Tensor) -> float:
    chance = torch.sigmoid((y - other) @ wants)
    return float(torch.nn.functional.binary_cross_entropy_with_logits(score, chance))


@pytest.mark.slow
def test_em_finds_who_wants_what_and_predicts_better_than_one_model_of_all(crowd, mixture):
    pairs, _, taste = crowd
    found = mixture.responsibilities.argmax(1)
    right = max((torch.tensor(names)[found] == taste).float().mean() for names in itertools.permutations(range(3)))
    assert float(right) > 0.95
    assert mixture.found["confirmed"]
    assert mixture.found["gain"] > 0.1
    trace = mixture.found["log_likelihood"]
    assert trace[-1] > trace[0]
    assert all(b > a - 1e-3 for a, b in itertools.pairwise(trace))
    torch.testing.assert_close(mixture.shares.sum(), torch.tensor(1.0))
    y, other = torch.randn(2, 500, 6, generator=torch.Generator().manual_seed(3))
    pooled, errors = BradleyTerry().fit(pairs), []
    for rater in range(3):
        weights = mixture.of_rater(f"rater {rater:02}")
        ours = expected_loss(mixture.score(y, other, weights=weights), y, other, WANTS[rater])
        errors.append(expected_loss(pooled.score(y, other), y, other, WANTS[rater]) - ours)
    assert min(errors) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_shuffled_rater_names_gain_nothing_and_leave_one_taste(crowd, seed):
    pairs, raters, _ = crowd
    shuffled = raters[torch.randperm(len(raters), generator=torch.Generator().manual_seed(seed))]
    found = TasteMixture(3, restarts=1).fit(pairs, shuffled)
    assert found.found["gain"] < 0.005
    assert not found.found["confirmed"]
    assert len(found.models) == 1
    assert found.responsibilities.tolist() == [[1.0]] * 48


@pytest.mark.slow
def test_mixed_preferences_are_skew_and_b_is_the_mean_of_the_tastes(mixture):
    y, other = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(mixture.score(y, other), -mixture.score(other, y), atol=1e-5, rtol=0)
    wins = torch.stack([model.win_probability(y, other) for model in mixture.models], dim=1)
    torch.testing.assert_close(mixture.win_probability(y, other), wins @ mixture.shares)
    adapted = mixture.adapt(votes(WANTS[:1].expand(5, -1), 1))
    torch.testing.assert_close(adapted.score(y, other), -adapted.score(other, y), atol=1e-5, rtol=0)
    mean = torch.stack([torch.sigmoid(adapted.score(y, one.expand_as(y))) for one in other]).mean(0)
    torch.testing.assert_close(adapted.win_probability(y, other), mean, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_few_votes_place_a_new_rater_and_none_leave_the_shares(crowd, mixture):
    y, other = torch.randn(2, 500, 6, generator=torch.Generator().manual_seed(5))
    losses: dict[str, list[float]] = {"pooled": [], "one": [], "twenty": [], "scratch": []}
    pooled = BradleyTerry().fit(crowd[0])
    for seed in range(12):
        wants = WANTS[seed % 3]
        twenty = votes(wants.expand(20, -1), 100 + seed)
        scores = {
            "pooled": pooled.score(y, other),
            "one": mixture.adapt(twenty.select([0])).score(y, other),
            "twenty": mixture.adapt(twenty).score(y, other),
            "scratch": BradleyTerry(0.1).fit(twenty).score(y, other),
        }
        for name, score in scores.items():
            losses[name].append(expected_loss(score, y, other, wants))
    mean = {name: sum(found) / len(found) for name, found in losses.items()}
    assert mean["twenty"] < mean["one"] - 0.05 < mean["pooled"]
    assert mean["twenty"] < mean["pooled"] - 0.1
    assert mean["twenty"] < mean["scratch"] - 0.1
    torch.testing.assert_close(mixture.of_rater("nobody"), mixture.shares)


@pytest.mark.slow
def test_a_correction_learns_what_no_taste_has(mixture):
    wants = torch.tensor([2.0, 0, 0, 1.5, 0, 0])  # the first taste, and one more direction
    y, other = torch.randn(2, 500, 6, generator=torch.Generator().manual_seed(6))
    placed, adapted = [], []
    for seed in range(6):
        few = votes(wants.expand(20, -1), 300 + seed)
        placed.append(expected_loss(mixture.score(y, other, weights=mixture.infer(few)), y, other, wants))
        adapted.append(expected_loss(mixture.adapt(few, correction=1.0).score(y, other), y, other, wants))
    assert sum(adapted) < sum(placed) - 0.15
    tight = mixture.adapt(few, spread=1e-4, correction=1e-4)
    torch.testing.assert_close(
        tight.score(y, other), mixture.score(y, other, weights=mixture.infer(few)), atol=1e-3, rtol=0
    )


@pytest.mark.slow
def test_a_mixture_is_loaded_as_it_was_saved(crowd, mixture, tmp_path):
    pairs = crowd[0].select(torch.arange(12))
    loaded = TasteMixture.load(mixture.save(tmp_path / "tastes"))
    for name in ("names", "raters", "found", "prior", "tastes", "seed"):
        assert getattr(loaded, name) == getattr(mixture, name)
    assert_same(loaded.of_rater(mixture.raters[3]), mixture.of_rater(mixture.raters[3]))
    assert_same(loaded.infer(pairs), mixture.infer(pairs))
    assert_same(loaded.adapt(pairs).correction, mixture.adapt(pairs).correction)
    assert isinstance(loaded.component(), type(mixture.models[0]))
    (tmp_path / "tastes" / "tastes.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged mixture of tastes"):
        TasteMixture.load(tmp_path / "tastes")
    with pytest.raises(FileNotFoundError, match=r"holds no tastes\.json"):
        TasteMixture.load(tmp_path)
    unnamed = TasteMixture.of_groups(crowd[0].select(torch.arange(4)), [("a", 1)] * 4)
    with pytest.raises(TypeError, match=r"named by texts or numbers to be saved: got \('a', 1\)"):
        unnamed.save(tmp_path / "other")


@pytest.mark.slow
def test_known_groups_have_a_model_each_and_prompts_may_take_the_place_of_raters(crowd):
    pairs, raters, taste = crowd
    known = TasteMixture.of_groups(pairs, [f"group {t}" for t in taste[raters].tolist()])
    y, other = torch.randn(2, 500, 6, generator=torch.Generator().manual_seed(7))
    for number in range(3):
        own = known.score(y, other, weights=known.of_rater(f"group {number}"))
        assert expected_loss(own, y, other, WANTS[number]) < 0.5
    grouped = EncodedPairs(pairs.chosen, pairs.rejected, group=raters)
    assert len(TasteMixture(3, restarts=1).fit(grouped, grouped.group).models) == 3


@pytest.mark.slow
def test_flows_follow_their_tastes_by_responsibility_and_by_code():
    raters = torch.arange(20).repeat_interleave(50)
    taste = torch.arange(20) % 2
    pairs = votes(WANTS[taste[raters]], 11)
    found = TasteMixture(2, restarts=1).fit(pairs, raters)
    fields = taste_flows(pairs, found.responsibilities[raters], LINEAR)
    coded = PreferenceFlow.fit(with_code(pairs, torch.nn.functional.one_hot(taste[raters], 2)), LINEAR, progress=False)
    assert coded.context_dimension == 2
    y = torch.randn(400, 6, generator=torch.Generator().manual_seed(8))
    for number in range(2):
        towards = WANTS[number] / WANTS[number].norm()
        moves = [
            fields.transport(y, weights=found.of_rater(number)) - y,
            coded.transport(y, append_code(None, torch.eye(2)[number])) - y,
        ]
        for moved in moves:
            mean = moved.mean(0)
            assert float(mean @ towards) > 0.25
            assert float((mean - (mean @ towards) * towards).norm()) < 0.15


def test_codes_stand_behind_the_contexts_there_are():
    pairs = votes(WANTS[:1].expand(5, -1), 12)
    contexts = EncodedPairs(pairs.chosen, pairs.rejected, torch.ones(5, 2), probability=[1, 0.5, 1, 1, 0.8])
    coded = with_code(contexts, torch.eye(3)[[0, 1, 2, 0, 1]])
    assert coded.context is not None
    assert coded.context.tolist()[:2] == [[1, 1, 1, 0, 0], [1, 1, 0, 1, 0]]
    torch.testing.assert_close(coded.rejected, pairs.rejected)
    assert coded.probability is contexts.probability
    assert torch.equal(coded.group, contexts.group)
    assert append_code(torch.ones(2), torch.eye(3)).tolist()[1] == [1, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="equally many rows, or one: got 2 and 3"):
        append_code(torch.ones(2, 2), torch.eye(3))


def test_bad_tastes_are_refused_by_name(crowd):
    pairs, raters, taste = crowd
    groups = taste[raters].tolist()
    with pytest.raises(ValueError, match="group 3 has no pairs"):
        TasteMixture.of_groups(pairs, groups, names=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="groups must be among"):
        TasteMixture.of_groups(pairs, groups, names=[0, 1])
    with pytest.raises(ValueError, match="group 3 has no pairs"):
        taste_flows(pairs, groups, names=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="taste 1 has 0 pairs"):
        taste_flows(pairs, torch.tensor([[1.0, 0.0]]).repeat(len(pairs), 1), LINEAR)
    with pytest.raises(ValueError, match="raters must have one entry a pair: got 2 for 960 pairs"):
        TasteMixture(2).fit(pairs, [0, 1])
    with pytest.raises(ValueError, match="number 1 is nan"):
        TasteMixture(2).fit(pairs.select([0, 1]), [0.0, math.nan])
    with pytest.raises(ValueError, match="tastes=5 needs at least as many raters"):
        TasteMixture(5).fit(pairs.select([0, 1]), [0, 1])
    with pytest.raises(ValueError, match="tastes must be a whole number"):
        TasteMixture(0)
    with pytest.raises(ValueError, match="code must be finite"):
        with_code(pairs, torch.full((len(pairs), 2), math.nan))
    with pytest.raises(RuntimeError, match="not fitted"):
        TasteMixture(2).infer(pairs)


@pytest.mark.slow
def test_a_rater_of_one_vote_stays_near_the_shares_of_all(crowd):
    pairs, raters, _ = crowd
    wants = WANTS[:1].expand(1, -1)
    joined = EncodedPairs(
        torch.cat([pairs.chosen, votes(wants, 3).chosen]), torch.cat([pairs.rejected, votes(wants, 3).rejected])
    )
    found = TasteMixture(3, restarts=1, confirm=False).fit(joined, torch.cat([raters, torch.tensor([99])]))
    assert float(found.of_rater(99).max()) < 0.9 < float(found.of_rater(0).max())


# -- closed forms ----------------------------------------------------------------------------------------------------
# Tastes that are known exactly: a mean shift scores y - y' by the mean of chosen - rejected, here a row of CLOSED.

CLOSED = torch.tensor([[1.0, 0.0], [0.0, 2.0]])


def shift_of(move: list[float], margin: float = 0.1) -> PreferenceFlow:
    """Make a flow that carries every output by one displacement."""
    flow = PreferenceFlow((2,), config=LINEAR, metadata={"residual_kept": False, "steps": 1})
    with torch.no_grad():
        flow.field.linear.shifts.copy_(torch.tensor(move).expand(12, 2))
    flow.win.margin.fill_(margin)
    return flow


@pytest.fixture(scope="module")
def known() -> TasteMixture:
    """Fit a mean shift a group, of three pairs and of one: the shares are 3/4 and 1/4."""
    chosen = CLOSED[[0, 0, 0, 1]]
    pairs = EncodedPairs(chosen, torch.zeros(4, 2))
    return TasteMixture.of_groups(pairs, ["first", "first", "first", "second"], component=MeanShift)


def differences(*rows: list[float], **more) -> EncodedPairs:
    """Make pairs whose chosen minus rejected outputs are the rows."""
    chosen = torch.tensor(rows)
    return EncodedPairs(chosen, torch.zeros(len(chosen), 2), **more)


def test_shifts_add_up_by_their_weights_and_a_row_may_have_its_own():
    flows = [shift_of([2.0, 0.0]), shift_of([0.0, -4.0])]
    composed = compose([(flows[0], 0.25), (flows[1], 0.75)])
    y = torch.tensor([[1.0, 1.0], [0.0, 3.0]])
    torch.testing.assert_close(composed.transport(y), y + torch.tensor([0.5, -3.0]))
    torch.testing.assert_close(composed.transport(y, strength=0.5), y + torch.tensor([0.25, -1.5]))
    torch.testing.assert_close(composed.transport(y, strength=2.0), y + torch.tensor([1.0, -6.0]))
    own = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    torch.testing.assert_close(composed.transport(y, weights=own), y + torch.tensor([[2.0, 0.0], [1.0, -2.0]]))
    torch.testing.assert_close(composed.velocity(0.3, y), torch.tensor([[0.5, -3.0]] * 2))


def test_a_flow_of_no_weight_does_not_close_the_guard():
    flows = [shift_of([1.0, 0.0], 0.2), shift_of([0.0, 1.0], 0.4), shift_of([0.0, 0.0], math.inf)]
    for weights, margin in (((1.0, 0.0, 0.0), 0.2), ((0.25, 0.75, 0.0), 0.35), ((0.5, 0.0, 0.5), math.inf)):
        assert compose(list(zip(flows, weights, strict=True))).guard_margin == pytest.approx(margin)


def test_known_groups_have_the_shares_of_their_pairs(known):
    assert known.shares.tolist() == [0.75, 0.25]
    assert known.of_rater("second").tolist() == [0.0, 1.0]
    assert known.of_rater("nobody").tolist() == [0.75, 0.25]
    y, other = torch.tensor([[1.0, 1.0], [3.0, -1.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert known.scores(y, other).tolist() == [[1.0, 0.0], [3.0, -2.0]]
    chance = torch.sigmoid(known.scores(y, other)) @ known.shares
    torch.testing.assert_close(known.score(y, other), torch.logit(chance))
    torch.testing.assert_close(known.score(other, y), -torch.logit(chance))
    own = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(known.score(y, other, weights=own), torch.tensor([0.0, 3.0]), atol=1e-6, rtol=0)
    opponents = torch.cat([other, y])
    wins = torch.stack([torch.sigmoid(known.scores(y, one.expand(2, 2))) for one in opponents]).mean(0)
    torch.testing.assert_close(known.win_probability(y, opponents), wins @ known.shares)
    torch.testing.assert_close(known.win_probability(y, opponents, weights=[0.0, 1.0]), wins[:, 1])


def test_a_raters_taste_is_told_from_its_votes_by_bayes_rule(known):
    """The posterior is the shares times the chance of the votes, each to the power of its weight."""
    assert known.infer(differences([0.0, 0.0])).tolist() == pytest.approx([0.75, 0.25])
    votes_of_one = [[1.0, -1.0], [0.5, 0.5], [2.0, 1.0]]
    chance = torch.sigmoid(torch.tensor(votes_of_one) @ CLOSED.T)
    posterior = known.shares * chance.prod(0)
    torch.testing.assert_close(known.infer(differences(*votes_of_one)), posterior / posterior.sum())
    soft = torch.tensor([1.0, 0.6, 0.0])
    weight = torch.tensor([2.0, 1.0, 0.5])
    likelihood = chance.log() * soft[:, None] + (1 - chance).log() * (1 - soft)[:, None]
    posterior = known.shares * (likelihood * weight[:, None]).sum(0).exp()
    found = known.infer(differences(*votes_of_one, probability=soft, weight=weight))
    torch.testing.assert_close(found, posterior / posterior.sum())


def test_an_adapted_taste_is_at_the_most_probable_coefficients(known):
    """Log-odds are the mixture's at the votes' posterior, plus a.s + u.d; the gradient of loss and prior is zero."""
    rows, weight = torch.tensor([[1.0, -1.0], [0.5, 0.5], [2.0, 1.0], [-1.0, 2.0]]), torch.tensor([1.0, 2.0, 0.5, 1.0])
    votes_of_one = differences(*rows.tolist(), probability=[1.0, 0.8, 1.0, 0.3], weight=weight)
    spread, correction = 0.7, 0.4
    adapted = known.adapt(votes_of_one, spread=spread, correction=correction)
    torch.testing.assert_close(adapted.responsibilities, known.infer(votes_of_one))
    scores = rows @ CLOSED.T
    log_odds = mixed_log_odds(scores, adapted.responsibilities) + scores @ adapted.blend + rows @ adapted.correction
    torch.testing.assert_close(adapted.score(rows, torch.zeros(4, 2)), log_odds)
    residual = weight * (torch.sigmoid(log_odds) - torch.tensor([1.0, 0.8, 1.0, 0.3]))
    torch.testing.assert_close(residual @ scores + adapted.blend / spread**2, torch.zeros(2), atol=1e-4, rtol=0)
    axes = known._leading(8)
    along = torch.linalg.lstsq(axes, adapted.correction[:, None]).solution.flatten()
    torch.testing.assert_close(
        residual @ (rows @ axes) + along / correction**2, torch.zeros(axes.shape[1]), atol=1e-4, rtol=0
    )
    still = known.adapt(votes_of_one, spread=1e-6, correction=1e-6)
    expected = mixed_log_odds(scores, still.responsibilities)
    torch.testing.assert_close(still.score(rows, torch.zeros(4, 2)), expected, atol=1e-4, rtol=0)
    assert known.adapt(votes_of_one, rank=0).correction.tolist() == [0.0, 0.0]
    positive = (adapted.responsibilities + adapted.blend).clamp_min(0)
    torch.testing.assert_close(adapted.weights, positive / positive.sum())


def two_camps(seed: int) -> tuple[EncodedPairs, torch.Tensor]:
    """Let eight raters want the first coordinate and four the second one's opposite; ten sure votes each."""
    generator = torch.Generator().manual_seed(seed)
    raters = torch.arange(12).repeat_interleave(10)
    want = torch.where((raters < 8)[:, None], torch.tensor([2.0, 0.0]), torch.tensor([0.0, -2.0]))
    one, other = torch.randn(2, 120, 2, generator=generator)
    first = (((one - other) * want).sum(1) > 0)[:, None]
    return EncodedPairs(torch.where(first, one, other), torch.where(first, other, one)), raters


def test_two_camps_are_found_and_shuffled_names_leave_one():
    pairs, raters = two_camps(0)
    found = TasteMixture(2, MeanShift, restarts=1).fit(pairs, raters)
    assert found.found["confirmed"] is True
    assert len(found.models) == 2
    # One vote of each kind more than there are raters.
    assert found.shares.tolist() == pytest.approx([9 / 14, 5 / 14], abs=1e-3)
    assert found.responsibilities.argmax(1).tolist() == [0] * 8 + [1] * 4
    directions = torch.stack([model.direction.cpu() for model in found.models if isinstance(model, MeanShift)])
    directions = torch.nn.functional.normalize(directions, dim=1)
    torch.testing.assert_close(directions, torch.tensor([[1.0, 0.0], [0.0, -1.0]]), atol=0.3, rtol=0)
    shuffled = raters[torch.randperm(120, generator=torch.Generator().manual_seed(1))]
    chance = TasteMixture(2, MeanShift, restarts=1).fit(pairs, shuffled)
    assert chance.found["confirmed"] is False
    assert len(chance.models) == 1
    assert chance.shares.tolist() == [1.0]
    assert len(TasteMixture(2, MeanShift, restarts=1, confirm=False).fit(pairs, shuffled).models) == 2


def test_a_fifth_of_each_raters_votes_is_held_out():
    index = torch.tensor([0] * 10 + [1] * 5 + [2] * 4)
    held = held_out_votes(index, torch.Generator().manual_seed(0))
    assert [int(held[index == rater].sum()) for rater in range(3)] == [2, 1, 0]


def test_names_are_numbered_in_order_and_mixtures_of_log_odds_are_skew():
    assert number_raters(["b", "a", "b"], 3)[0] == ["a", "b"]
    assert number_raters(["b", "a", "b"], 3)[1].tolist() == [1, 0, 1]
    scores, weights = torch.tensor([[1.0, -2.0], [0.0, 3.0]]), torch.tensor([0.3, 0.7])
    torch.testing.assert_close(mixed_log_odds(scores, weights), torch.logit(torch.sigmoid(scores) @ weights))
    torch.testing.assert_close(mixed_log_odds(-scores, weights), -mixed_log_odds(scores, weights))


def test_flows_of_tastes_are_fitted_on_their_raters_pairs_by_weight():
    y = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    move = torch.tensor([[3.0, 0.0], [0.0, -3.0]])[torch.arange(24) % 2]
    pairs = EncodedPairs(y + move, y)
    config = LINEAR.replace(source="rejected", sigma=0.0)
    composed = taste_flows(pairs, torch.eye(2)[torch.arange(24) % 2], config)
    assert composed.weights.tolist() == [0.5, 0.5]
    for weights, expected in (([1.0, 0.0], [3.0, 0.0]), ([0.0, 1.0], [0.0, -3.0]), ([0.5, 0.5], [1.5, -1.5])):
        moved = composed.transport(y, weights=torch.tensor(weights)) - y
        torch.testing.assert_close(moved, torch.tensor(expected).expand(24, 2), atol=0.02, rtol=0)
