"""Choosing how far to follow a flow, on held-out pairs, by a judge that the flow did not see."""

from __future__ import annotations

import json
import math

import pytest
import torch

import pfm
from pfm.flow import Setting, tune
from pfm.flow.tuning import DELETED, HeldOutWin, _Table, grid

DIMENSION = 4
PAIRS = 600


def pairs_of(seed: int, reward=lambda y: y[:, 0], count: int = PAIRS) -> pfm.EncodedPairs:
    one, two = torch.randn(2, count, DIMENSION, generator=torch.Generator().manual_seed(seed)) + 1
    first = (reward(one) > reward(two))[:, None]
    return pfm.EncodedPairs(torch.where(first, one, two), torch.where(first, two, one))


def fitted(pairs: pfm.EncodedPairs, **options) -> pfm.PreferenceFlow:
    return pfm.PreferenceFlow.fit(pairs, pfm.FlowConfig(residual=False, **options), progress=False)


@pytest.fixture(scope="module")
def flow() -> pfm.PreferenceFlow:
    return fitted(pairs_of(0))


@pytest.fixture(scope="module")
def held_out() -> pfm.EncodedPairs:
    return pairs_of(1)


@pytest.fixture(scope="module")
def judge(held_out) -> HeldOutWin:
    return HeldOutWin.fit(held_out, progress=False)


def nearness(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return 1 - (after - before).norm(dim=1) / 4


def test_the_strongest_setting_that_keeps_the_content_is_chosen(flow, held_out, judge):
    settings = [Setting(strength=strength) for strength in (0.5, 1.0, 2.0, 4.0)]
    found = tune(flow, held_out, at_least=0.6, content=nearness, judge=judge, settings=settings, progress=False)
    kept = {p.setting.strength: p.content.value for p in found.points if p.setting is not None}
    allowed = [strength for strength, content in kept.items() if content >= 0.6]
    assert 0 < len(allowed) < 4  # the constraint binds
    assert found.best == Setting(strength=max(allowed))  # b rises with the strength here
    assert found.gain is not None
    assert found.gain.low > 0


def test_figures_are_those_of_the_transported_outputs(flow, held_out):
    def first(y, context):
        return torch.sigmoid(y[:, 0])

    found = tune(flow, held_out, weight=0.0, judge=first, settings=[Setting(strength=2.0)], progress=False)
    y = torch.cat([held_out.chosen, held_out.rejected])
    moved = flow.transport(y, strength=2.0)
    assert found.points[0].win_probability.value == pytest.approx(float(first(y, None).mean()), abs=1e-6)
    assert found.points[1].win_probability.value == pytest.approx(float(first(moved, None).mean()), abs=1e-6)
    assert found.points[1].content.value == pytest.approx(float(torch.cosine_similarity(y, moved).mean()), abs=1e-6)
    assert torch.equal(found.transport(y), moved)


def test_shuffled_labels_move_nothing():
    """Held-out labels are shuffled too: true ones may find a little in a direction of chance."""
    shuffled, held_out = (pairs_of(seed, count=200).shuffle_labels(seed=3) for seed in (0, 1))
    found = tune(fitted(shuffled), held_out, weight=0.0, progress=False)
    assert found.best is None
    assert found.gain is None
    y = held_out.chosen[:5]
    assert torch.equal(found.transport(y), y)
    assert "no setting's gain is confirmed" in str(found)


def test_a_flow_of_swapped_labels_is_not_followed(held_out, judge):
    found = tune(fitted(pairs_of(0).swap()), held_out, weight=0.0, judge=judge, progress=False)
    assert found.best is None
    assert max(point.gain.high for point in found.points[1:]) < 0


def test_the_judge_is_not_the_flows_own_win_probability(held_out, judge):
    """Preferences of the second column alone: held-out labels see no gain where the flow's own b does."""
    other = fitted(pairs_of(0, reward=lambda y: y[:, 1]))
    y = torch.cat([held_out.chosen, held_out.rejected])
    moved = other.transport(y, win_gradient=8.0)
    assert float(other.win_probability(moved).mean() - other.win_probability(y).mean()) > 0.3
    found = tune(other, held_out, weight=0.0, judge=judge, settings=[Setting(win_gradient=8.0)], progress=False)
    gain = found.points[1].gain
    assert gain.low < 0 < gain.high
    assert found.best is None


def test_the_jackknife_is_that_of_a_mean():
    """Of a mean of groups of equal size, the delete-a-group jackknife is the standard error of the groups' means."""
    part = torch.arange(40 * DELETED) % DELETED
    values = torch.randn(len(part), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(0)
    table = _Table(none, none, torch.arange(len(part)), part > 0, part, None, 0.0)
    mean, error = table.jackknife(values.repeat(1 + DELETED, 1))
    means = torch.stack([values[part == number].mean() for number in range(DELETED)])
    assert mean == pytest.approx(float(values.mean()))
    assert error == pytest.approx(float(means.std()) / DELETED**0.5)


def test_the_better_of_two_flows_is_chosen(flow, held_out, judge):
    flows = {"shuffled": fitted(pairs_of(0).shuffle_labels(seed=3)), "labelled": flow}
    found = tune(flows, held_out, at_least=0.5, content=nearness, judge=judge, progress=False)
    assert found.best is not None
    assert found.best.flow == "labelled"
    assert found.flow is flow


def test_gate_and_guidance_are_tried_where_the_flow_has_them():
    rejected = fitted(pairs_of(0), source="rejected")
    assert {setting.mode for setting in grid(rejected)} == {"single", "gated"}
    data = pairs_of(0)
    with_context = pfm.EncodedPairs(data.chosen, data.rejected, torch.randn(PAIRS, 2), group=torch.arange(PAIRS))
    assert {setting.guidance for setting in grid(fitted(with_context, context_free=True))} == {1.0, 2.0}


def test_what_a_decoder_makes_of_a_point_is_judged(flow, held_out, judge):
    def unmoved(points, y):
        return y

    found = tune(flow, held_out, weight=0.0, judge=judge, decode=unmoved, progress=False, settings=[Setting()])
    assert found.points[1].gain.value == 0
    assert found.best is None


def test_the_frontier_holds_what_nothing_exceeds_in_both(flow, held_out, judge):
    found = tune(flow, held_out, at_least=0.0, content=nearness, judge=judge, progress=False)
    places = [(point.content.value, point.win_probability.value) for point in found.frontier]
    assert places == sorted(places, key=lambda place: (-place[0], place[1]))
    for point in found.points:
        assert any(
            content >= point.content.value - 1e-12 and b >= point.win_probability.value - 1e-12 for content, b in places
        )


def test_contexts_reach_the_flow_and_the_judge():
    generator = torch.Generator().manual_seed(5)
    one, two = torch.randn(2, PAIRS, 2, generator=generator)
    context = torch.eye(2)[torch.arange(PAIRS) % 2]
    sign = context[:, 0] - context[:, 1]
    first = ((one[:, 0] - two[:, 0]) * sign > 0)[:, None]
    pairs = pfm.EncodedPairs(
        torch.where(first, one, two), torch.where(first, two, one), context, group=torch.arange(PAIRS)
    )
    fitted_on, held = pairs.split(held_out=0.5)

    def by_class(y, x):
        return (y[:, 0] * (x[:, 0] - x[:, 1])).sigmoid()

    found = tune(fitted(fitted_on), held, weight=0.0, judge=by_class, settings=[Setting()], progress=False)
    assert found.points[1].gain.low > 0.05


def test_table_and_picture_are_written(flow, held_out, judge, tmp_path):
    found = tune(flow, held_out, at_least=0.9, content=nearness, judge=judge, progress=False)
    found.save_json(tmp_path / "tuning.json")
    told = json.loads((tmp_path / "tuning.json").read_text())
    assert len(told["points"]) == len(found.points)
    assert any(point["objective"] is None for point in told["points"])
    found.save_plot(tmp_path / "tuning.png")
    assert (tmp_path / "tuning.png").stat().st_size > 5000
    assert "<- chosen" in str(found)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "exactly one of at_least and weight"),
        ({"at_least": 0.5, "weight": 1.0}, "exactly one of at_least and weight"),
        ({"at_least": math.nan}, "at_least must be a finite number"),
        ({"weight": 1.0, "settings": []}, "at least one Setting"),
        ({"weight": 1.0, "settings": [Setting("other")]}, "flows that are not there: other; there are flow"),
        ({"weight": 1.0, "content": "words"}, "content must be 'cosine' or a function"),
        ({"weight": 1.0, "judge": lambda y, context: y}, "judge must give"),
        ({"weight": 1.0, "decode": lambda points, y: points[:3]}, "decode must give"),
    ],
)
def test_a_wrong_argument_is_named(flow, held_out, judge, options, text):
    with pytest.raises(ValueError, match=text):
        tune(flow, held_out, progress=False, **{"judge": judge, **options})


def test_pairs_of_another_shape_or_too_few_are_refused(flow, judge):
    other = pfm.EncodedPairs(torch.randn(20, 3), torch.randn(20, 3))
    with pytest.raises(ValueError, match="event_shape of the flow 'flow'"):
        tune(flow, other, weight=1.0, progress=False)
    with pytest.raises(ValueError, match="at least 5 prompts"):
        tune(flow, pairs_of(1, count=4), weight=1.0, progress=False)
    with pytest.raises(ValueError, match=f"at least {2 * DELETED} prompts to fit a judge on: got 9"):
        tune(flow, pairs_of(1, count=9), weight=1.0, progress=False)
    with pytest.raises(ValueError, match="HeldOutWin of other pairs"):
        tune(flow, pairs_of(2), weight=1.0, judge=judge, progress=False)
