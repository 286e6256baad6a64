"""One pass of a field: from outputs to the places where they arrive, in the outputs' own units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pfm.flow.config import FlowConfig
from pfm.flow.fields import Field, Normalizer, Velocity
from pfm.flow.fitting import matmul_precision
from pfm.flow.gate import gate_uniforms
from pfm.flow.integration import ADAPTIVE_SOLVERS, integrate

__all__ = ["FieldPass"]

WHOLE = 1e-9  # steps that differ less from a whole number are whole, as in the integration


class FieldPass(nn.Module):
    """Carries rows once by the field, the guidance and the gradient of log b that it holds.

    Attributes:
        config: the settings. metadata: what else a fit has noted.
        field, context_free: the field, and the one without contexts for guidance, if any.
        normalizer: between the outputs' units and the field's.
        win: gives logit b (B,) of outputs (B, D) under contexts (B, C).
    """

    config: FlowConfig
    metadata: dict[str, Any]
    field: Field
    context_free: Field | None
    normalizer: Normalizer
    win: nn.Module

    @property
    def device(self) -> torch.device:
        """Return the device of the parameters."""
        return self.normalizer.mean.device

    def _pass(
        self,
        y: Tensor,
        context: Tensor | None,
        steps: int,
        strengths: Sequence[float] = (1.0,),
        guidance: float = 1.0,
        win_gradient: float = 0.0,
        gate: tuple[int, int] | None = None,
        hold: bool = True,
    ) -> list[tuple[Tensor, Tensor]]:
        """Carry flat outputs (B, D) on the flow's device once, by each strength above 0.

        Returns:
            for each strength the states (B, D), and which rows (B,) stayed finite.
        """
        device = self.device
        lower = self.config.dtype == "bfloat16" and device.type != "cpu"
        with matmul_precision(self.config.dtype, device), torch.autocast(device.type, torch.bfloat16, enabled=lower):
            velocity = self._guided(context, guidance, win_gradient)
            reached = self._reached(velocity, y, [min(strength, 1.0) for strength in strengths], steps, hold)
        kept = None
        if gate is not None:
            kept = torch.sigmoid(self.win(y, context)) > gate_uniforms(y, context, *gate)
        found = []
        for strength in strengths:
            result, well = reached[min(strength, 1.0)]
            if strength > 1:
                result = y + strength * (result - y)
            if self.metadata.get("unit_norm"):
                result = nn.functional.normalize(result, dim=1)
            if kept is not None:
                result, well = torch.where(kept[:, None], y, result), kept | well
            found.append((result, well))
        return found

    def _reached(
        self, velocity: Velocity, y: Tensor, times: Sequence[float], steps: int, hold: bool
    ) -> dict[float, tuple[Tensor, Tensor]]:
        """Return the states (B, D) at each time in (0, 1], and which rows (B,) stayed finite up to it."""
        marks = sorted(set(times))
        # Steps to an earlier time are the first ones of the pass, where their number is whole.
        whole = all(abs(steps * mark - round(steps * mark)) < WHOLE for mark in marks)
        shared = whole and not hold and self.config.solver not in ADAPTIVE_SOLVERS and "distilled" not in self.metadata
        found = {}
        for path in [marks] if shared else [[mark] for mark in marks]:
            states, finite = self._integrate(velocity, y, (0.0, *path), steps, hold=hold)
            for mark, state in zip(path, states[1:], strict=True):
                found[mark] = state, finite if mark == path[-1] else torch.isfinite(state).all(1)
        return found

    def _guided(self, context: Tensor | None, guidance: float, win_gradient: float) -> Velocity:
        """Return the velocity in normalised coordinates, as :meth:`transport` describes it."""
        base = self.field.at(self.normalizer.context(context))
        free = None if guidance == 1 or self.context_free is None else self.context_free.at(None)

        def guided(t: float, y: Tensor) -> Tensor:
            return base(t, y) if free is None else torch.lerp(free(t, y), base(t, y), guidance)

        if win_gradient == 0:
            return guided
        scale = self.normalizer.scale
        # Two draws under one context differ by twice their variance.
        variance = win_gradient * self.normalizer.displacement.square() / 2

        def steered(t: float, y: Tensor) -> Tensor:
            slope = self._win_slope(self.normalizer.inverse(y), context) * scale
            return torch.addcmul(guided(t, y), variance, slope)

        return steered

    def _win_slope(self, y: Tensor, context: Tensor | None) -> Tensor:
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            total = nn.functional.logsigmoid(self.win(y, context)).sum()
            return torch.autograd.grad(total, y)[0]

    def _integrate(
        self, velocity: Velocity, y: Tensor, times: Sequence[float], steps: int, *, hold: bool = True
    ) -> tuple[Tensor, Tensor]:
        start = self.normalizer(y)
        if "distilled" in self.metadata:
            # One evaluation makes the whole pass: a straight line.
            moved = velocity(0.0, start)
            finite = torch.isfinite(moved).all(1)
            moved = torch.where(finite[:, None], moved, 0)
            states = torch.stack([start + t * moved for t in times])
        else:
            states, finite, _ = integrate(velocity, start, times, solver=self.config.solver, steps=steps, hold=hold)
        return self.normalizer.inverse(states), finite
