"""Integration against closed forms: order of convergence, times, trouble."""

import itertools
import math

import pytest
import torch

from pfm.flow.integration import FIXED_SOLVERS, SOLVERS, STAGES, integrate

ORDER = {"euler": 1, "midpoint": 2, "heun2": 2, "rk4": 4}


def growth(t, y):
    """dy/dt = y cos(t), solved by y(0) exp(sin t)."""
    return y * math.cos(t)


@pytest.mark.parametrize("solver", SOLVERS)
def test_reaches_the_analytic_solution(solver):
    y = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    result = integrate(
        growth, y, (0.0, 1.0), solver=solver, steps=2000 if solver == "euler" else 200, rtol=1e-8, atol=1e-9
    ).states
    torch.testing.assert_close(
        result[-1], y * math.exp(math.sin(1.0)), rtol=1e-3 if solver == "euler" else 1e-4, atol=1e-4
    )


@pytest.mark.parametrize("solver", FIXED_SOLVERS)
def test_converges_with_its_order(solver):
    y = torch.ones(1, 1, dtype=torch.float64)
    exact = math.exp(math.sin(1.0))
    errors = [
        abs(float(integrate(growth, y, (0.0, 1.0), solver=solver, steps=n).states[-1]) - exact) for n in (16, 32, 64)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDER[solver], abs=0.35)


def test_gives_the_state_at_every_time_asked_for():
    y = torch.ones(3, 2, dtype=torch.float64)
    times = [0.0, 0.1, 0.35, 1.0]
    states = integrate(growth, y, times, steps=40).states
    assert states.shape == (4, 3, 2)
    for state, t in zip(states, times, strict=True):
        torch.testing.assert_close(state, y * math.exp(math.sin(t)), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_a_lost_row_keeps_its_last_finite_state_and_the_others_theirs(solver):
    def field(t, y):
        return torch.where((y > 5) & (t > 0.5), torch.full_like(y, float("nan")), torch.ones_like(y))

    y = torch.tensor([[0.0], [10.0]])
    states, finite, _ = integrate(field, y, (0.0, 1.0), solver=solver, steps=10)
    assert finite.tolist() == [True, False]
    assert float(states[-1, 0]) == pytest.approx(1.0, abs=1e-5)
    assert float(states[-1, 1]) == pytest.approx(10.5, abs=0.11)


@pytest.mark.parametrize("solver", FIXED_SOLVERS)
def test_counts_the_evaluations(solver):
    assert integrate(growth, torch.ones(1, 1), (0.0, 1.0), solver=solver, steps=5).evaluations == 5 * STAGES[solver]


def test_an_unknown_solver_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"rk4.*got 'rk5'"):
        integrate(growth, torch.ones(1, 1), (0.0, 1.0), solver="rk5")
