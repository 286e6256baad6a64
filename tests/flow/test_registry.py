"""Solvers and couplings of a user's own; flows of a subclass; number types of a flow."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import pfm
from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm.flow.couplings import COUPLINGS, Coupled, Joined, make_coupling
from pfm.flow.integration import STAGES, integrate
from pfm.preferences import BradleyTerry, MeanShift

LIGHT = FlowConfig(residual=False, steps=2)


def ralston(velocity, t, h, y):
    first = velocity(t, y)
    return y + h / 4 * (first + 3 * velocity(t + 2 * h / 3, y + 2 * h / 3 * first))


pfm.register_solver("ralston", stages=2)(ralston)


@pfm.register_coupling("doubled")
class Doubled(Joined):
    """Joins the rejected output of every pair to the double of its chosen one."""

    def __init__(self, pairs, *, source, seed):
        super().__init__(pairs.rejected, 2 * pairs.chosen, pairs.context)


@pfm.register_coupling("wrong")
class Wrong(Joined):
    """Draws half of the columns."""

    def __init__(self, pairs, *, source, seed):
        super().__init__(pairs.rejected[:, ::2], pairs.chosen[:, ::2], None)


@pfm.register_coupling("empty")
class Empty(Joined):
    """Joins nothing."""

    def __init__(self, pairs, *, source, seed):
        super().__init__(pairs.rejected[:0], pairs.chosen[:0], None)


def shifted_pairs(count=200):
    rejected = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return EncodedPairs(rejected + 1, rejected, group=torch.arange(count))


def fit(config, cls=PreferenceFlow):
    return cls.fit(shifted_pairs(), config, preference=MeanShift(), progress=False)


# -- solvers --------------------------------------------------------------------------------------------------------


def test_a_solver_of_ones_own_has_its_order():
    errors = []
    for steps in (8, 16, 32):
        end = integrate(lambda t, y: y, torch.ones(1, 1), (0.0, 1.0), solver="ralston", steps=steps)
        errors.append(abs(float(end.states[-1]) - math.e))
        assert end.evaluations == 2 * steps
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(4, rel=0.1)


def test_a_flow_is_fitted_saved_and_loaded_with_it(tmp_path, monkeypatch):
    flow = fit(LIGHT.replace(solver="ralston", steps="auto"))
    assert flow.evaluations == 2 * flow.steps
    y = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(flow.transport(y), fit(LIGHT.replace(steps=8)).transport(y), atol=0.05, rtol=0)
    flow.save_pretrained(tmp_path)
    torch.testing.assert_close(PreferenceFlow.from_pretrained(tmp_path).transport(y), flow.transport(y))
    from pfm.flow import integration as transport

    monkeypatch.delitem(transport._STEPS._parts, "ralston")
    with pytest.raises(pfm.NotRegisteredError, match=r"@pfm\.register_solver\('ralston', stages=\.\.\.\)"):
        PreferenceFlow.from_pretrained(tmp_path)


def test_solvers_that_are_refused():
    with pytest.raises(ValueError, match="stages must be a whole number"):
        pfm.register_solver("half", stages=0)
    with pytest.raises(ValueError, match="the library's own"):
        pfm.register_solver("dopri5", stages=7)(ralston)
    with pytest.raises(ValueError, match="did you mean 'rk4'"):
        FlowConfig(solver="rk5")
    assert STAGES["ralston"] == 2


# -- couplings ------------------------------------------------------------------------------------------------------


def test_a_coupling_of_ones_own_says_where_outputs_go():
    flow = fit(LIGHT.replace(coupling="doubled", sigma=0.0, source="rejected", steps=32))
    y = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(flow.transport(y), 2 * (y + 1), atol=0.02, rtol=0.01)
    drawn = make_coupling(shifted_pairs(), source="rejected", coupling="doubled").draw(torch.arange(3))
    assert isinstance(drawn, Coupled)
    torch.testing.assert_close(drawn.target, 2 * (drawn.source + 1))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", r"coupling='wrong' must draw source \(2, 4\) for 2 items, 1 rows each: got \(2, 2\)"),
        ("empty", "joins no samples"),
    ],
)
def test_couplings_that_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        make_coupling(shifted_pairs(), source="rejected", coupling=name)


def test_a_coupling_that_is_not_registered():
    with pytest.raises(pfm.NotRegisteredError, match=r"@pfm\.register_coupling\('nearest'\)"):
        FlowConfig(coupling="nearest")
    with pytest.raises(ValueError, match="the library's own"):
        pfm.register_coupling("paired")(Doubled)
    assert "doubled" not in COUPLINGS


# -- subclasses -----------------------------------------------------------------------------------------------------


class Halved(PreferenceFlow):
    """Moves outputs half the way."""

    def transport(self, y, context=None, **options):
        moved = super().transport(y, context, **options)
        return (moved + torch.as_tensor(y)) / 2


def test_a_subclass_stays_one(tmp_path):
    flow = fit(LIGHT, Halved)
    y, other = torch.randn(2, 60, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(flow.transport(y), y + (fit(LIGHT).transport(y) - y) / 2, atol=1e-5, rtol=1e-5)
    flow.save_pretrained(tmp_path)
    further = flow.relabel(MeanShift().fit(shifted_pairs()), y, other, progress=False)
    twins = {
        "copy": copy.deepcopy(flow),
        "with_preference": flow.with_preference(BradleyTerry().fit(shifted_pairs()), shifted_pairs()),
        "from_pretrained": Halved.from_pretrained(tmp_path),
        "distill": flow.distill(y, progress=False),
        "relabel": further,
        "round": further.later[0],
    }
    assert {name: type(twin) for name, twin in twins.items()} == dict.fromkeys(twins, Halved)
    further.save_pretrained(tmp_path)
    again = Halved.from_pretrained(tmp_path)
    assert type(again.later[0]) is Halved
    torch.testing.assert_close(
        again.transport(y, mode="relabel"), further.transport(y, mode="relabel"), atol=1e-5, rtol=1e-5
    )


# -- number types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
def test_other_number_types_are_refused_and_leave_the_flow_as_it_was(change):
    flow = fit(LIGHT)
    y = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    before = flow.transport(y)
    for module in (flow, nn.ModuleList([flow])):
        with pytest.raises(TypeError, match=r"keeps its numbers in float32.*flow\.config\.replace\(dtype="):
            getattr(module, change)()
    with pytest.raises(TypeError, match="float32"):
        flow.to(torch.float64)
    torch.testing.assert_close(flow.float().to(flow.device, torch.float32).transport(y), before)
    flow.config = flow.config.replace(dtype="bfloat16")
    assert flow.transport(y.half()).dtype == torch.float32
