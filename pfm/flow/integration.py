"""Integration of dy/dt = v(t, y): fixed steps, torchdiffeq's adaptive solvers, end points and trajectories.

Fixed steps are taken here and not by torchdiffeq, whose checks of the time grid make the host wait for a GPU at every
call and evaluation. Times are Python numbers throughout; nothing in a pass of fixed steps waits for the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pfm._internal.checks import check_whole
from pfm._internal.registry import Registry
from pfm.flow.fields import Velocity

__all__ = [
    "ADAPTIVE_SOLVERS",
    "FIXED_SOLVERS",
    "SOLVERS",
    "STAGES",
    "Integrated",
    "check_solver",
    "integrate",
    "register_solver",
]

LAST_RESORT = 128  # steps of rk4 where an adaptive solver finds none


def _euler(velocity: Velocity, t: float, h: float, y: Tensor) -> Tensor:
    return torch.add(y, velocity(t, y), alpha=h)


def _midpoint(velocity: Velocity, t: float, h: float, y: Tensor) -> Tensor:
    half = torch.add(y, velocity(t, y), alpha=h / 2)
    return torch.add(y, velocity(t + h / 2, half), alpha=h)


def _heun2(velocity: Velocity, t: float, h: float, y: Tensor) -> Tensor:
    first = velocity(t, y)
    second = velocity(t + h, torch.add(y, first, alpha=h))
    return torch.add(y, first + second, alpha=h / 2)


def _rk4(velocity: Velocity, t: float, h: float, y: Tensor) -> Tensor:
    """Take a step of Kutta's 3/8 rule, as torchdiffeq's ``rk4`` does."""
    k1 = velocity(t, y)
    k2 = velocity(t + h / 3, torch.add(y, k1, alpha=h / 3))
    k3 = velocity(t + 2 * h / 3, torch.add(y, torch.sub(k2, k1, alpha=1 / 3), alpha=h))
    k4 = velocity(t + h, torch.add(y, k1 - k2 + k3, alpha=h))
    return torch.add(y, torch.add(k1 + k4, k2 + k3, alpha=3), alpha=h / 8)


Step = Callable[[Velocity, float, float, Tensor], Tensor]
"""Takes one step: (velocity, t, h, y (B, D)) -> y (B, D) at t + h."""
B = TypeVar("B", bound=Step)

_FIXED: dict[str, Step] = {
    "euler": _euler,
    "midpoint": _midpoint,
    "heun2": _heun2,
    "rk4": _rk4,
}
STAGES = {"euler": 1, "midpoint": 2, "heun2": 2, "rk4": 4}  # evaluations of the field a step
FIXED_SOLVERS = tuple(_FIXED)
ADAPTIVE_SOLVERS = ("bosh3", "dopri5", "dopri8")
SOLVERS = FIXED_SOLVERS + ADAPTIVE_SOLVERS
_STEPS: Registry[Step | None] = Registry(  # None: torchdiffeq's
    "solver", "@pfm.register_solver({name}, stages=...)", _FIXED | dict.fromkeys(ADAPTIVE_SOLVERS)
)


def register_solver(name: str, *, stages: int) -> Callable[[B], B]:
    """Register a fixed-step solver of your own, to be named in ``FlowConfig(solver=name)``.

    Args:
        name: the name.
        stages: evaluations of the field that a step takes, at least 1.

    Returns:
        a decorator of a function ``step(velocity, t, h, y)`` that takes y (B, D) from time t to t + h, both Python
        numbers, and calls ``velocity(t, y)`` for dy/dt. A row's result must not depend on the rows beside it.

    Raises:
        TypeError, ValueError: the name is no name or another solver's, or ``stages`` is no whole number of at least 1.

    >>> @register_solver("ralston", stages=2)
    ... def ralston(velocity, t, h, y):
    ...     first = velocity(t, y)
    ...     return y + h / 4 * (first + 3 * velocity(t + 2 * h / 3, y + 2 * h / 3 * first))
    """
    check_whole("stages", stages, 1)

    def register(step: B) -> B:
        _STEPS.add(name, step)
        STAGES[name] = stages
        return step

    return register


def check_solver(solver: str) -> None:
    """Refuse a solver that is neither the library's nor registered."""
    _STEPS.check(solver)


class Integrated(NamedTuple):
    """Holds the states (T, B, D) at the requested times, and which rows (B,) stayed finite.

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
    hold: bool = True,
) -> Integrated:
    """Integrate from ``times[0]`` through the given times.

    With a fixed-step solver every row's result depends on that row alone. An adaptive solver chooses its steps
    for the whole batch, so that a row's result depends, within the tolerance, on the rows beside it; where it finds
    no step small enough, fixed steps are taken instead, so that rows in trouble do not cost the others their result.

    Args:
        velocity: (t, y (B, D)) -> (B, D).
        y: (B, D) the state at ``times[0]``.
        times: increasing times, at least two.
        solver: a name in :data:`SOLVERS`, or one of :func:`register_solver`.
        steps: steps a unit of time, for fixed-step solvers; each interval takes at least one.
        rtol, atol: tolerances of the adaptive solvers.
        hold: give lost rows their last finite state, which takes a look at the result. Without it fixed steps never
            wait for the device: lost rows hold what the field gave, and ``finite`` says which they are.
    """
    step = _STEPS[solver]
    if step is None:
        return _adaptive(velocity, y, times, solver, rtol, atol)
    begins, lengths, marks = _grid(times, steps)
    state, states, kept = y, [y], set(marks)
    for number, (t, h) in enumerate(zip(begins, lengths, strict=True), 1):
        state = step(velocity, t, h, state)
        if number in kept:
            states.append(state)
    result, finite = torch.stack(states), torch.isfinite(state).all(-1)
    evaluations = len(begins) * STAGES[solver]
    if not hold or bool(finite.all()):
        return Integrated(result, finite, evaluations)
    # Rare: integrate again with every step kept, to find where each lost row was last finite.
    state, states = y, [y]
    for t, h in zip(begins, lengths, strict=True):
        state = step(velocity, t, h, state)
        states.append(state)
    held, finite = _hold_last_finite(torch.stack(states))
    return Integrated(torch.stack([held[mark] for mark in marks]), finite, evaluations)


def _grid(times: Sequence[float], steps: int) -> tuple[list[float], list[float], list[int]]:
    """Return the begins and lengths of all steps, and after how many steps each of ``times`` is reached."""
    grid, marks = [float(times[0])], [0]
    for begin, end in itertools.pairwise(times):
        pieces = max(1, math.ceil(steps * (end - begin) - 1e-9))
        grid += [begin + (end - begin) * (piece + 1) / pieces for piece in range(pieces)]
        marks.append(len(grid) - 1)
    return grid[:-1], [end - begin for begin, end in itertools.pairwise(grid)], marks


def _adaptive(
    velocity: Velocity, y: Tensor, times: Sequence[float], solver: str, rtol: float, atol: float
) -> Integrated:
    from torchdiffeq import odeint

    evaluations = 0

    def function(t: Tensor, state: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return velocity(float(t), state)

    requested = torch.tensor(list(times), dtype=y.dtype, device="cpu").to(y.device)
    try:
        result = odeint(function, y, requested, method=solver, rtol=rtol, atol=atol)
    except AssertionError:  # no step is small enough, as when the field gives NaN for one row
        return integrate(velocity, y, times, solver="rk4", steps=LAST_RESORT)
    if not isinstance(result, Tensor):
        raise TypeError(f"the solver gave {type(result).__name__} for a tensor state")
    if bool(torch.isfinite(result[-1].sum())):
        return Integrated(result, torch.ones(len(y), dtype=torch.bool, device=y.device), evaluations)
    states, finite = _hold_last_finite(result)
    return Integrated(states, finite, evaluations)


def _hold_last_finite(states: Tensor) -> tuple[Tensor, Tensor]:
    lost = torch.zeros(states.shape[1], dtype=torch.bool, device=states.device)
    states = states.clone()
    for step in range(1, len(states)):
        lost = lost | ~torch.isfinite(states[step]).all(-1)
        states[step] = torch.where(lost[:, None], states[step - 1], states[step])
    return states, ~lost
