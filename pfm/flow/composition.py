"""Composition: one flow made of several at run time, v(t, y | x) = sum over k of w_k v_k(t, y | x).

Every v_k was fitted on its own, for a taste, a criterion or a group of raters. Weights sum to 1, and then:

- at t = 0 the sum is exactly the field of pairs whose labels come from a taste drawn with the weights; later it is not,
  since that field weighs each v_k by how dense its own paths are at (t, y), w_k rho_k / sum_j w_j rho_j;
- where all fields share their slope in y, v_k = A(t) y + c_k(t), a pass moves every output by the weighted sum of what
  the flows move it by alone, T(y) - y = sum_k w_k (T_k(y) - y). The closed-form fields of tastes on one Gaussian
  reference share it up to the squares of the displacements; of other fields this holds to first order in them;
- sum_k w_k b_k is exactly the chance to beat a reference draw by the taste that is drawn.

The distribution that a composed pass reaches has no closed form: :meth:`Composition.trade_off` measures its value.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pfm._internal.archive import read_description, read_folder, save_folder
from pfm._internal.checks import as_float_tensor, check_choice, check_finite, check_length, check_number, check_shape
from pfm._internal.chunks import map_rows
from pfm._internal.files import replace_json, require_files
from pfm.data.vector_spaces import vector_space
from pfm.devices import with_standard_defaults
from pfm.errors import NonFiniteWarning
from pfm.flow.fields import Velocity
from pfm.flow.inputs import check_inputs, check_times
from pfm.flow.integration import integrate
from pfm.flow.model import FAILURES
from pfm.flow.preference_flow import PreferenceFlow

__all__ = ["Composition", "TradeOff", "check_weights", "compose", "simplex"]

DESCRIPTION = "composition.json"
TOLERANCE = 1e-4  # of the weights' sum from 1

WinProbability = Callable[[Tensor, Tensor | None], Tensor]
"""Gives for outputs y (B, \\*D) under contexts (B, C) or None the chance (B,) to beat a draw of the reference."""


@dataclass(frozen=True)
class TradeOff:
    """Holds what compositions reach for each of K tastes.

    Attributes:
        weights: (M, K), one row a composition.
        win: (M, K) mean chance, by each taste, that a moved output beats a draw of the reference.
        moved: (M,) mean distance by which outputs were moved.
        names: of the tastes.
    """

    weights: Tensor
    win: Tensor
    moved: Tensor
    names: tuple[str, ...]

    @property
    def worst(self) -> Tensor:
        """Return the chance for the worst-off taste (M,)."""
        return self.win.amin(1)

    @property
    def average(self) -> Tensor:
        """Return the chance averaged over tastes (M,)."""
        return self.win.mean(1)

    @property
    def maxmin(self) -> int:
        """Return the number of the composition that is best for its worst-off taste (MaxMin)."""
        return int(self.worst.argmax())

    @property
    def best_average(self) -> int:
        """Return the number of the composition that is best on average over tastes."""
        return int(self.average.argmax())

    def rows(self) -> list[dict[str, float]]:
        """Return one dict a composition: weight and win by taste, worst, average, moved."""
        return [
            {f"weight {name}": float(w) for name, w in zip(self.names, weights, strict=True)}
            | {f"win {name}": float(b) for name, b in zip(self.names, win, strict=True)}
            | {"worst": float(win.min()), "average": float(win.mean()), "moved": float(moved)}
            for weights, win, moved in zip(self.weights, self.win, self.moved, strict=True)
        ]

    def plot(self, axes: Any) -> None:
        """Draw the curve of the first two tastes on matplotlib axes, with the MaxMin and the best average marked."""
        order = self.weights[:, 0].argsort()
        first, second = self.win[order, 0].tolist(), self.win[order, 1].tolist()
        axes.plot(first, second, "o-" if len(self.names) == 2 else "o", markersize=3, color="tab:blue")
        for number, marker, label in (
            (self.maxmin, "s", "best for the worst-off"),
            (self.best_average, "*", "best on average"),
        ):
            axes.plot(*self.win[number, :2].tolist(), marker, markersize=9, fillstyle="none", label=label)
        axes.set_xlabel(f"chance to beat the reference, {self.names[0]}")
        axes.set_ylabel(f"chance to beat the reference, {self.names[1]}")
        axes.legend(frameon=False)


@with_standard_defaults
class Composition:
    """Moves outputs by a weighted sum of fitted flows' velocities; made by :func:`compose`.

    It stands where a flow does in :func:`pfm.wrap`: candidates are chosen by the weighted sum of the flows' b.

    Args:
        flows: K flows of outputs of one shape, each with or without contexts of one dimension.
        weights: (K,) at least 0, with sum 1.
        names: of the flows; None for their numbers.
    """

    def __init__(self, flows: Sequence[PreferenceFlow], weights: Any, names: Sequence[str] | None = None) -> None:
        self.flows = tuple(flows)
        _check_flows(self.flows)
        device = self.flows[0].device
        self.flows = tuple(flow if flow.device == device else copy.deepcopy(flow).to(device) for flow in self.flows)
        self.weights = check_weights("weights", weights, len(self.flows))
        check_shape("weights", self.weights, (len(self.flows),), "one a flow")
        self.names = tuple(map(str, range(len(self.flows)) if names is None else names))
        if len(self.names) != len(self.flows) or len(set(self.names)) != len(self.names):
            raise ValueError(f"names must be {len(self.flows)} different names, one a flow: got {list(self.names)}")

    def __repr__(self) -> str:
        shares = ", ".join(
            f"{name}: {weight:.3g}" for name, weight in zip(self.names, self.weights.tolist(), strict=True)
        )
        return f"Composition({{{shares}}} on outputs {tuple(self.event_shape)})"

    @property
    def event_shape(self) -> torch.Size:
        """Return the shape of one output."""
        return self.flows[0].event_shape

    @property
    def device(self) -> torch.device:
        """Return the device of the flows: that of the first one, to which copies of the others were moved."""
        return self.flows[0].device

    def to(self, device: Any) -> Composition:
        """Copy the composition to a device."""
        return Composition([copy.deepcopy(flow).to(device) for flow in self.flows], self.weights, self.names)

    @property
    def context_dimension(self) -> int:
        """Return the number of values of a context; 0 if no flow takes any."""
        return max(flow.context_dimension for flow in self.flows)

    @property
    def steps(self) -> int:
        """Return the number of fixed steps of a pass: that of the flow which needs most."""
        return max(flow.steps for flow in self.flows)

    @property
    def metadata(self) -> dict[str, Any]:
        """Return the encoder and the sizes of the outputs and contexts that the flows were fitted on."""
        encoders = (flow.metadata.get("encoder") for flow in self.flows)
        return {
            "encoder": next((encoder for encoder in encoders if encoder), None),
            "dimension": self.flows[0].dimension,
            "context_dimension": self.context_dimension,
        }

    @property
    def guard_margin(self) -> float:
        """Return the weighted sum of the flows' margins: infinity if one that has a weight confirms none."""
        weighted = zip(self.weights.tolist(), self.flows, strict=True)
        return sum(weight * flow.guard_margin for weight, flow in weighted if weight > 0)

    def with_weights(self, weights: Any) -> Composition:
        """Compose the same flows with other weights."""
        return Composition(self.flows, weights, self.names)

    @torch.no_grad()
    def transport(
        self, y: Any, context: Any = None, *, weights: Any = None, strength: float = 1.0, on_failure: str = "keep"
    ) -> Tensor:
        """Carry outputs along the composed field, once.

        Args:
            y: (B, \\*D) outputs, finite. context: (B, C), or (C,) for all rows, or None.
            weights: (K,), or (B, K) for every output its own; None for those of the composition.
            strength: up to 1 the time at which the integration stops; above 1 the whole displacement is multiplied.
            on_failure: of rows for which the field leaves the finite numbers: ``"keep"`` gives their last finite state
                with a :class:`pfm.NonFiniteWarning`, ``"raise"`` raises.

        Returns:
            (B, \\*D) float32, on the device of ``y``; on flows of unit vectors projected to the sphere.
        """
        strength = check_number("strength", strength, least=0)
        check_choice("on_failure", on_failure, FAILURES)
        y, context, weights = self._checked(y, context, weights)
        if strength == 0:
            return y.clone()
        flat = y.flatten(1)
        states, finite = self._integrate(flat, context, weights, (0.0, min(strength, 1.0)))
        moved = states[-1]
        if strength > 1:
            moved = flat + strength * (moved - flat)
        if not bool(finite.all()):
            warning = NonFiniteWarning(finite)
            if on_failure == "raise":
                raise FloatingPointError(f"{warning}; on_failure='keep' gives their last finite state")
            warnings.warn(warning, stacklevel=4)
        return self._projected(moved).unflatten(1, self.event_shape)

    @torch.no_grad()
    def trajectory(self, y: Any, context: Any = None, *, times: Any, weights: Any = None) -> Tensor:
        """Return the states (T, B, \\*D) along a pass at ``times`` (T,), increasing in [0, 1]."""
        marks = check_times(times)
        y, context, weights = self._checked(y, context, weights)
        path = marks if marks[0] == 0 else [0.0, *marks]
        flat = y.flatten(1)
        states = flat[None] if len(path) == 1 else self._integrate(flat, context, weights, path)[0]
        kept = states[-len(marks) :]
        return torch.cat([kept[:1], self._projected(kept[1:])] if marks[0] == 0 else [self._projected(kept)]).unflatten(
            2, self.event_shape
        )

    @torch.no_grad()
    def velocity(self, t: float, y: Any, context: Any = None, *, weights: Any = None) -> Tensor:
        """Return sum_k w_k v_k(t, y | x) (B, \\*D) at one time, in the outputs' units a pass."""
        t = check_number("t", t, least=0, most=1)
        y, context, weights = self._checked(y, context, weights)

        def evaluate(rows: Tensor, joined: Tensor | None) -> tuple[Tensor]:
            return (self._velocity(*self._parts(joined))(float(t), rows),)

        moved = map_rows(evaluate, y.flatten(1), _join(context, weights), self.device)[0]
        return moved.unflatten(1, self.event_shape)

    @torch.no_grad()
    def win_probability(self, y: Any, context: Any = None, *, weights: Any = None) -> Tensor:
        """Return sum_k w_k b_k(y|x) (B,): the chance to beat a reference draw by a taste drawn with the weights."""
        y, context, weights = self._checked(y, context, weights)
        return (weights * self._wins(y, context)).sum(1)

    @torch.no_grad()
    def candidate_probabilities(
        self, y: Any, context: Any, prompt: Tensor, tags: Sequence[str] | None = None
    ) -> Tensor:
        """Return sum_k w_k b_k (B,) as :meth:`pfm.PreferenceFlow.candidate_probabilities` gives each b_k."""
        y, context, weights = self._checked(y, context, None)
        found = [flow.candidate_probabilities(y, _own(flow, context), prompt) for flow in self.flows]
        return (weights * torch.stack(found, dim=1)).sum(1)

    @torch.no_grad()
    def alignment(self, y: Any, context: Any = None) -> Tensor:
        """Return how far each of one prompt's candidates lies along their mean displacement (B,).

        As :meth:`pfm.PreferenceFlow.alignment`, in units of the weighted mean of the flows' scales.
        """
        moved = self.transport(y, context)
        y, _, _ = self._checked(y, context, None)
        scale = sum(
            weight * flow.normalizer.scale for weight, flow in zip(self.weights.tolist(), self.flows, strict=True)
        )
        flat = y.flatten(1) / scale
        direction = (moved.flatten(1) / scale - flat).mean(0)
        return (flat - flat.mean(0)) @ nn.functional.normalize(direction, dim=0)

    @torch.no_grad()
    def trade_off(
        self,
        y: Any,
        context: Any = None,
        *,
        weights: Any = None,
        points: int = 11,
        strength: float = 1.0,
        judges: Sequence[WinProbability] | None = None,
    ) -> TradeOff:
        """Measure compositions over a range of weights: what moving ``y`` by each reaches for every taste.

        The weights at which the worst-off taste fares best are ``trade_off(...).weights[trade_off(...).maxmin]``.

        Args:
            y: (B, \\*D) reference draws. context: as for :meth:`transport`.
            weights: (M, K) compositions to try; None for a lattice on the simplex with ``points`` values a weight.
            strength: of the transports.
            judges: K functions (y, context) -> (B,) that give each taste's chance to beat the reference; None takes
                the flows' own b, which were fitted on the same pairs as the fields: for a claim give models that
                were fitted on other pairs.
        """
        if judges is not None:
            check_length("judges", judges, len(self.flows), "flow")
        if weights is None:
            weights = simplex(len(self.flows), points)
        weights = check_weights("weights", weights, len(self.flows))
        check_shape("weights", weights, ("M", len(self.flows)), "one row a composition")
        y, context, _ = self._checked(y, context, None)
        wins, distances = [], []
        for row in weights:
            moved = self.transport(y, context, weights=row, strength=strength)
            if judges is None:
                wins.append(self._wins(moved, context).mean(0))
            else:
                wins.append(torch.stack([torch.as_tensor(judge(moved, context)).float().mean() for judge in judges]))
            distances.append((moved - y).flatten(1).norm(dim=1).mean())
        return TradeOff(weights, torch.stack(wins), torch.stack(distances), self.names)

    def save(self, folder: str | Path) -> Path:
        """Write flows, weights and names to a folder, as a whole; :meth:`load` reads it."""
        folder = Path(folder).expanduser()
        with save_folder(folder) as staging:
            for number, flow in enumerate(self.flows):
                flow.save_pretrained(staging / f"flow-{number}")
            described = {"version": 1, "names": list(self.names), "weights": self.weights.tolist()}
            replace_json(staging / DESCRIPTION, described)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Composition:
        """Load what :meth:`save` wrote.

        Raises:
            FileNotFoundError: the folder or one of its files is not there. ValueError: a file is damaged.
        """
        folder = Path(folder).expanduser()
        return read_folder(folder, (DESCRIPTION, "flow-*/*"), lambda: cls._load(folder))

    @classmethod
    def _load(cls, folder: Path) -> Composition:
        require_files(folder, (DESCRIPTION,), "Composition.save")
        described = read_description(folder / DESCRIPTION)
        try:
            names, weights = list(described["names"]), described["weights"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / DESCRIPTION} is damaged ({error}): save the composition again") from error
        flows = [PreferenceFlow.from_pretrained(folder / f"flow-{number}") for number in range(len(names))]
        return cls(flows, weights, names)

    # -- inside -------------------------------------------------------------------------------------------------

    def _wins(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return b_k(y|x) of every flow, (B, K)."""
        return torch.stack([flow.win_probability(y, _own(flow, context)) for flow in self.flows], dim=1)

    def _velocity(self, context: Tensor | None, weights: Tensor) -> Velocity:
        """Return the composed velocity of flat outputs, in their own units."""
        # A flow without weight in any row is not evaluated.
        parts = [
            (flow.normalizer, flow.field.at(flow.normalizer.context(_own(flow, context))), weight[:, None])
            for flow, weight in zip(self.flows, weights.T, strict=True)
            if bool(weight.any())
        ]

        def velocity(t: float, y: Tensor) -> Tensor:
            moved = torch.zeros_like(y)
            for normalizer, field, weight in parts:
                moved = torch.addcmul(moved, weight, field(t, normalizer(y)) * normalizer.scale)
            return moved

        return velocity

    def _integrate(
        self, y: Tensor, context: Tensor | None, weights: Tensor, times: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        solver = max(self.flows, key=lambda flow: flow.steps).config.solver

        def carry(rows: Tensor, joined: Tensor | None) -> tuple[Tensor, Tensor]:
            velocity = self._velocity(*self._parts(joined))
            states, finite, _ = integrate(velocity, rows, times, solver=solver, steps=self.steps)
            return states.transpose(0, 1), finite

        states, finite = map_rows(carry, y, _join(context, weights), self.device)
        return states.transpose(0, 1), finite

    def _parts(self, joined: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Take contexts and weights apart that :func:`_join` put together."""
        assert joined is not None
        contexts, weights = joined.split([joined.shape[1] - len(self.flows), len(self.flows)], dim=1)
        return contexts if contexts.shape[1] else None, weights

    def _projected(self, y: Tensor) -> Tensor:
        if any(flow.metadata.get("unit_norm") for flow in self.flows):
            return nn.functional.normalize(y, dim=-1)
        return y

    def _checked(self, y: Any, context: Any, weights: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        y, context = check_inputs(y, context, self.event_shape, self.context_dimension, "these flows were fitted")
        weights = self.weights if weights is None else check_weights("weights", weights, len(self.flows))
        if weights.ndim == 2 and len(weights) != len(y):
            raise ValueError(
                f"weights must be ({len(self.flows)},) or ({len(y)}, {len(self.flows)}): got {tuple(weights.shape)}"
            )
        return y, context, weights.to(y.device).expand(len(y), -1)


def _join(context: Tensor | None, weights: Tensor) -> Tensor:
    return weights if context is None else torch.cat([context, weights], dim=1)


def compose(flows: Sequence[tuple[PreferenceFlow, float]], *, names: Sequence[str] | None = None) -> Composition:
    """Compose fitted flows: v = sum_k w_k v_k, with weights that may be changed at every call.

    Args:
        flows: pairs (flow, weight); weights at least 0 with sum 1. ``strength`` makes a larger step.
        names: of the tastes that the flows stand for.

    Raises:
        TypeError: not pairs of a flow and a number.
        ValueError: weights are negative, not finite or do not sum to 1, or flows of different outputs or contexts.

    >>> import pfm
    >>> low, high = torch.randn(2, 40, 1, generator=torch.Generator().manual_seed(0)).sort(0).values
    >>> config = pfm.FlowConfig(residual=False)
    >>> up = pfm.PreferenceFlow.fit(pfm.EncodedPairs(high, low), config, progress=False)
    >>> down = pfm.PreferenceFlow.fit(pfm.EncodedPairs(low, high), config, progress=False)
    >>> both = compose([(up, 0.8), (down, 0.2)], names=["large", "small"])
    >>> bool(0 < both.transport(torch.zeros(1, 1)) < up.transport(torch.zeros(1, 1)))
    True
    """
    pairs = list(flows)
    if not pairs:
        raise ValueError("flows holds no flow: at least one (flow, weight) is needed")
    for number, pair in enumerate(pairs):
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], PreferenceFlow)):
            raise TypeError(f"flows must be pairs (PreferenceFlow, weight): number {number} is {pair!r:.80}")
    return Composition([flow for flow, _ in pairs], [weight for _, weight in pairs], names)


def check_weights(name: str, weights: Any, count: int) -> Tensor:
    """Check weights (K,) or (B, K): finite, at least 0, each row with sum 1 (to rounding, which is divided out).

    Raises:
        ValueError: they are not.
    """
    found = as_float_tensor(name, weights).float()
    if found.ndim not in (1, 2) or found.shape[-1] != count:
        raise ValueError(f"{name} must be ({count},), or (B, {count}) for rows of their own: got {tuple(found.shape)}")
    check_finite(name, found)
    if bool((found < 0).any()):
        raise ValueError(
            f"{name} must be at least 0: got {_shown(found)}; to leave a taste, fit a flow on its pairs swapped"
        )
    total = found.sum(-1, keepdim=True)
    if bool(((total - 1).abs() > TOLERANCE).any()):
        worst = float(total.flatten()[(total - 1).abs().argmax()])
        raise ValueError(
            f"{name} must sum to 1: got {_shown(found)} with sum {worst:g}; "
            "divide them by their sum, and make a larger step with strength"
        )
    return found / total


def simplex(tastes: int, points: int = 11) -> Tensor:
    """Return all weights (M, K) over K tastes whose entries are multiples of 1 / (points - 1)."""
    if tastes < 1 or points < 2:
        raise ValueError(f"a lattice needs at least one taste and two points: got {tastes} and {points}")
    parts = points - 1
    bars = itertools.combinations(range(parts + tastes - 1), tastes - 1)
    rows = [[b - a - 1 for a, b in itertools.pairwise((-1, *bar, parts + tastes - 1))] for bar in bars]
    return torch.tensor(rows, dtype=torch.float32) / parts


def _own(flow: PreferenceFlow, context: Tensor | None) -> Tensor | None:
    return context if flow.context_dimension else None


def _shown(values: Tensor) -> str:
    return str([round(value, 4) for value in values.flatten()[:8].tolist()])


def _check_flows(flows: Sequence[PreferenceFlow]) -> None:
    first = flows[0]
    for number, flow in enumerate(flows):
        if flow.event_shape != first.event_shape:
            raise ValueError(
                f"flows must move outputs of one shape: flow 0 moves {tuple(first.event_shape)}, flow {number} "
                f"{tuple(flow.event_shape)}"
            )
        if "distilled" in flow.metadata:
            raise ValueError(
                f"flow {number} is distilled, and has no velocity but at its start: compose the flow it was distilled "
                "from"
            )
        if flow.rounds > 1:
            raise ValueError(f"flow {number} has {flow.rounds} rounds: compose flows of one round each")
    encoders = [vector_space(flow.metadata.get("encoder")) for flow in flows]
    known = [number for number, encoder in enumerate(encoders) if encoder]
    for number in known[1:]:
        if encoders[number] != encoders[known[0]]:
            raise ValueError(
                f"flows must move vectors of one encoder: flow {known[0]} was fitted on {encoders[known[0]]}, flow "
                f"{number} on {encoders[number]}"
            )
    with_context = sorted({flow.context_dimension for flow in flows} - {0})
    if len(with_context) > 1:
        raise ValueError(f"flows must take contexts of one dimension, or none: got {with_context}")
