"""PreferenceFlow against known answers: the 1-D oracle, contexts, controls, saving, resuming."""

import json
import math

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

import pfm
from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm.flow.couplings import make_coupling
from pfm.flow.fields import Field, Normalizer
from pfm.flow.problem import FlowProblem
from pfm.flow.training import train_residual


@pytest.fixture(scope="module")
def rejected_line(tmp_path_factory) -> PreferenceFlow:
    config = FlowConfig(source="rejected", epochs=24, batch_size=1024)
    return shared_flow(
        tmp_path_factory, "rejected_line", lambda: PreferenceFlow.fit(line_pairs(), config, progress=False)
    )


@pytest.fixture(scope="module")
def reference_line(tmp_path_factory) -> PreferenceFlow:
    config = FlowConfig(epochs=8)
    return shared_flow(
        tmp_path_factory, "reference_line", lambda: PreferenceFlow.fit(line_pairs(), config, progress=False)
    )


def test_rejected_source_learns_the_closed_form_map(rejected_line):
    u = torch.linspace(0.01, 1, 100)[:, None]  # below, the map's slope sqrt(1 / 2u) has no bound
    exact = torch.sqrt(1 - (1 - u) ** 2)
    assert float((rejected_line.transport(u) - exact).abs().max()) <= 0.03
    assert float(rejected_line.transport(uniforms()).mean()) == pytest.approx(math.pi / 4, abs=0.01)


def test_reference_source_carries_the_reference_to_the_winners_law(reference_line):
    assert ks_to_square_law(uniforms()) > 0.2  # it does start elsewhere
    assert ks_to_square_law(reference_line.transport(uniforms())) <= 0.03


def test_gated_rejected_source_reaches_the_same_law(rejected_line):
    y = uniforms()
    assert ks_to_square_law(rejected_line.transport(y, mode="gated")) <= 0.03
    assert ks_to_square_law(rejected_line.transport(y)) > 0.1  # ungated it overshoots
    with pytest.warns(UserWarning, match="exact for flows with source='rejected'"):
        PreferenceFlow.fit(line_pairs(50), FlowConfig(residual=False)).transport(y[:3], mode="gated")


def test_win_probability_is_the_exact_one(reference_line):
    u = torch.linspace(0, 1, 101)[:, None]
    assert float((reference_line.win_probability(u) - u[:, 0]).abs().max()) <= 0.05


def test_best_of_m_in_one_pass():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3000, 8, generator=generator)
    rows = torch.arange(values.numel()).reshape(values.shape)
    pairs = EncodedPairs.from_table(
        values.reshape(-1, 1), rows.gather(1, values.argmax(1, keepdim=True)).flatten(),
        rows.gather(1, values.argmin(1, keepdim=True)).flatten(),
        contexts=torch.zeros(3000, 1), context_index=torch.arange(3000),
        candidates=[(i, rows[i], values[i]) for i in range(3000)],
    )  # fmt: skip
    flow = PreferenceFlow.fit(pairs, QUICK.replace(best_of=4), progress=False)
    assert ks_to_square_law(flow.transport(uniforms(), torch.zeros(1)), power=4) <= 0.04


# -- contexts and controls ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compass(tmp_path_factory) -> PreferenceFlow:
    return shared_flow(tmp_path_factory, "compass", lambda: PreferenceFlow.fit(compass_pairs(), QUICK, progress=False))


def exact_compass_gain() -> float:
    pairs = compass_pairs(50_000, seed=5)
    assert pairs.context is not None
    return float(((pairs.chosen - pairs.rejected) * pairs.context).sum(1).mean() / 2)


def test_a_context_steers_and_a_permuted_context_does_not(compass):
    exact = exact_compass_gain()
    assert exact > 0.4
    assert compass_gain(compass) == pytest.approx(exact, rel=0.08)
    assert abs(compass_gain(compass, permute=True)) < 0.1 * exact


def test_swapped_labels_mirror_and_shuffled_labels_gain_nothing(compass):
    gain = compass_gain(compass)
    brief = QUICK.replace(epochs=10)
    swapped = PreferenceFlow.fit(compass_pairs().swap(), brief, progress=False)
    assert compass_gain(swapped) == pytest.approx(-gain, rel=0.1)
    shuffled = PreferenceFlow.fit(compass_pairs().shuffle_labels(1), brief, progress=False)
    assert abs(compass_gain(shuffled)) < 0.08 * gain


def linear_pairs(count: int = 3000, dimension: int = 24, seed: int = 0) -> EncodedPairs:
    """Draw unit vectors of which the one further along the first axis tends to win; 5 pairs a prompt."""
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.nn.functional.normalize(torch.randn(2, count, dimension, generator=generator), dim=2)
    first = (torch.rand(count, generator=generator) < torch.sigmoid(12 * (one - other)[:, 0]))[:, None]
    return EncodedPairs(torch.where(first, one, other), torch.where(first, other, one), group=torch.arange(count) // 5)


@pytest.fixture(scope="module")
def linear() -> PreferenceFlow:
    return PreferenceFlow.fit(linear_pairs(), FlowConfig(epochs=4), progress=False)


def test_b_orders_held_out_pairs_and_guards_only_what_is_confirmed(linear):
    held = linear_pairs(2000, seed=3)
    right = linear.win_probability(held.chosen) > linear.win_probability(held.rejected)
    assert float(right.float().mean()) > 0.7
    assert linear.guard_margin < 0.3
    shuffled = PreferenceFlow.fit(linear_pairs().shuffle_labels(2), FlowConfig(residual=False), progress=False)
    order = torch.sign(shuffled.win_probability(held.chosen) - shuffled.win_probability(held.rejected))
    assert abs(float(order.mean())) < 0.2  # ties, as when b is constant, count half
    assert shuffled.guard_margin == math.inf
    swapped = PreferenceFlow.fit(linear_pairs().swap(), FlowConfig(residual=False), progress=False)
    right = swapped.win_probability(held.chosen) > swapped.win_probability(held.rejected)
    assert float(right.float().mean()) < 0.3


def test_b_is_calibrated_on_held_out_pairs(linear):
    held = linear_pairs(4000, seed=4)
    b = torch.cat([linear.win_probability(held.chosen), linear.win_probability(held.rejected)])
    won = torch.cat([torch.ones(4000), torch.zeros(4000)])
    order = b.argsort()
    for part in order.chunk(8):
        assert float(b[part].mean()) == pytest.approx(float(won[part].mean()), abs=0.05)


def test_alignment_points_where_the_flow_moves(linear):
    y = linear_pairs(16, seed=8).chosen
    aligned = linear.alignment(y)
    assert torch.corrcoef(torch.stack([aligned, y[:, 0]]))[0, 1] > 0.9


def test_an_unneeded_residual_is_dropped_and_a_needed_one_kept(compass):
    generator = torch.Generator().manual_seed(0)
    rejected, chosen = torch.randn(2, 2000, 24, generator=generator)
    gaussian = EncodedPairs(chosen * 0.7 + 0.5, rejected)  # the linear part is the exact field here
    flow = PreferenceFlow.fit(gaussian, FlowConfig(source="rejected", epochs=4), progress=False)
    assert flow.metadata["residual_kept"] is False
    assert flow.field.residual is None
    moved = flow.transport(torch.randn(20_000, 24, generator=generator))
    torch.testing.assert_close(moved.mean(0), torch.full((24,), 0.5), atol=0.06, rtol=0)
    torch.testing.assert_close(moved.std(0), torch.full((24,), 0.7), atol=0.06, rtol=0)
    assert compass.metadata["residual_kept"] is True
    assert compass.metadata["training"]["loss"] < compass.metadata["training"]["plain_loss"]


def test_unit_vectors_stay_on_the_sphere(linear):
    assert linear.metadata["unit_norm"] is True
    moved = linear.transport(linear_pairs(10, seed=8).rejected, strength=2.0)
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(10), atol=1e-6, rtol=0)


# -- applying -------------------------------------------------------------------------------------------------------


def test_a_row_depends_on_itself_alone(compass):
    y, context = rejected_and_context(2500)
    whole = compass.transport(y, context)
    for row in (0, 1023, 1024, 2499):
        alone = compass.transport(y[row : row + 1], context[row])
        torch.testing.assert_close(alone[0], whole[row], atol=1e-5, rtol=0)
    order = torch.randperm(2500, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(compass.transport(y[order], context[order]), whole[order], atol=1e-5, rtol=0)


def test_which_rows_the_gate_keeps_does_not_depend_on_their_order(rejected_line):
    y = uniforms(2500)
    order = torch.randperm(2500, generator=torch.Generator().manual_seed(0))
    kept = rejected_line.transport(y, mode="gated")
    assert 0.3 < float((kept == y).float().mean()) < 0.7
    torch.testing.assert_close(rejected_line.transport(y[order], mode="gated"), kept[order], atol=1e-5, rtol=0)


def test_strength_is_partial_time_below_one_and_a_multiple_above(compass):
    y, context = rejected_and_context(20)
    end = compass.transport(y, context)
    torch.testing.assert_close(compass.transport(y, context, strength=0.0), y)
    torch.testing.assert_close(compass.transport(y, context, strength=2.5), y + 2.5 * (end - y))
    path = compass.trajectory(y, context, times=torch.tensor([0.0, 0.5, 1.0]))
    assert path.shape == (3, 20, 2)
    torch.testing.assert_close(path[0], y, atol=1e-6, rtol=0)
    torch.testing.assert_close(compass.transport(y, context, strength=0.5), path[1], atol=5e-3, rtol=0)
    torch.testing.assert_close(path[2], end, atol=5e-3, rtol=0)


def test_reapply_is_repeated_passes(compass):
    y, context = rejected_and_context(20)
    twice = compass.transport(compass.transport(y, context), context)
    torch.testing.assert_close(compass.transport(y, context, mode="reapply", rounds=2), twice, atol=1e-5, rtol=0)


def test_the_chosen_number_of_steps_is_close_to_many(compass):
    assert compass.metadata["steps_error"] <= compass.config.tolerance
    y, context = rejected_and_context(500)
    moved = compass.transport(y, context)
    exact = compass.transport(y, context, steps=256)
    distance = (exact - y).square().mean().sqrt()
    assert float((moved - exact).square().mean().sqrt() / distance) <= 2 * compass.config.tolerance


def test_an_empty_batch_gives_an_empty_batch(compass):
    assert compass.transport(torch.zeros(0, 2), torch.zeros(0, 2)).shape == (0, 2)
    assert compass.win_probability(torch.zeros(0, 2), torch.zeros(0, 2)).shape == (0,)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda f: f.transport(torch.zeros(2, 3), torch.zeros(2, 2)), r"y must be \(B, 2\).*got \(2, 3\)"),
        (lambda f: f.transport(torch.zeros(2, 2)), r"context \(B, 2\) is missing"),
        (lambda f: f.transport(torch.zeros(3, 2), torch.zeros(2, 2)), r"context must be \(3, 2\)"),
        (lambda f: f.transport(torch.full((1, 2), math.nan), torch.zeros(1, 2)), "y must be finite"),
        (lambda f: f.win_probability(torch.zeros(1, 2), torch.full((1, 2), math.inf)), "context must be finite"),
        (lambda f: f.transport(torch.zeros(1, 2), torch.zeros(1, 2), mode="twice"), "mode must be one of"),
        (lambda f: f.transport(torch.zeros(1, 2), torch.zeros(1, 2), rounds=2), "mode='reapply'"),
        (lambda f: f.transport(torch.zeros(1, 2), torch.zeros(1, 2), steps=0), "steps must be"),
        (lambda f: f.transport(torch.zeros(1, 2), torch.zeros(1, 2), strength=-1), "strength must be"),
        (lambda f: f.trajectory(torch.zeros(1, 2), torch.zeros(1, 2), times=[0.5, 0.2]), "increasing"),
    ],
)
def test_bad_arguments_are_named(compass, call, told):
    with pytest.raises(ValueError, match=told):
        call(compass)


# -- fitting, saving, resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"sigmma": 0.1}, "did you mean 'sigma'"),
        ({"sigma": -0.1}, "sigma must be a number of at least 0: got -0.1"),
        ({"steps": 0}, "steps must be"),
        ({"solver": "rk5"}, "solver must be one of"),
        ({"source": "winner"}, "source must be one of"),
        ({"validation_share": 1.0}, "validation_share"),
        ({"batch_size": 0}, "batch_size"),
        ({"residual": "no"}, "residual must be true or false"),
        ({"device": "tpu"}, "device must be one of"),
    ],
)
def test_a_wrong_setting_is_refused(values, told):
    with pytest.raises(ValueError, match=told):
        PreferenceFlow.fit(line_pairs(20), values)


def test_fit_refuses_what_does_not_belong_together():
    with pytest.raises(TypeError, match=r"PreferencePairs\.encode"):
        PreferenceFlow.fit([("good", "bad")])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="validation must have the training pairs' event_shape"):
        PreferenceFlow.fit(line_pairs(20), validation=compass_pairs(20))
    with pytest.raises(ValueError, match="one pair is not enough"):
        PreferenceFlow.fit(EncodedPairs(torch.ones(1, 2), torch.zeros(1, 2)))


def test_one_prompt_falls_back_to_pairs_and_says_so():
    pairs = EncodedPairs(torch.randn(40, 3) + 1, torch.randn(40, 3), group=torch.zeros(40))
    with pytest.warns(UserWarning, match="one prompt"):
        flow = PreferenceFlow.fit(pairs, FlowConfig(residual=False), progress=False)
    assert torch.isfinite(flow.transport(torch.zeros(1, 3))).all()


def test_the_same_seed_gives_the_same_flow():
    config = FlowConfig(epochs=3, seed=4)
    flows = [PreferenceFlow.fit(compass_pairs(600), config, progress=False) for _ in range(2)]
    for name, value in flows[0].state_dict().items():
        torch.testing.assert_close(value, flows[1].state_dict()[name], atol=0, rtol=0, equal_nan=True)
    other = PreferenceFlow.fit(compass_pairs(600), config.replace(seed=5), progress=False)
    y = torch.zeros(1, 2)
    assert not torch.equal(flows[0].transport(y, y), other.transport(y, y))


def test_fitting_leaves_the_global_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    PreferenceFlow.fit(compass_pairs(100), FlowConfig(epochs=1), progress=False)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fixture", ["compass", "linear"])
def test_saved_and_loaded_is_the_same(fixture, request, tmp_path):
    flow = request.getfixturevalue(fixture)
    flow.save_pretrained(tmp_path / "flow")
    assert {path.suffix for path in (tmp_path / "flow").iterdir()} <= {".json", ".safetensors", ".md"}
    loaded = PreferenceFlow.from_pretrained(tmp_path / "flow")
    y = torch.randn(5, *flow.event_shape)
    context = torch.randn(5, flow.context_dimension) if flow.context_dimension else None
    torch.testing.assert_close(loaded.transport(y, context), flow.transport(y, context), atol=1e-6, rtol=0)
    torch.testing.assert_close(loaded.win_probability(y, context), flow.win_probability(y, context))
    assert loaded.metadata == json.loads(json.dumps(flow.metadata))
    assert loaded.config == flow.config
    assert loaded.guard_margin == flow.guard_margin


def test_a_damaged_checkpoint_is_refused_with_its_name(linear, compass, tmp_path):
    folder = tmp_path / "flow"
    linear.save_pretrained(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or was cut short"):
        PreferenceFlow.from_pretrained(folder)
    compass.save_pretrained(tmp_path / "other")
    (folder / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"does not fit its config\.json at .*expected shape"):
        PreferenceFlow.from_pretrained(folder)
    (folder / "config.json").write_text('{"event_shape": [2')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        PreferenceFlow.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        PreferenceFlow.from_pretrained(folder)


def residual_run(checkpoint=None, stop_after=None):
    pairs = compass_pairs(800)
    train, held = pairs.split(0.2, 0)
    config = FlowConfig(epochs=12, hidden=32, layers=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = Field(2, 2, 32, 2)
    normalizer = Normalizer(2, 2)
    normalizer.fit(train.chosen, train.rejected, train.context)
    couplings = [make_coupling(part, source="reference", coupling="paired", best_of=2) for part in (train, held)]
    seen = []

    def watch(update: int, loss: float) -> None:
        seen.append(update)
        if stop_after is not None and len(seen) == stop_after:
            raise KeyboardInterrupt

    log = train_residual(
        FlowProblem(field, normalizer, 0.05), couplings[0], couplings[1], config,
        checkpoint=checkpoint, progress=False, on_validation=watch,
    )  # fmt: skip
    return field, log


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path):
    whole, log = residual_run()
    with pytest.raises(KeyboardInterrupt):
        residual_run(tmp_path, stop_after=7)
    assert list(tmp_path.iterdir())
    resumed, resumed_log = residual_run(tmp_path)
    assert resumed_log == log
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=0, rtol=0)


def test_a_finished_fit_removes_its_checkpoint_and_one_stopped_late_keeps_it(tmp_path, monkeypatch):
    from pfm.flow.win import WinHead

    def stop(*_, **__):
        raise KeyboardInterrupt

    folder, config = tmp_path / "state", FlowConfig(epochs=3, hidden=16, layers=2)
    monkeypatch.setattr(WinHead, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        PreferenceFlow.fit(compass_pairs(300), config, progress=False, checkpoint=folder)
    assert list(folder.iterdir())
    monkeypatch.undo()
    PreferenceFlow.fit(compass_pairs(300), config, progress=False, checkpoint=folder)
    assert not folder.exists()


def test_a_perfect_order_can_be_saved(tmp_path):
    pairs = EncodedPairs(torch.rand(60, 2) + 3, torch.rand(60, 2))
    flow = PreferenceFlow.fit(pairs, FlowConfig(residual=False), progress=False)
    assert 1.645 < flow.metadata["win"]["z"] < 40
    assert "orders 100.0% of held-out pairs rightly, z-score" in flow.summary()
    flow.save_pretrained(tmp_path)
    assert PreferenceFlow.from_pretrained(tmp_path).metadata == json.loads(json.dumps(flow.metadata))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        residual_run(tmp_path, stop_after=2)
    with pytest.raises(ValueError, match="other data or another configuration"):
        PreferenceFlow.fit(compass_pairs(300), FlowConfig(epochs=2), progress=False, checkpoint=tmp_path)
    path = tmp_path / "training.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        residual_run(tmp_path)


def test_images_are_carried_in_their_shape():
    generator = torch.Generator().manual_seed(0)
    rejected = torch.rand(60, 2, 3, 3, generator=generator)
    flow = PreferenceFlow.fit(EncodedPairs(rejected + 0.5, rejected), FlowConfig(epochs=1), progress=False)
    assert flow.transport(rejected[:4]).shape == (4, 2, 3, 3)
    assert flow.trajectory(rejected[:4], times=[0.2, 0.7]).shape == (2, 4, 2, 3, 3)


def test_the_summary_tells_what_was_found(linear):
    assert "residual kept" in linear.summary() or "dropped" in linear.summary()
    assert "of held-out pairs rightly" in linear.summary()
    assert pfm.__all__


def test_pairs_that_repeat_each_other_can_be_fitted():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 3, 40, generator=generator).repeat(1, 50, 1)
    flow = PreferenceFlow.fit(
        EncodedPairs(chosen, rejected, group=torch.arange(150)), FlowConfig(residual=False), progress=False
    )
    assert bool(torch.isfinite(flow.transport(rejected)).all())
