"""Integration against closed forms: order of convergence, times, trouble."""

import itertools
import math
from typing import Any

import pytest
import torch

from pfm.flow.integration import ADAPTIVE_SOLVERS, FIXED_SOLVERS, LAST_RESORT, SOLVERS, STAGES, integrate

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


def evaluated(times, steps, **options):
    """Integrate dy/dt = 1 by Euler steps; give the times at which the field was asked and the states."""
    asked = []

    def field(t, y):
        asked.append(t)
        return torch.ones_like(y)

    result = integrate(field, torch.zeros(2, 1), times, solver="euler", steps=steps, **options)
    assert result.finite.tolist() == [True, True]
    return asked, result


@pytest.mark.parametrize(
    ("times", "steps", "begins"),
    [
        ((0.0, 1.0), 4, [0.0, 0.25, 0.5, 0.75]),
        (
            (0.0, 0.3, 1.0),
            10,
            [number / 10 for number in range(10)],
        ),  # 10 * 0.3 and 10 * 0.7 are whole
        ((0.5, 1.0), 4, [0.5, 0.75]),
        ((0.0, 0.01, 1.0), 2, [0.0, 0.01, 0.505]),  # at least one step an interval
        ((0.1, 0.8), 10, [0.1 + number / 10 for number in range(7)]),  # 0.8 - 0.1 is a little above 0.7
        ((0.0, 1e-10, 1.0), 2, [0.0, 1e-10, 0.5]),
        ((0.2, 0.7), 3, [0.2, 0.45]),  # whole steps, of equal length
    ],
)
def test_steps_are_equal_whole_and_at_least_one_an_interval(times, steps, begins):
    asked, result = evaluated(times, steps)
    assert asked == pytest.approx(begins)
    assert result.evaluations == len(begins)
    torch.testing.assert_close(result.states[:, 0, 0], torch.tensor(times) - times[0])


def test_one_step_is_the_default_and_its_finite_states_may_be_left_unheld():
    assert evaluated((0.0, 1.0), 1)[0] == [0.0]
    assert integrate(growth, torch.ones(1, 1), (0.0, 1.0), solver="euler").evaluations == 1
    blown = integrate(lambda t, y: y / (0.5 - t), torch.tensor([[1.0], [0.0]]), (0.0, 1.0), steps=2, hold=False)
    assert blown.finite.tolist() == [False, False]
    assert not bool(torch.isfinite(blown.states[-1]).any())


def test_a_row_is_lost_where_any_of_its_values_is():
    def field(t, y):  # the second value of the first row is lost at t = 0.5, all of the last row at once
        velocity = torch.ones_like(y)
        velocity[0, 1] = 1.0 if t < 0.5 else math.nan
        velocity[2] = math.inf
        return velocity

    states, finite, evaluations = integrate(field, torch.zeros(3, 2), (0.0, 0.25, 0.75, 1.0), solver="euler", steps=4)
    assert finite.tolist() == [False, True, False]
    assert states[:, 0, 0].tolist() == [0.0, 0.25, 0.5, 0.5]
    assert states[:, 1, 0].tolist() == [0.0, 0.25, 0.75, 1.0]
    assert states[:, 2].abs().max() == 0
    assert evaluations == 4


@pytest.mark.parametrize("solver", ADAPTIVE_SOLVERS)
def test_an_adaptive_solver_asks_more_for_less_tolerance_and_counts_it(solver):
    asked = []

    def field(t, y):
        asked.append(t)
        return growth(t, y)

    y, counts = torch.ones(2, 1, dtype=torch.float64), []
    settings: list[dict[str, Any]] = [{"rtol": 1e-2, "atol": 1e-2}, {}, {"rtol": 1e-8, "atol": 1e-8}]
    for tolerance in settings:
        asked.clear()
        result = integrate(field, y, (0.0, 0.5, 1.0), solver=solver, **tolerance)
        assert result.evaluations == len(asked)
        assert result.finite.tolist() == [True, True]
        counts.append(len(asked))
        assert float(result.states[2, 0]) == pytest.approx(math.exp(math.sin(1.0)), abs=0.1)
        assert float(result.states[1, 0]) == pytest.approx(math.exp(math.sin(0.5)), abs=0.1)  # between two steps
        assert result.finite.dtype == torch.bool
    assert counts[0] < counts[2]
    assert counts[0] <= counts[1] <= counts[2]
    for name in ("rtol", "atol"):
        loose: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8} | {name: 1e-2}
        assert integrate(growth, y, (0.0, 1.0), solver=solver, **loose).evaluations < counts[2]


def test_where_no_step_is_small_enough_the_fourth_order_solver_takes_over():
    def field(t, y):
        return torch.where(y > 5, torch.full_like(y, math.nan), torch.full_like(y, math.cos(20 * t)))

    states, finite, evaluations = integrate(field, torch.tensor([[0.0], [10.0]]), (0.0, 1.0), solver="dopri5")
    assert finite.tolist() == [True, False]
    assert evaluations == LAST_RESORT * STAGES["rk4"]
    assert float(states[-1, 0]) == pytest.approx(math.sin(20) / 20, abs=1e-5)
    assert float(states[-1, 1]) == 10


def test_the_adaptive_solvers_are_three_and_differ_in_what_they_ask():
    y = torch.ones(1, 1, dtype=torch.float64)
    counts = {integrate(growth, y, (0.0, 1.0), solver=solver, rtol=1e-7).evaluations for solver in ADAPTIVE_SOLVERS}
    assert len(counts) == len(ADAPTIVE_SOLVERS)


def test_an_adaptive_solver_holds_rows_lost_inside_a_step():
    """The step goes on past the last time, and what is interpolated between its ends overflows float32."""
    speed = torch.tensor([[1.0], [3e38]])
    y = torch.tensor([[0.0], [-3e38]])
    states, finite, evaluations = integrate(lambda t, y: speed, y, (0.0, 0.25, 1.0), solver="bosh3")
    assert finite.tolist() == [True, False]
    assert finite.dtype == torch.bool
    torch.testing.assert_close(states[:, 0, 0], torch.tensor([0.0, 0.25, 1.0]))
    assert (states[:, 1, 0] / 3e38).tolist() == pytest.approx([-1.0] * 3)
    assert 0 < evaluations < LAST_RESORT  # no other solver took over


def test_an_adaptive_solver_holds_rows_lost_after_the_first_time_asked_for():
    speed = torch.tensor([[1.0], [2e37]])
    y = torch.tensor([[0.0], [1e36]])  # the second row leaves float32 at t = 17
    states, finite, evaluations = integrate(lambda t, y: speed, y, (0.0, 0.01, 20.0), solver="dopri5")
    assert finite.tolist() == [True, False]
    torch.testing.assert_close(states[:, 0, 0], torch.tensor([0.0, 0.01, 20.0]))
    assert (states[:, 1, 0] / 1e36).tolist() == pytest.approx([1.0, 1.2, 1.2])
    assert 0 < evaluations < LAST_RESORT  # no other solver took over
