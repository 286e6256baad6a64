"""Rounds of labels, distillation, guidance, straightness, trouble on the way, against exact laws."""

import itertools
import math
import warnings

import pytest
import torch
from support.exact_pairs import (
    QUICK,
    compass_gain,
    compass_pairs,
    ks_to_square_law,
    line_pairs,
    rejected_and_context,
    uniforms,
)
from support.made_once import shared_flow
from support.rounding import assert_same

import pfm
from pfm import EncodedPairs, FlowConfig, NonFiniteWarning, PreferenceFlow
from pfm.flow.gate import gate_uniforms
from pfm.flow.holdout import held_out_first

LIGHT = FlowConfig(epochs=12, hidden=96, layers=3)  # the default is twice as near, at five times the work


def larger(y, other, context):
    """Prefer the larger number."""
    return (y > other).flatten()


@pytest.fixture(scope="module")
def line(tmp_path_factory) -> PreferenceFlow:
    return shared_flow(tmp_path_factory, "line", lambda: PreferenceFlow.fit(line_pairs(10_000), LIGHT, progress=False))


@pytest.fixture(scope="module")
def two_rounds(line, tmp_path_factory) -> PreferenceFlow:
    one, other = torch.rand(2, 10_000, 1, generator=torch.Generator().manual_seed(3))
    return shared_flow(tmp_path_factory, "two_rounds", lambda: line.relabel(larger, one, other, progress=False))


# -- relabel --------------------------------------------------------------------------------------------------------


def test_two_rounds_reach_the_best_of_four(line, two_rounds):
    y = uniforms()
    assert (line.rounds, two_rounds.rounds) == (1, 2)
    assert ks_to_square_law(two_rounds.transport(y, mode="relabel"), power=4) <= 0.04
    assert_same(two_rounds.transport(y, mode="relabel", rounds=1), line.transport(y))


def test_labels_by_a_coin_add_nothing(line):
    one, other = torch.rand(2, 2000, 1, generator=torch.Generator().manual_seed(4))
    coin = torch.Generator().manual_seed(5)
    fair = line.relabel(lambda y, other, context: torch.rand(len(y), generator=coin) < 0.5, one, other, progress=False)
    soft = line.relabel(lambda y, other, context: torch.full((len(y),), 0.5), one, other, progress=False)
    before = line.transport(uniforms()).mean()
    for flow in (fair, soft):
        assert float(flow.transport(uniforms(), mode="relabel").mean() - before) == pytest.approx(0, abs=0.02)


def test_rounds_are_saved_and_loaded(two_rounds, tmp_path):
    two_rounds.save_pretrained(tmp_path)
    again = PreferenceFlow.from_pretrained(tmp_path)
    assert again.rounds == 2
    assert_same(again.transport(uniforms(50), mode="relabel"), two_rounds.transport(uniforms(50), mode="relabel"))


@pytest.mark.slow
def test_a_gated_round_is_gated():
    flow = PreferenceFlow.fit(line_pairs(), LIGHT.replace(source="rejected", epochs=24), progress=False)
    assert ks_to_square_law(flow.transport(uniforms(), mode="relabel")) <= 0.04


@pytest.mark.parametrize(
    ("labeller", "message"),
    [
        (lambda y, other, context: torch.ones(3), r"labeller must give \(10,\) probabilities.*got \(3,\)"),
        (lambda y, other, context: torch.full((10,), 1.5), r"in \[0, 1\].*from 1.5 to 1.5"),
        (lambda y, other, context: torch.full((10,), math.nan), r"in \[0, 1\]"),
    ],
)
def test_labels_of_the_wrong_kind_are_refused(line, labeller, message):
    with pytest.raises(ValueError, match=message):
        line.relabel(labeller, *torch.rand(2, 10, 1), progress=False)


def test_more_rounds_than_there_are_is_refused(line, two_rounds):
    with pytest.raises(ValueError, match="rounds=3 is more than the 2 this flow has: add rounds"):
        two_rounds.transport(uniforms(5), mode="relabel", rounds=3)
    with pytest.raises(ValueError, match="equally many draws: got 4 and 5"):
        line.relabel(larger, torch.rand(4, 1), torch.rand(5, 1))
    with pytest.raises(ValueError, match="needs mode='reapply' or mode='relabel'"):
        line.transport(uniforms(5), rounds=2)


# -- distillation ---------------------------------------------------------------------------------------------------


def test_a_student_takes_one_evaluation_and_ends_where_its_teacher_does(line, tmp_path):
    student = line.distill(line_pairs(seed=9), progress=False)
    found = student.metadata["distilled"]
    assert student.evaluations == 1
    assert found["teacher_evaluations"] == line.evaluations > 1
    y = uniforms(5000)
    taught, learned = line.transport(y), student.transport(y)
    error = float((learned - taught).square().mean().sqrt() / (taught - y).square().mean().sqrt())
    assert error <= 0.06
    assert found["error"] == pytest.approx(error, rel=0.5)
    assert ks_to_square_law(learned) <= 0.04
    assert_same(student.win_probability(y), line.win_probability(y))
    student.save_pretrained(tmp_path)
    again = PreferenceFlow.from_pretrained(tmp_path)
    assert_same(again.transport(y), learned)
    assert again.evaluations == 1
    # Its path is a straight line, and a step is all there is.
    states = student.trajectory(y[:7], times=[0.0, 0.25, 1.0])
    torch.testing.assert_close(states[1], torch.lerp(states[0], states[2], 0.25), atol=1e-6, rtol=0)
    assert student.straightness(y) == 0.0
    with pytest.raises(ValueError, match="no meaning for a distilled flow"):
        student.transport(y, steps=2)


def test_all_rounds_fit_into_one_evaluation(two_rounds):
    student = two_rounds.distill(uniforms(), mode="relabel", progress=False)
    assert ks_to_square_law(student.transport(uniforms()), power=4) <= 0.05
    assert student.metadata["distilled"]["teacher_evaluations"] == 2 * two_rounds.evaluations


@pytest.mark.slow
def test_a_distilled_context_still_steers():
    teacher = PreferenceFlow.fit(compass_pairs(), QUICK, progress=False)
    student = teacher.distill(compass_pairs(seed=2), progress=False)
    assert compass_gain(student) == pytest.approx(compass_gain(teacher), rel=0.05)
    assert abs(compass_gain(student, permute=True)) < 0.1 * compass_gain(teacher)


# -- guidance -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compass() -> PreferenceFlow:
    return PreferenceFlow.fit(compass_pairs(), QUICK.replace(context_free=True), progress=False)


def gain(flow: PreferenceFlow, **options) -> float:
    y, context = rejected_and_context(3000)
    return float(((flow.transport(y, context, **options) - y) * context).sum(1).mean())


def test_guidance_goes_from_no_context_to_beyond_it(compass, tmp_path):
    gains = [gain(compass, guidance=weight) for weight in (0.0, 0.5, 1.0, 1.5)]
    assert abs(gains[0]) < 0.1 * gains[2]  # without its context the compass has no direction
    assert gains[0] < gains[1] < gains[2] < gains[3]
    assert gain(compass, guidance=1.0) == gain(compass)
    compass.save_pretrained(tmp_path)
    assert gain(PreferenceFlow.from_pretrained(tmp_path), guidance=1.5) == gains[3]


def test_guidance_without_its_field_is_refused_with_the_way_out():
    flow = PreferenceFlow.fit(compass_pairs(200), FlowConfig(residual=False), progress=False)
    with pytest.raises(ValueError, match=r"guidance=2 needs a field without contexts.*context_free=True"):
        gain(flow, guidance=2.0)
    with pytest.raises(ValueError, match="these pairs have none"):
        PreferenceFlow.fit(line_pairs(100), FlowConfig(context_free=True), progress=False)


def test_the_win_gradient_is_the_derivative_of_log_b(line):
    u = torch.linspace(0.1, 0.9, 9)[:, None]
    step = 1e-2
    ahead, behind = (line.win_probability(u + sign * step).log() for sign in (1, -1))
    torch.testing.assert_close(line.win_gradient(u).flatten(), (ahead - behind) / (2 * step), rtol=0.05, atol=0.05)


def test_the_win_gradient_raises_b_beyond_the_pass_and_is_a_pass_for_gaussians(compass):
    y, context = rejected_and_context(2000)
    means = [float(compass.win_probability(compass.transport(y, context, win_gradient=a), context).mean())
             for a in (-1.0, 0.0, 1.0)]  # fmt: skip
    assert means[0] < means[1] < means[2]
    # Standard normal outputs, logit of P(y > y') = 0.4 (y - y'): p1 has its mean at E[y b(y)] 2 = 0.2 to first order.
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 20_000, 1, generator=generator)
    first = torch.rand(20_000, 1, generator=generator) < torch.sigmoid(0.4 * (one - other))
    pairs = EncodedPairs(torch.where(first, one, other), torch.where(first, other, one))
    flow = PreferenceFlow.fit(pairs, FlowConfig(residual=False), progress=False)
    y = torch.randn(20_000, 1, generator=generator)
    still = float((flow.transport(y) - y).mean())
    steered = float((flow.transport(y, win_gradient=1.0) - y).mean())
    assert still == pytest.approx(0.2, abs=0.03)
    assert steered == pytest.approx(2 * still, rel=0.15)


# -- one pass, by hand ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stretched() -> PreferenceFlow:
    """Fit a flow of Euler steps on outputs whose second coordinate is in units a hundred times smaller."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 300, 2, generator=generator) * torch.tensor([1.0, 100.0])
    first = torch.rand(300, 1, generator=generator) < torch.sigmoid((one - other) @ torch.tensor([[1.0], [0.02]]))
    pairs = EncodedPairs(torch.where(first, one, other), torch.where(first, other, one))
    config = FlowConfig(residual=False, solver="euler", steps=3, source="rejected")
    return PreferenceFlow.fit(pairs, config, progress=False)


def test_steps_and_strength_are_those_asked_for(stretched):
    y = torch.tensor([[0.5, -20.0], [-1.0, 150.0], [2.0, 3.0]])
    one = y + stretched.velocity(0.0, y)
    torch.testing.assert_close(stretched.transport(y, steps=1), one)
    half = y + stretched.velocity(0.0, y) / 2
    two = half + stretched.velocity(0.5, half) / 2
    torch.testing.assert_close(stretched.transport(y, steps=2), two)
    assert not torch.allclose(one, two, rtol=1e-4)
    torch.testing.assert_close(stretched.transport(y, steps=2, strength=0.5), half)
    torch.testing.assert_close(stretched.transport(y, steps=2, strength=3.0), y + 3 * (two - y))
    torch.testing.assert_close(stretched.transport(y), stretched.transport(y, steps=stretched.steps))


def test_the_win_gradient_is_in_the_outputs_units(stretched):
    y = torch.tensor([[0.5, -20.0], [-1.0, 150.0], [2.0, 3.0]])
    apart = stretched.transport(y, steps=1, win_gradient=0.7) - stretched.transport(y, steps=1)
    variance = (stretched.normalizer.displacement * stretched.normalizer.scale).cpu().square() / 2
    assert float(variance[1] / variance[0]) > 1000
    torch.testing.assert_close(apart, 0.7 * variance * stretched.win_gradient(y), rtol=1e-3, atol=1e-3)


def test_a_round_of_a_flow_from_losers_is_gated(stretched):
    y = torch.randn(200, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 100.0])
    gated = stretched.transport(y, mode="gated")
    assert 0.2 < float((gated == y).all(1).float().mean()) < 0.8
    assert torch.equal(stretched.transport(y, mode="relabel"), gated)
    assert torch.equal(stretched.transport(y, mode="reapply"), stretched.transport(y))
    from_both = PreferenceFlow.fit(line_pairs(60), FlowConfig(residual=False), progress=False)
    u = uniforms(50)
    assert torch.equal(from_both.transport(u, mode="relabel"), from_both.transport(u))


def test_soft_labels_of_a_round_say_how_sure_the_likelier_order_is(stretched, monkeypatch):
    seen, fit = [], PreferenceFlow.fit

    def watched(pairs, *args, **kwargs):
        seen.append(pairs)
        return fit(pairs, *args, **kwargs)

    monkeypatch.setattr(PreferenceFlow, "fit", watched)
    y, other = torch.randn(2, 40, 2, generator=torch.Generator().manual_seed(2))
    asked = []

    def soft(one, two, context):
        asked.append((one.clone(), two.clone()))
        return torch.sigmoid(3 * (one - two)[:, 0])

    stretched.relabel(soft, y, other, check=0, progress=False)
    one, two = asked[0]
    label = torch.sigmoid(3 * (one - two)[:, 0])
    torch.testing.assert_close(seen[0].chosen, torch.where((label >= 0.5)[:, None], one, two))
    torch.testing.assert_close(seen[0].rejected, torch.where((label >= 0.5)[:, None], two, one))
    torch.testing.assert_close(seen[0].probability, (label - 0.5).abs() + 0.5)
    stretched.relabel(lambda one, two, context: (one > two)[:, 0], y, other, check=0, progress=False)
    assert seen[1].probability is None
    assert bool((seen[1].chosen[:, 0] >= seen[1].rejected[:, 0]).all())


# -- what is said of a pass -----------------------------------------------------------------------------------------


def test_straightness_of_a_translation_is_nought_and_of_a_turn_is_known(line):
    rejected = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    shift = PreferenceFlow.fit(
        EncodedPairs(rejected + 3, rejected), FlowConfig(source="rejected", residual=False), progress=False
    )
    assert shift.straightness(rejected) < 1e-3
    crossing = PreferenceFlow.fit(
        EncodedPairs(-rejected, rejected), FlowConfig(source="rejected", residual=False, sigma=0.3), progress=False
    )
    assert crossing.straightness(rejected) > 0.1  # everything passes through the middle, where it is turned back
    assert line.straightness(uniforms(500)) < 0.2


@pytest.mark.slow
def test_ot_paths_are_straighter_than_independent_ones():
    generator = torch.Generator().manual_seed(0)
    rejected = torch.randn(3000, 2, generator=generator)
    chosen = torch.randn(3000, 2, generator=generator) * 0.3 + torch.tensor([3.0, 0.0])
    found = {
        name: PreferenceFlow.fit(
            EncodedPairs(chosen, rejected), QUICK.replace(source="rejected", coupling=name), progress=False
        ).straightness(rejected)
        for name in ("independent", "ot")
    }
    assert found["ot"] < 0.7 * found["independent"]


def test_evaluations_of_a_pass():
    for solver, stages in (("euler", 1), ("midpoint", 2), ("rk4", 4)):
        flow = PreferenceFlow((1,), config=FlowConfig(solver=solver, steps=3))
        assert flow.evaluations == 3 * stages
    adaptive = PreferenceFlow.fit(line_pairs(200), FlowConfig(residual=False, solver="dopri5"), progress=False)
    assert adaptive.evaluations > 6


def test_velocity_is_the_derivative_of_the_trajectory(line):
    y = uniforms(200)
    before, at, after = line.trajectory(y, times=[0.49, 0.5, 0.51])
    torch.testing.assert_close(line.velocity(0.5, at), (after - before) / 0.02, rtol=0.05, atol=0.03)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]: got 2"):
        line.velocity(2, y)


# -- trouble --------------------------------------------------------------------------------------------------------


def test_rows_the_field_loses_keep_their_last_state_and_are_named(line, monkeypatch):
    whole = line.field.at

    def broken(context):
        velocity = whole(context)

        def at(t, y):
            value = velocity(t, y)
            return torch.where((y > 1.5) & (torch.tensor(t) > 0.4), math.nan, value)

        return at

    monkeypatch.setattr(line.field, "at", broken)
    y = torch.tensor([[0.2], [0.99], [0.5], [0.999]])
    with pytest.warns(NonFiniteWarning, match=r"for 2 of 4 rows \(1, 3\)") as caught:
        result = line.transport(y, steps=8)
    (warning,) = [found.message for found in caught if isinstance(found.message, NonFiniteWarning)]
    assert warning.finite.tolist() == [True, False, True, False]
    assert bool(torch.isfinite(result).all())
    with pytest.raises(FloatingPointError, match=r"2 of 4 rows.*on_failure='keep'"):
        line.transport(y, steps=8, on_failure="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line.transport(y[:1], steps=8)
    with pytest.raises(ValueError, match="on_failure must be one of keep, raise: got 'stop'"):
        line.transport(y, on_failure="stop")


def test_an_adaptive_solver_survives_a_lost_row(line, monkeypatch):
    flow = pfm.PreferenceFlow.fit(line_pairs(500), FlowConfig(residual=False, solver="dopri5"), progress=False)
    whole = flow.field.at

    def broken(context):
        velocity = whole(context)
        return lambda t, y: torch.where(y > 1.5, math.nan, velocity(t, y))

    y = torch.tensor([[0.2], [0.99]])
    expected = flow.transport(y[:1])
    monkeypatch.setattr(flow.field, "at", broken)
    with pytest.warns(NonFiniteWarning):
        result = flow.transport(y)
    torch.testing.assert_close(result[:1], expected, atol=1e-3, rtol=0)
    assert bool(torch.isfinite(result).all())


# -- reduced precision and compilation ------------------------------------------------------------------------------


def test_bfloat16_training_learns_the_same():
    # Slow where the machine has no such unit, so small: what is checked is that the loss is the same.
    config = FlowConfig(epochs=4, hidden=32, layers=2)
    losses = {
        dtype: PreferenceFlow.fit(line_pairs(2000), config.replace(dtype=dtype), progress=False).metadata["training"]
        for dtype in ("float32", "bfloat16")
    }
    assert losses["float32"]["loss"] < losses["float32"]["plain_loss"]
    assert losses["bfloat16"]["loss"] == pytest.approx(losses["float32"]["loss"], rel=0.02)
    assert losses["bfloat16"]["validation"] != losses["float32"]["validation"]


def test_on_the_cpu_bfloat16_is_for_the_training_alone(line, monkeypatch):
    y = torch.randn(8, 1)
    exact = line.to("cpu").transport(y)
    monkeypatch.setattr(line, "config", line.config.replace(dtype="bfloat16"))
    assert torch.equal(line.transport(y), exact)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("name", ["paired", "independent", "ot"])
def test_cuda_learns_the_same(name):
    config = FlowConfig(device="cuda", coupling=name, epochs=16)
    flow = PreferenceFlow.fit(line_pairs(), config, progress=False)
    assert flow.device.type == "cuda"
    assert ks_to_square_law(flow.transport(uniforms()).cpu()) <= 0.03
    compass = PreferenceFlow.fit(compass_pairs(), QUICK.replace(device="cuda"), progress=False)
    assert compass_gain(compass.to("cpu")) == pytest.approx(compass_gain(compass), rel=1e-2)


# -- the gate's draws ------------------------------------------------------------------------------------------------


def test_the_gate_draws_anew_for_contexts_rounds_and_seeds():
    same_row = torch.zeros(20_000, 3)
    contexts = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(1))
    by_context = gate_uniforms(same_row, contexts, 0, 0)
    assert float(by_context.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(by_context.var()) == pytest.approx(1 / 12, rel=0.03)
    rows = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(2))
    draws = [gate_uniforms(rows, None, seed, number) for seed, number in ((0, 0), (0, 1), (1, 0), (-1, 0))]
    assert torch.equal(draws[0], gate_uniforms(rows, None, 0, 0))
    for first, second in itertools.combinations([by_context, *draws], 2):
        assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.03


def test_rounds_of_gates_reach_the_best_of_four():
    """Two gated rounds with exact parts: each keeps with b, else draws a winner of the round before."""
    generator = torch.Generator().manual_seed(3)
    y = torch.rand(40_000, 1, generator=generator)
    for number in range(2):
        power = 2**number  # the law so far is that of best of this many
        kept = gate_uniforms(y, None, 0, number) < (y**power).flatten()
        # From losers, law p0, the exact map carries to winners; its quantile function is known.
        loser_rank = 1 - (1 - y**power) ** 2
        winner = loser_rank ** (1 / (2 * power))
        y = torch.where(kept[:, None], y, winner)
    assert ks_to_square_law(y, power=4) <= 0.012


def test_distillation_is_judged_on_prompts_it_has_not_seen():
    config = LIGHT.replace(validation_share=0.25, seed=4)
    prompt = torch.tensor([5, 5, 9, 9, 2, 2, 7, 7]).repeat(2)
    order, count = held_out_first(16, prompt, config)
    assert sorted(order.tolist()) == list(range(16))
    assert not set(prompt[order[:count]].tolist()) & set(prompt[order[count:]].tolist())
    assert count == 4
    order, count = held_out_first(16, None, config)
    assert (count, len(order)) == (4, 16)


@pytest.mark.parametrize("seed", [True, 0.5, "1"])
def test_a_seed_of_the_gate_is_a_whole_number(line, seed):
    with pytest.raises(ValueError, match="seed must be a whole number"):
        line.transport(uniforms(3), seed=seed)
