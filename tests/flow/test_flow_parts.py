"""Small parts of a flow: sizes, steps, summary, what a student takes over, what the hub is asked for."""

import copy

import pytest
import torch

from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm.flow import preference_flow
from pfm.flow.fields import SMALL, Field
from pfm.flow.holdout import held_out_first

CLOSED = FlowConfig(residual=False, device="cpu")
SIDES = torch.tensor([[1.0], [-1.0]]).repeat(40, 1)  # contexts


def turned_pairs(seed: int = 0) -> EncodedPairs:
    """Draw pairs in the plane under contexts +1 and -1, which say in which direction the first number is preferred."""
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, len(SIDES), 2, generator=generator)
    first = (SIDES * (one - other)[:, :1]) > 0
    return EncodedPairs(
        torch.where(first, one, other), torch.where(first, other, one), SIDES, group=torch.arange(len(SIDES))
    )


@pytest.fixture(scope="module")
def turned() -> PreferenceFlow:
    return PreferenceFlow.fit(turned_pairs(), CLOSED.replace(context_free=True), progress=False)


@pytest.mark.parametrize(("dimension", "hidden", "layers"), [(2, 256, 4), (SMALL, 256, 4), (SMALL + 1, 512, 3)])
def test_the_size_of_the_network_goes_by_that_of_the_outputs(dimension, hidden, layers):
    def shapes(field: Field) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in field.state_dict().items()}

    assert shapes(PreferenceFlow((dimension,), 1).field) == shapes(Field(dimension, 1, hidden, layers))
    given = PreferenceFlow((dimension,), 1, FlowConfig(hidden=8, layers=2))
    assert shapes(given.field) == shapes(Field(dimension, 1, 8, 2))


def test_steps_are_those_chosen_else_those_configured_else_one():
    assert PreferenceFlow((2,), 0).steps == 1
    assert PreferenceFlow((2,), 0, FlowConfig(steps=3)).steps == 3
    assert PreferenceFlow((2,), 0, FlowConfig(steps=3), metadata={"steps": 5}).steps == 5


def test_a_trajectory_is_that_of_the_field_with_its_context(turned):
    y, context = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)), SIDES[:6]
    assert "context_free" in turned.metadata
    for time in (0.5, 1.0):
        states = turned.trajectory(y, context, times=[time])
        torch.testing.assert_close(states[0], turned.transport(y, context, strength=time), atol=1e-5, rtol=0)


def test_a_student_is_judged_under_its_contexts_and_knows_what_its_teacher_does(turned):
    config = {
        "epochs": 30,
        "hidden": 16,
        "layers": 1,
        "batch_size": 32,
        "seed": 3,
        "device": "cpu",
        "context_free": True,
    }
    pairs = turned_pairs(1)
    student = turned.distill(pairs, config=config, progress=False)
    assert (student.config.seed, student.config.hidden, student.config.layers) == (3, 16, 1)
    assert (student.config.solver, student.config.steps, student.context_free) == ("euler", 1, None)
    for name in ("encoder", "dimension", "context_dimension", "pairs", "prompts", "version", "win", "unit_norm"):
        assert name in turned.metadata
        assert student.metadata[name] == turned.metadata[name]
    y, context = torch.cat([pairs.chosen, pairs.rejected]), SIDES.repeat(2, 1)
    order, count = held_out_first(len(y), pairs.group.repeat(2), student.config)
    held = order[:count]
    taught = turned.transport(y, context)[held]
    apart = student.transport(y, context)[held] - taught
    moved, spread = taught - y[held], taught - taught.mean(0)
    distilled = student.metadata["distilled"]
    assert distilled["error"] == pytest.approx(float(apart.norm() / moved.norm()), rel=1e-4)
    assert distilled["relative_error"] == pytest.approx(float(apart.norm() / spread.norm()), rel=1e-4)
    assert distilled["teacher_evaluations"] == turned.evaluations
    assert distilled["error"] < 0.5


def test_the_summary_says_what_was_kept_dropped_and_configured():
    win = {"accuracy": 0.75, "z": 2.345}
    kept = {
        "pairs": 120, "prompts": 30, "seconds": 1.5, "residual_kept": True, "training": {"gain": 0.62}, "ridge": 0.01,
        "steps": 4, "steps_error": 0.0123, "win": win,
    }  # fmt: skip
    flow = PreferenceFlow((2, 3), 5, FlowConfig(solver="rk4"), metadata=kept)
    flow.win.margin.fill_(0.125)
    assert flow.summary().splitlines() == [
        "PreferenceFlow on outputs (2, 3), context 5",
        "  data   120 pairs of 30 prompts, 1.5 s",
        "  field  linear part at ridge 0.01; residual kept at 62%",
        "  path   rk4, 4 steps, 1.2% from the exact solution",
        "  b      orders 75.0% of held-out pairs rightly, z-score 2.3 against chance; guard at a difference of 0.125",
    ]
    dropped = kept | {"residual_kept": False, "ridge": None, "steps_error": None, "win": win | {"z": None}}
    lines = PreferenceFlow((2,), 0, metadata=dropped).summary().splitlines()
    assert lines[0].endswith("outputs (2,), context none")
    assert lines[2] == "  field  linear part without slope; residual not confirmed by held-out prompts, dropped"
    assert lines[3].endswith(", 4 steps")
    assert "held-out pairs rightly, all of them; guard at" in lines[4]
    for config, said in (
        (FlowConfig(residual=False), "; no residual, as configured"),
        (FlowConfig(linear=False), "  field  no linear part, as configured; "),
    ):
        assert said in PreferenceFlow((2,), 0, config, metadata=dropped).summary()


def test_the_hub_is_asked_with_the_options_that_were_given(monkeypatch, tmp_path):
    asked = {}

    def noted(name: str, **options: object) -> tuple[object, object]:
        asked.update(options, name=name)
        raise FileNotFoundError("no such repository")

    monkeypatch.setattr(preference_flow, "download", noted)
    monkeypatch.chdir(tmp_path)
    options = {
        "revision": "v1", "token": "secret", "cache_dir": "here", "force_download": True, "local_files_only": True,
    }  # fmt: skip
    with pytest.raises(FileNotFoundError, match="no such repository"):
        PreferenceFlow.from_pretrained("owner/flow", **options)
    assert asked == options | {"name": "owner/flow"}
    with pytest.raises(TypeError, match=r"PreferenceFlow\.from_pretrained"):
        PreferenceFlow.from_pretrained("owner/flow", revison="v1")
    asked.clear()
    for name in ("owner/flow/further", "../flow", "owner/fl ow", "/owner"):
        with pytest.raises(FileNotFoundError, match="is not a folder"):
            PreferenceFlow.from_pretrained(name)
    assert not asked
    with pytest.raises(ValueError, match=r"^map_location="):
        PreferenceFlow.from_pretrained("owner/flow", map_location="gpu")


def test_a_round_is_drawn_and_labelled_under_its_contexts(turned):
    y, other = torch.randn(2, len(SIDES), 2, generator=torch.Generator().manual_seed(2))
    seen = []

    def first_by_side(one, two, context):
        seen.append((one, two, context))
        return (context * (one - two)[:, :1]).flatten() > 0

    further = turned.relabel(first_by_side, y, other, SIDES, config=CLOSED, check=0, progress=False)
    assert further.rounds == 2
    for found, wanted in zip(seen[0], (turned.transport(y, SIDES), turned.transport(other, SIDES), SIDES), strict=True):
        assert torch.equal(found, wanted)
    first = turned.transport(y, SIDES)
    assert not torch.allclose(turned.transport(first, SIDES), further.later[0].transport(first, SIDES))
    assert torch.equal(further.transport(y, SIDES, mode="relabel"), further.later[0].transport(first, SIDES))


def test_straightness_is_of_the_field_alone():
    y, other = torch.randn(2, 80, 2, generator=torch.Generator().manual_seed(3))
    first = (y > other)[:, :1]
    flow = PreferenceFlow.fit(EncodedPairs(y.where(first, other), other.where(first, y)), CLOSED, progress=False)
    assert float(flow.win_gradient(y).norm(dim=1).min()) > 0.01
    twin = copy.deepcopy(flow)
    twin.win = preference_flow.WinHead(2, 0)  # not fitted: b is one half everywhere
    assert not bool(twin.win_gradient(y).any())
    assert twin.straightness(y) == flow.straightness(y)


def test_a_fit_that_is_stopped_keeps_the_state_of_both_fields(monkeypatch, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    config = FlowConfig(epochs=1, hidden=4, layers=1, context_free=True, device="cpu")
    monkeypatch.setattr(preference_flow.WinHead, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        PreferenceFlow.fit(turned_pairs(), config, progress=False, checkpoint=tmp_path / "state")
    monkeypatch.undo()
    names = {path.name for path in (tmp_path / "state").iterdir()}
    assert {path.name for path in (tmp_path / "state" / "context_free").iterdir()} == names - {"context_free"} != set()
    PreferenceFlow.fit(turned_pairs(), config, progress=False, checkpoint=tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_a_fit_without_progress_shows_nothing(capsys):
    config = FlowConfig(epochs=1, hidden=4, layers=1, context_free=True, device="cpu")
    PreferenceFlow.fit(turned_pairs(), config, progress=False)
    assert capsys.readouterr().err == ""
