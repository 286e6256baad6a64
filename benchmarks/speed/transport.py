"""Transport: the flow's fixed steps against the adaptive solver that the published code uses, at a known error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.speed.clock import Contestant
from pfm import PreferenceFlow
from pfm.flow.integration import integrate

__all__ = ["Exact", "adaptive", "alone", "repeated"]


def repeated(work: Callable[[], object]) -> Contestant:
    """Make a contestant of one call."""

    def times(units: int) -> None:
        for _ in range(units):
            work()

    return times


def adaptive(flow: PreferenceFlow, y: Tensor, context: Tensor | None) -> Callable[[], Tensor]:
    """Make the pass as the published code makes it: dopri5 at tolerances of 1e-4, the field asked anew each time."""
    from torchdiffeq import odeint

    times = torch.tensor([0.0, 1.0], device=y.device)

    @torch.no_grad()
    def work() -> Tensor:
        given = flow.normalizer.context(context)
        states = odeint(
            lambda t, state: flow.field(t, state, given), flow.normalizer(y), times,
            method="dopri5", rtol=1e-4, atol=1e-4,
        )  # fmt: skip
        assert isinstance(states, Tensor)
        return flow.normalizer.inverse(states[-1])

    return work


@dataclass(frozen=True)
class Exact:
    """Holds the results of a pass in float64, solved to 1e-7; errors are measured in normalised coordinates."""

    flow: PreferenceFlow
    start: Tensor
    end: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, flow: PreferenceFlow, y: Tensor, context: Tensor | None) -> Exact:
        """Solve for y (B, D) under contexts (B, C) or None."""
        start, given = flow.normalizer(y).double(), flow.normalizer.context(context)
        velocity = copy.deepcopy(flow.field).double().at(None if given is None else given.double())
        end = integrate(velocity, start, (0.0, 1.0), solver="dopri5", rtol=1e-7, atol=1e-9)
        return cls(flow, start, end.states[-1])

    def error(self, result: Tensor) -> float:
        """Return the root mean square error of results (B, D), relative to that of the distance moved."""
        apart = self.flow.normalizer(result).double() - self.end
        return float(_size(apart) / _size(self.end - self.start))

    def relative_error(self, result: Tensor) -> float:
        """Return the root mean square error of results (B, D), relative to the results' own size."""
        return float(_size(self.flow.normalizer(result).double() - self.end) / _size(self.end))


def alone(flow: PreferenceFlow, y: Tensor, context: Tensor | None, rows: int = 32) -> float:
    """Return the largest difference between a row's result in the batch y (B, D) and by itself."""
    together = flow.transport(y, context)
    apart = []
    for row in range(0, len(y), max(1, len(y) // rows)):
        its = slice(row, row + 1)
        result = flow.transport(y[its], None if context is None else context[its])
        apart.append(float((result - together[its]).abs().max()))
    return max(apart)


def _size(rows: Tensor) -> Tensor:
    return rows.square().mean().sqrt()
