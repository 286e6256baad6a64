"""Several strengths by one pass: the places of single calls, with fewer integrations."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pfm import EncodedPairs, FlowConfig, NonFiniteWarning, PreferenceFlow
from pfm.flow import Setting, tune
from pfm.flow import passes as field_passes

STRENGTHS = (0.5, 0.0, 1.0, 8.0, 0.3, 2.0)
STEPS = 4


def outputs(count: int = 300, unit: bool = False) -> tuple[Tensor, Tensor]:
    one, two = torch.randn(2, count, 3, generator=torch.Generator().manual_seed(0)) + 0.3
    return (normalize(one, dim=1), normalize(two, dim=1)) if unit else (one, two)


def drawn(contexts: int = 0, metadata: dict[str, Any] | None = None, **options: Any) -> PreferenceFlow:
    """Make a flow whose networks have random weights: no closed form, and nothing to wait for."""
    config = FlowConfig(hidden=16, layers=2, linear=False, **options)
    flow = PreferenceFlow((3,), contexts, config, {"steps": STEPS, **(metadata or {})})
    generator = torch.Generator().manual_seed(1)
    one, two = outputs()
    context = torch.randn(len(one), contexts, generator=generator) if contexts else None
    with torch.no_grad():
        for weight in flow.parameters():
            weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    for own in (flow, *flow.later):
        assert isinstance(own, PreferenceFlow)
        own.normalize_by(one, two, context)
        for field in (own.field, own.context_free):
            if field is not None:
                field.gain.fill_(1.0)
    return flow


@pytest.fixture(scope="module")
def flows() -> dict[str, PreferenceFlow]:
    later = {"config": FlowConfig(hidden=16, layers=2, linear=False, source="rejected"), "metadata": {"steps": STEPS}}
    return {
        "plain": drawn(),
        "unit vectors": drawn(metadata={"unit_norm": True}),
        "contexts": drawn(2, context_free=True),
        "rejected": drawn(source="rejected"),
        "distilled": drawn(metadata={"distilled": {}}),
        "rounds": drawn(metadata={"later": [later]}),
    }


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the times of each integration."""
    taken: list[Any] = []
    true = field_passes.integrate

    def watched(velocity: Any, y: Tensor, times: Any, **options: Any) -> Any:
        taken.append(times)
        return true(velocity, y, times, **options)

    monkeypatch.setattr(field_passes, "integrate", watched)
    return taken


def singly(flow: PreferenceFlow, y: Tensor, x: Tensor | None, **options: Any) -> list[Tensor]:
    return [flow.transport(y, x, strength=strength, **options) for strength in STRENGTHS]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {}),
        ("plain", {"steps": 3}),
        ("plain", {"win_gradient": 4.0}),
        ("plain", {"mode": "reapply", "rounds": 2}),
        ("unit vectors", {}),
        ("contexts", {"guidance": 2.0, "win_gradient": 1.0}),
        ("rejected", {"mode": "gated", "seed": 3}),
        ("distilled", {}),
        ("rounds", {"mode": "relabel"}),
        ("rounds", {"mode": "relabel", "rounds": 1}),
    ],
)
def test_places_are_those_of_single_calls(flows: Any, name: str, options: dict[str, Any]) -> None:
    flow = flows[name]
    y = outputs(80, unit=name == "unit vectors")[0]
    x = torch.randn(80, 2, generator=torch.Generator().manual_seed(2)) if flow.context_dimension else None
    together = flow.transport_strengths(y, x, strengths=STRENGTHS, **options)
    assert len(together) == len(STRENGTHS)
    for strength, one, other in zip(STRENGTHS, together, singly(flow, y, x, **options), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6, msg=f"strength {strength}")
        assert one.is_contiguous()
    assert float((together[3] - y).abs().max()) > 0.01  # it moved


@pytest.mark.parametrize("solver", ["euler", "rk4", "dopri5"])
def test_strengths_from_one_on_share_a_pass(passes: list[Any], solver: str) -> None:
    flow, (y, _) = drawn(solver=solver), outputs(50)
    together = flow.transport_strengths(y, strengths=[0.5, 1.0, 2.0, 4.0, 8.0])
    expected = [(0.0, 0.5), (0.0, 1.0)] if solver == "dopri5" else [(0.0, 0.5, 1.0)]
    assert passes == expected
    passes.clear()
    for strength, place in zip([0.5, 1.0, 2.0, 4.0, 8.0], together, strict=True):
        torch.testing.assert_close(place, flow.transport(y, strength=strength), atol=1e-6, rtol=1e-6)
    assert len(passes) == 5
    torch.testing.assert_close(together[2] - y, 2 * (together[1] - y), atol=1e-5, rtol=1e-5)


def test_tuning_takes_one_pass_for_all_strengths_and_finds_the_same(flows: Any, passes: list[Any]) -> None:
    flow, data = flows["plain"], EncodedPairs(*outputs())
    settings = [Setting(strength=s, win_gradient=w) for s in (4.0, 1.0, 0.5, 2.0) for w in (0.0, 2.0)]
    judged = lambda y, x: torch.sigmoid(y[:, 0])  # noqa: E731
    found = tune(flow, data, weight=0.0, judge=judged, settings=settings, progress=False)
    assert len(passes) == 2  # one for each gradient of b
    assert [point.setting for point in found.points[1:]] == settings
    y = torch.cat([data.chosen, data.rejected])
    for point in found.points[1:]:
        assert point.setting is not None
        expected = judged(flow.transport(y, **point.setting.arguments()), None).mean()
        assert point.win_probability.value == pytest.approx(float(expected), abs=1e-6)


class Wrapped:
    """A flow of a user's own, with ``transport`` alone."""

    def __init__(self, flow: PreferenceFlow) -> None:
        self.flow = flow

    def transport(self, y: Tensor, context: Tensor | None = None, **options: Any) -> Tensor:
        return self.flow.transport(y, context, **options)


def test_a_flow_without_the_door_is_tuned_all_the_same(flows: Any) -> None:
    flow, data = flows["plain"], EncodedPairs(*outputs())
    settings = [Setting(strength=strength) for strength in (1.0, 4.0)]
    ours, theirs = (
        tune(own, data, weight=0.0, judge=lambda y, x: torch.sigmoid(y[:, 0]), settings=settings, progress=False)
        for own in (flow, Wrapped(flow))
    )
    for one, other in zip(ours.points, theirs.points, strict=True):
        assert one.win_probability.value == pytest.approx(other.win_probability.value, abs=1e-6)


def test_rows_that_are_lost_are_those_of_single_calls(flows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The field of a row is lost from t = 0.6 on: half of the pass is still its own."""
    flow, (y, _) = flows["plain"], outputs(20)
    y[7] = 50.0
    true = flow.field.at

    def broken(context: Any) -> Any:
        velocity = true(context)
        return lambda t, rows: velocity(t, rows) + torch.where(rows[:, :1] > 20, math.nan if t > 0.6 else 0.0, 0.0)

    monkeypatch.setattr(flow.field, "at", broken)
    with pytest.warns(NonFiniteWarning) as told:
        together = flow.transport_strengths(y, strengths=STRENGTHS)
    assert len([warning for warning in told if issubclass(warning.category, NonFiniteWarning)]) == 1
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)
        expected = singly(flow, y, None)
    for one, other in zip(together, expected, strict=True):
        assert bool(one.isfinite().all())
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-6)
    with pytest.raises(FloatingPointError, match="row"):
        flow.transport_strengths(y, strengths=STRENGTHS, on_failure="raise")
    flow.transport_strengths(y, strengths=[0.5], on_failure="raise")  # not lost yet


@pytest.mark.parametrize(
    ("strengths", "message"),
    [
        ([], "at least one"),
        ("12", "strengths must be numbers"),
        (2.0, "strengths must be numbers"),
        ([1.0, -1.0], "strengths must be .*at least 0"),
        ([1.0, math.nan], "strengths must be a number of at least 0: got nan"),
        ([1.0, "two"], "strengths"),
    ],
)
def test_strengths_that_are_none_are_refused(flows: Any, strengths: Any, message: str) -> None:
    flow, (y, _) = flows["plain"], outputs(5)
    with pytest.raises((ValueError, TypeError), match=message):
        flow.transport_strengths(y, strengths=strengths)


def test_tensors_and_empty_batches_are_taken(flows: Any) -> None:
    flow, (y, _) = flows["plain"], outputs(5)
    one, two = flow.transport_strengths(y[:0], strengths=[1.0, 2.0])
    assert one.shape == two.shape == (0, 3)
    a, b = flow.transport_strengths(y[:3], strengths=[1.0, 1.0])
    a += 1
    assert not torch.equal(a, b)


def test_numbers_and_strengths_may_be_tensors_and_arrays(flows: dict[str, PreferenceFlow]) -> None:
    y, context = outputs(8)[0], torch.zeros(8, 2)
    flow = flows["contexts"]
    options: dict[str, Any] = {"strength": 0.5, "guidance": 1.5, "win_gradient": 0.25}
    kinds: tuple[Any, ...] = (torch.tensor, np.array, np.float32)
    for kind in kinds:
        told: dict[str, Any] = {name: kind(value) for name, value in options.items()}
        assert torch.equal(flow.transport(y, context, **told), flow.transport(y, context, **options))
    plain = flow.transport_strengths(y, context, strengths=[0.5, 2.0])
    several: tuple[Any, ...] = (np.array([0.5, 2.0]), torch.tensor([0.5, 2.0]))
    for given in several:
        assert all(map(torch.equal, flow.transport_strengths(y, context, strengths=given), plain))
