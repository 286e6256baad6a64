"""Transport of few rows at a time, in numpy: what a policy does at every step of an episode.

For a handful of rows of some ten values each, the tensor library's and the solver's own cost is many times that of the
arithmetic. Here everything that depends on time alone is computed once a stage, and a pass is a few small products.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pfm.flow.fields import Field, ResidualField
from pfm.flow.preference_flow import PreferenceFlow
from pfm.flow.registered_field import MLP

__all__ = ["FastTransport"]

_Velocity = Callable[[float, np.ndarray], np.ndarray]  # at a time and normalised y (B, D), contexts fixed


@dataclass(frozen=True)
class _Stage:
    """Holds the field at one time: ``slope`` (D + C, D) and ``offset`` (D,) of the linear part, ``time`` (hidden,)."""

    slope: np.ndarray
    offset: np.ndarray
    time: np.ndarray | None


class FastTransport:
    """Does what ``flow.transport(mode="reapply")`` does, for fixed-step flows; a copy of their weights on the CPU.

    For the few rows of a control step that is faster than a GPU, wherever the flow is.
    """

    def __init__(self, flow: PreferenceFlow) -> None:
        self.flow = flow
        self.solver = "straight" if "distilled" in flow.metadata else flow.config.solver
        normalizer = flow.normalizer
        self.mean, self.scale = _array(normalizer.mean), _array(normalizer.scale)
        self.context_mean, self.context_scale = _array(normalizer.context_mean), _array(normalizer.context_scale)
        self.field = _FastField(copy.deepcopy(flow.field).cpu())
        free = flow.context_free
        self.context_free = None if free is None else _FastField(copy.deepcopy(free).cpu())

    @classmethod
    def of(cls, flow: PreferenceFlow) -> FastTransport | None:
        """Make one, or return None for a flow that it does not support."""
        fits = (
            ("distilled" in flow.metadata or flow.config.solver in ("rk4", "euler"))
            and flow.config.field == MLP
            and not flow.metadata.get("unit_norm")
        )
        return cls(flow) if fits else None

    def __call__(
        self,
        y: np.ndarray,
        context: np.ndarray,
        *,
        rounds: int = 1,
        strength: float = 1.0,
        steps: int | None = None,
        guidance: float = 1.0,
    ) -> np.ndarray:
        """Carry y (B, D) under contexts (B, C), float32; rows may leave the finite numbers."""
        given = (context.astype(np.float32) - self.context_mean) / self.context_scale
        velocity = self._guided(given, guidance)
        end, count = min(strength, 1.0), self.flow.steps if steps is None else steps
        count = max(1, math.ceil(count * end - 1e-9))
        state = (y.astype(np.float32) - self.mean) / self.scale
        with np.errstate(over="ignore", invalid="ignore"):
            for _ in range(rounds):
                start = state
                for number in range(count):
                    state = self._step(end * number / count, end / count, state, velocity)
                if strength > 1:
                    state = start + np.float32(strength) * (state - start)
        return state * self.scale + self.mean

    def _guided(self, context: np.ndarray, guidance: float) -> _Velocity:
        if guidance == 1 or self.context_free is None:
            return self.field.at(context)
        free = self.context_free.at(context[:, :0])
        if guidance == 0:
            return free
        bound = self.field.at(context)
        return lambda t, y: free(t, y) + np.float32(guidance) * (bound(t, y) - free(t, y))

    def _step(self, t: float, size: float, y: np.ndarray, velocity: _Velocity) -> np.ndarray:
        step = np.float32(size)
        if self.solver != "rk4":
            return y + step * velocity(0.0 if self.solver == "straight" else t, y)
        # The 3/8 rule, as torchdiffeq's rk4.
        third = np.float32(1 / 3)
        one = velocity(t, y)
        two = velocity(t + size / 3, y + step * third * one)
        three = velocity(t + size * 2 / 3, y + step * (two - third * one))
        four = velocity(t + size, y + step * (one - two + three))
        return y + step / np.float32(8) * (one + 3 * (two + three) + four)


class _FastField:
    """Gives the velocity of a :class:`pfm.flow.fields.Field` at normalised y (B, D)."""

    def __init__(self, field: Field) -> None:
        self.linear, self.residual = field.linear, field.residual
        self.unit = _array(field.unit * field.gain)
        if isinstance(self.residual, ResidualField):
            self.layers = [_layer(layer) for layer in (*self.residual.hidden, self.residual.last)]
            self.from_output, self.bias = _layer(self.residual.from_output)
            context = self.residual.from_context
            self.from_context = None if context is None else _array(context.weight.T)
        self._stages: dict[float, _Stage] = {}

    def at(self, context: np.ndarray) -> _Velocity:
        """Fix the normalised contexts (B, C)."""
        first = None
        if isinstance(self.residual, ResidualField):
            first = self.bias if self.from_context is None else context @ self.from_context + self.bias

        def velocity(t: float, y: np.ndarray) -> np.ndarray:
            stage = self._stages.get(t) or self._stage(t)
            size = y.shape[1]
            velocity = y @ stage.slope[:size] + stage.offset
            if context.shape[1]:
                velocity += context @ stage.slope[size:]
            if first is None:
                return velocity
            value = _silu(y @ self.from_output + first + stage.time)
            for weight, bias in self.layers[:-1]:
                value = _silu(value @ weight + bias)
            weight, bias = self.layers[-1]
            return velocity + (value @ weight + bias) * self.unit

        return velocity

    @torch.no_grad()
    def _stage(self, t: float) -> _Stage:
        slope, offset = self.linear.operator(torch.tensor([t], dtype=torch.float32, device="cpu"))
        time = None
        if isinstance(self.residual, ResidualField):
            time = _array(
                self.residual.from_time(self.residual.time_features(torch.tensor(t, dtype=torch.float32, device="cpu")))
            )
        if len(self._stages) >= 256:
            self._stages.clear()
        self._stages[t] = _Stage(_array(slope[0]), _array(offset[0]), time)
        return self._stages[t]


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().numpy(), dtype=np.float32).copy()


def _layer(module: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    assert isinstance(module, nn.Linear)
    return _array(module.weight.T), _array(module.bias)


def _silu(value: np.ndarray) -> np.ndarray:
    return value / (1 + np.exp(-value))
