"""Integration of dy/dt = v(t, y) with torchdiffeq: fixed-step and adaptive, end points and trajectories."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pfm.fields import Velocity

__all__ = ["ADAPTIVE_SOLVERS", "FIXED_SOLVERS", "SOLVERS", "STAGES", "Integrated", "check_solver", "integrate"]

STAGES = {"euler": 1, "midpoint": 2, "heun2": 2, "rk4": 4}  # evaluations of the field a step
LAST_RESORT = 128  # steps of rk4 where an adaptive solver finds none
FIXED_SOLVERS = tuple(STAGES)
ADAPTIVE_SOLVERS = ("bosh3", "dopri5", "dopri8")
SOLVERS = FIXED_SOLVERS + ADAPTIVE_SOLVERS


def check_solver(solver: str) -> None:
    """Refuse a solver that is not known here."""
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}: got {solver!r}")


class Integrated(NamedTuple):
    """Holds the states (T, B, D) at the times asked for, and which rows (B,) stayed finite.

    A row that leaves the finite numbers keeps its last finite state from there on. ``evaluations`` of the field were
    needed.
    """

    states: Tensor
    finite: Tensor
    evaluations: int


def integrate(
    velocity: Velocity,
    y: Tensor,
    times: Sequence[float],
    *,
    solver: str = "rk4",
    steps: int = 1,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> Integrated:
    """Integrate from ``times[0]`` through the given times.

    With a fixed-step solver every row's result depends on that row alone. An adaptive solver chooses its steps
    for the whole batch, so that a row's result depends, within the tolerance, on the rows beside it; where it finds
    no step small enough, fixed steps are taken instead, so that rows in trouble do not cost the others their result.

    Args:
        velocity: (t, y (B, D)) -> (B, D).
        y: (B, D) the state at ``times[0]``.
        times: increasing times, at least two.
        solver: a name in :data:`SOLVERS`.
        steps: steps a unit of time, for fixed-step solvers; each interval takes at least one.
        rtol, atol: tolerances of the adaptive solvers.
    """
    from torchdiffeq import odeint

    check_solver(solver)
    evaluations = 0

    def function(t: Tensor, state: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return velocity(float(t), state)

    points, marks = torch.empty(0), [0]
    if solver in FIXED_SOLVERS:
        grid = [float(times[0])]
        for begin, end in itertools.pairwise(times):
            pieces = max(1, math.ceil(steps * (end - begin) - 1e-9))
            grid += [begin + (end - begin) * (piece + 1) / pieces for piece in range(pieces)]
            marks.append(len(grid) - 1)
        points = torch.tensor(grid, dtype=y.dtype, device=y.device)
        asked = points[marks]
        options: dict[str, Any] = {"grid_constructor": lambda func, y0, t: points}
        result = odeint(function, y, asked, method=solver, options=options)
    else:
        asked = torch.tensor(list(times), dtype=y.dtype, device=y.device)
        try:
            result = odeint(function, y, asked, method=solver, rtol=rtol, atol=atol)
        except AssertionError:  # no step is small enough, as when the field gives NaN for one row
            return integrate(velocity, y, times, solver="rk4", steps=LAST_RESORT)
    if not isinstance(result, Tensor):
        raise TypeError(f"the solver gave {type(result).__name__} for a tensor state")
    if bool(torch.isfinite(result[-1].sum())):
        return Integrated(result, torch.ones(len(y), dtype=torch.bool, device=y.device), evaluations)
    if solver in FIXED_SOLVERS:
        # Rare: integrate again with every step kept, to find where each lost row was last finite.
        result = odeint(function, y, points, method=solver)
        if not isinstance(result, Tensor):
            raise TypeError(f"the solver gave {type(result).__name__} for a tensor state")
    else:
        marks = list(range(len(asked)))
    states, finite = _hold_last_finite(result)
    return Integrated(states[marks], finite, evaluations)


def _hold_last_finite(states: Tensor) -> tuple[Tensor, Tensor]:
    lost = torch.zeros(states.shape[1], dtype=torch.bool, device=states.device)
    states = states.clone()
    for step in range(1, len(states)):
        lost = lost | ~torch.isfinite(states[step]).all(-1)
        states[step][lost] = states[step - 1][lost]
    return states, ~lost
