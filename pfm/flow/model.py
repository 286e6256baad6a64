"""A fitted field and win probability, applied to outputs: transport, trajectories, velocities, b and its gradient."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from pfm._internal.checks import check_choice, check_number, check_whole
from pfm._internal.chunks import Work, map_rows
from pfm.devices import with_standard_defaults
from pfm.errors import NonFiniteWarning
from pfm.flow import cuda_graphs as graphs
from pfm.flow.config import FlowConfig
from pfm.flow.fields import SMALL, Field, Normalizer
from pfm.flow.inputs import check_inputs, check_times
from pfm.flow.integration import ADAPTIVE_SOLVERS, STAGES
from pfm.flow.passes import FieldPass
from pfm.flow.preference_win import PreferenceWin, candidate_wins
from pfm.flow.registered_field import MLP, RegisteredField
from pfm.flow.win import WinHead
from pfm.preferences.base import PreferenceModel

__all__ = ["FlowModel"]

MODES = ("single", "gated", "reapply", "relabel")
FAILURES = ("keep", "raise")
_CALLER = 4  # of a public method under no_grad, past the decorations: whom a warning is for


@with_standard_defaults
class FlowModel(FieldPass):
    """Applies a field v(t, y | x) and a win probability b(y | x) to outputs; :class:`pfm.PreferenceFlow` fits them.

    Its numbers are float32 on every device: ``half()``, ``bfloat16()`` and ``double()`` are refused, and
    ``FlowConfig(dtype=...)`` says how precisely it computes. Later rounds are of the subclass that is built, whose
    constructor takes the same four arguments.

    Args:
        event_shape: shape (\\*D) of one output.
        context_dimension: number of values C in a context, 0 for none.
        config: a :class:`pfm.FlowConfig` or its dict.
        metadata: what the fit found and where the vectors come from (JSON values).
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_dimension: int = 0,
        config: dict[str, Any] | FlowConfig | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = torch.Size(event_shape)
        self.context_dimension = int(context_dimension)
        self.config = config if isinstance(config, FlowConfig) else FlowConfig.from_dict(dict(config or {}))
        self.metadata: dict[str, Any] = dict(metadata or {})
        self._graphs = graphs.GraphCache()
        self.normalizer = Normalizer(self.dimension, self.context_dimension)
        self.field = self._new_field(self.context_dimension)
        self.context_free = self._new_field(0) if self.config.context_free else None
        described = self.metadata.pop("preference", None)
        self.win: WinHead | PreferenceWin = (
            WinHead(self.dimension, self.context_dimension)
            if described is None
            else PreferenceWin.restored(described, self.dimension, self.context_dimension)
        )
        self.later = nn.ModuleList(
            type(self)(event_shape, context_dimension, **described) for described in self.metadata.pop("later", [])
        )
        if self.metadata.get("residual_kept") is False:
            self.field.drop_residual()
        if self.context_free is not None and self.metadata.get("context_free", {}).get("residual_kept") is False:
            self.context_free.drop_residual()
        if self.metadata.get("win_network_kept") is False and isinstance(self.win, WinHead):
            self.win.drop_network()
        self.register_load_state_dict_post_hook(_forget_graphs)
        self.eval()

    def _new_field(self, context_dimension: int) -> Field:
        small, config = self.dimension <= SMALL, self.config
        own = None
        if config.field != MLP:
            own = RegisteredField(config.field, self.event_shape, context_dimension, config.field_options)
        return Field(
            self.dimension,
            context_dimension,
            (256 if small else 512) if config.hidden == "auto" else config.hidden,
            (4 if small else 3) if config.layers == "auto" else config.layers,
            residual=own,
            linear=config.linear,
        )

    # -- what it knows of itself ---------------------------------------------------------------------------------

    @property
    def dimension(self) -> int:
        """Return the number of values in one output."""
        return math.prod(self.event_shape)

    @property
    def steps(self) -> int:
        """Return the number of fixed steps of a pass."""
        return int(self.metadata.get("steps") or (1 if self.config.steps == "auto" else self.config.steps))

    @property
    def evaluations(self) -> int:
        """Return the number of evaluations of the field in one pass; of an adaptive solver, on the validation data."""
        if self.config.solver in ADAPTIVE_SOLVERS:
            return int(self.metadata.get("evaluations") or 0)
        return self.steps * STAGES[self.config.solver]

    @property
    def rounds(self) -> int:
        """Return the number of rounds of labels behind this flow: 1, and one more for every :meth:`relabel`."""
        return 1 + len(self.later)

    @property
    def preference(self) -> PreferenceModel | None:
        """Return the preference model behind b, or None where b is the flow's own classifier."""
        return self.win.model if isinstance(self.win, PreferenceWin) else None

    @property
    def guard_margin(self) -> float:
        """Return the smallest difference in b that held-out pairs confirm; infinity if they confirm none."""
        return float(self.win.margin)

    def normalize_by(
        self, chosen: Tensor, rejected: Tensor, context: Tensor | None = None, weight: Tensor | None = None
    ) -> None:
        """Take the normalisation, and the unit of the fields, from pairs of flat outputs (N, D)."""
        self.normalizer.fit(chosen, rejected, context, weight)
        self._set_units()

    def _set_units(self) -> None:
        for field in (self.field, self.context_free):
            if field is not None:
                field.unit.copy_(self.normalizer.displacement)

    # -- applying -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def transport(
        self,
        y: Any,
        context: Any = None,
        *,
        mode: str = "single",
        steps: int | None = None,
        rounds: int | None = None,
        strength: float = 1.0,
        guidance: float = 1.0,
        win_gradient: float = 0.0,
        on_failure: str = "keep",
        seed: int = 0,
    ) -> Tensor:
        """Carry outputs along the flow.

        Args:
            y: (B, \\*D) outputs, finite.
            context: (B, C), or (C,) for one context for all rows; None if the flow was fitted without.
            mode: ``"single"``: one pass, pi_ref to best of two with the reference source. ``"gated"``: each row is
                kept with probability b(y|x), else carried; exact for a flow with ``source="rejected"``. The draw
                depends on the row's own values, its context, ``seed`` and the number of the round, so it is
                repeatable and independent of the batch.
                ``"reapply"``: ``rounds`` passes of the same flow; it has no target distribution and leaves the data's
                support as rounds grow. ``"relabel"``: the rounds of :meth:`relabel`, each by its own flow.
            steps: fixed steps a pass; None for the number chosen at the end of the fit.
            rounds: passes of ``"reapply"``, None for 1; rounds of ``"relabel"``, None for all.
            strength: up to 1, the time at which the integration stops, so that 0 returns y unchanged; above 1 the
                whole displacement is multiplied: y + strength (T(y) - y).
            guidance: w in v(t, y) + w (v(t, y | x) - v(t, y)), from the field without contexts, for flows fitted with
                ``context_free=True`` (Ho and Salimans 2207.12598, on velocities as in Zheng et al. 2311.13443): 1
                is the field itself, 0 ignores the context, above 1 goes beyond it.
            win_gradient: multiple of S grad log b(y|x) that is added to the velocity; S (\\*D) is the outputs'
                variance under one context, so that for Gaussian outputs and small slopes 1 moves as far as a pass.
            on_failure: treatment of rows for which the field becomes non-finite: ``"keep"`` gives their last
                finite state, with a :class:`pfm.NonFiniteWarning` that says which they are; ``"raise"`` raises.
            seed: of the gate's draws; a whole number.

        Returns:
            (B, \\*D) float32, on the device of ``y`` (the CPU for arrays and lists), wherever the flow is. Rows do
            not depend on their neighbours in the batch, with fixed-step solvers.

        Raises:
            ValueError: shapes disagree with the flow's, values are not finite, or an argument is out of range.
            FloatingPointError: the field left the finite numbers and ``on_failure="raise"``.
        """
        settings = (mode, steps, rounds, guidance, win_gradient, on_failure, seed)
        strength = check_number("strength", strength, least=0)
        return self._transport(y, context, (strength,), *settings)[0]

    @torch.no_grad()
    def transport_strengths(
        self,
        y: Any,
        context: Any = None,
        *,
        strengths: Sequence[float],
        mode: str = "single",
        steps: int | None = None,
        rounds: int | None = None,
        guidance: float = 1.0,
        win_gradient: float = 0.0,
        on_failure: str = "keep",
        seed: int = 0,
    ) -> list[Tensor]:
        """Carry outputs by each of several strengths, to the places of :meth:`transport`, with fewer integrations.

        Strengths of 1 and above share one pass, and those below 1 that are reached by whole fixed steps share it too.
        Modes of several rounds take as long as calls of :meth:`transport`.

        Args:
            strengths: one or several. The other arguments are those of :meth:`transport`.

        Returns:
            one tensor (B, \\*D) a strength.

        Raises:
            ValueError, FloatingPointError: as :meth:`transport`.

        >>> places = flow.transport_strengths(y, strengths=[1.0, 2.0, 4.0])  # doctest: +SKIP
        """
        given: Any = getattr(strengths, "tolist", lambda: strengths)()
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise ValueError(f"strengths must be numbers, at least one, such as [1.0, 2.0]: got {strengths!r}")
        settings = (mode, steps, rounds, guidance, win_gradient, on_failure, seed)
        wanted = tuple(check_number("strengths", strength, least=0) for strength in given)
        return self._transport(y, context, wanted, *settings)

    def _transport(
        self,
        y: Any,
        context: Any,
        strengths: tuple[float, ...],
        mode: str,
        steps: int | None,
        rounds: int | None,
        guidance: float,
        win_gradient: float,
        on_failure: str,
        seed: int,
    ) -> list[Tensor]:
        """Carry outputs by each strength, at least 0; the other arguments are checked here."""
        check_choice("mode", mode, MODES)
        check_choice("on_failure", on_failure, FAILURES)
        rounds = self._checked_rounds(rounds, mode)
        seed = check_whole("seed", seed)
        guidance = check_number("guidance", guidance, least=0)
        win_gradient = check_number("win_gradient", win_gradient)
        if guidance != 1 and self.context_free is None:
            raise ValueError(
                f"guidance={guidance:g} needs a field without contexts: fit the flow with "
                "FlowConfig(context_free=True), or use guidance=1"
            )
        if mode == "gated" and self.config.source != "rejected":
            warnings.warn(
                "mode='gated' is exact for flows with source='rejected'; this one was fitted with "
                f"source={self.config.source!r}, for which mode='single' is",
                stacklevel=_CALLER + 1,
            )
        y, context = self._checked(y, context)
        fixed = self._checked_steps(steps) if steps is not None else None
        moving = tuple(dict.fromkeys(strength for strength in strengths if strength))
        if not moving:
            return [y.clone() for _ in strengths]

        def carry(
            state: Tensor, contexts: Tensor | None, wanted: tuple[float, ...] = moving, hold: bool = False
        ) -> tuple[Tensor, ...]:
            """Return the state of each wanted strength, and then which of its rows stayed finite."""
            if rounds > 1 and len(wanted) > 1:
                each = [carry(state, contexts, (strength,), hold) for strength in wanted]
                return (*(moved for moved, _ in each), *(well for _, well in each))
            states = [state] * len(wanted)
            finite = [torch.ones(len(state), dtype=torch.bool, device=state.device)] * len(wanted)
            for number in range(rounds):
                flow = self._round(number) if mode == "relabel" else self
                gated = mode == "gated" or (mode == "relabel" and flow.config.source == "rejected")
                gate = (seed, number) if gated else None
                found = flow._pass(states[0], contexts, fixed or flow.steps, wanted, guidance, win_gradient, gate, hold)
                states = [moved for moved, _ in found]
                finite = [before & well for before, (_, well) in zip(finite, found, strict=True)]
            return (*states, *finite)

        settings = (self.config, self.steps, mode, rounds, fixed, moving, guidance, seed)
        work = carry if win_gradient or mode == "relabel" else self._recorded(settings, carry)
        flat = y.flatten(1)
        carried = map_rows(work, flat, context, self.device)
        results, finite = carried[: len(moving)], carried[len(moving) :]
        lost_somewhere = torch.stack(finite).logical_not().any(0)
        if bool(lost_somewhere.any()):
            for strength, result, well in zip(moving, results, finite, strict=True):
                if bool(well.all()):
                    continue
                lost = ~well
                contexts = None if context is None else context[lost]
                again = partial(carry, wanted=(strength,), hold=True)
                result[lost], well[lost] = map_rows(again, flat[lost], contexts, self.device)
            warning = NonFiniteWarning(torch.stack(finite).all(0))
            if on_failure == "raise":
                raise FloatingPointError(f"{warning}; on_failure='keep' gives their last finite state")
            warnings.warn(warning, stacklevel=_CALLER + 1)
        places = {
            strength: result.unflatten(1, self.event_shape) for strength, result in zip(moving, results, strict=True)
        }
        places[0.0] = y
        # What is given twice, and y itself, must not share memory with another result.
        return [
            place.clone() if number != strengths.index(strength) or not strength else place
            for number, (strength, place) in enumerate((each, places[each]) for each in strengths)
        ]

    def _recorded(self, settings: Hashable, carry: Work) -> Work:
        """Return what replays a pass of few rows on a GPU, where launching its kernels one by one takes longer."""
        if not graphs.supported(self.device) or self.config.solver in ADAPTIVE_SOLVERS:
            return carry

        def recorded(rows: Tensor, contexts: Tensor | None) -> tuple[Tensor, ...]:
            return self._graphs(settings, carry, rows, contexts)

        return recorded

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move the flow, as ``to(device)`` does; its numbers stay float32.

        Raises:
            TypeError: another number type is requested, as by ``half()``, ``bfloat16()``, ``double()``.
        """
        kind = fn(torch.zeros(1, dtype=torch.float32, device=self.device)).dtype
        if kind != torch.float32:
            raise TypeError(
                f"a flow keeps its numbers in float32, in which its field was solved: got {kind}. To compute in lower "
                "precision set flow.config = flow.config.replace(dtype='bfloat16'); results are converted by "
                f"flow.transport(y).to({kind})"
            )
        self._graphs.clear()  # they read the parameters where these were
        return super()._apply(fn, recurse)

    def _round(self, number: int) -> FlowModel:
        later = self.later[number - 1] if number else self
        assert isinstance(later, FlowModel)
        return later

    def _checked_rounds(self, rounds: int | None, mode: str) -> int:
        if rounds is None:
            return self.rounds if mode == "relabel" else 1
        rounds = check_whole("rounds", rounds, 1)
        if mode == "relabel" and rounds > self.rounds:
            raise ValueError(
                f"rounds={rounds} is more than the {self.rounds} this flow has: add rounds with PreferenceFlow.relabel"
            )
        if rounds > 1 and mode not in ("reapply", "relabel"):
            raise ValueError(f"rounds={rounds} needs mode='reapply' or mode='relabel': got mode={mode!r}")
        return rounds

    @torch.no_grad()
    def trajectory(self, y: Any, context: Any = None, *, times: Any) -> Tensor:
        """Return the states along one pass, on the device of ``y``.

        Args:
            y: (B, \\*D) outputs. context: as for :meth:`transport`.
            times: (T,) increasing times in [0, 1].

        Returns:
            (T, B, \\*D); on a flow of unit vectors every state is projected to the sphere.
        """
        marks = check_times(times)
        y, context = self._checked(y, context)
        path = marks if marks[0] == 0 else [0.0, *marks]
        if len(path) == 1:
            return y[None].clone()

        def follow(rows: Tensor, contexts: Tensor | None) -> tuple[Tensor]:
            states, _ = self._integrate(self._guided(contexts, 1.0, 0.0), rows, path, self.steps)
            return (states.transpose(0, 1),)

        states = map_rows(follow, y.flatten(1), context, self.device)[0].transpose(0, 1)
        if self.metadata.get("unit_norm"):
            states = nn.functional.normalize(states, dim=2)
        return states[-len(marks) :].unflatten(2, self.event_shape)

    @torch.no_grad()
    def velocity(self, t: float, y: Any, context: Any = None) -> Tensor:
        """Return the field v(t, y | x) (B, \\*D), in the outputs' units for a pass, at a time t in [0, 1].

        Args:
            t: one time for all rows. y: (B, \\*D) outputs. context: as for :meth:`transport`.
        """
        t = check_number("t", t, least=0, most=1)

        def evaluate(rows: Tensor, contexts: Tensor | None) -> tuple[Tensor]:
            velocity = self.field.at(self.normalizer.context(contexts))
            return (velocity(float(t), self.normalizer(rows)) * self.normalizer.scale,)

        y, context = self._checked(y, context)
        return map_rows(evaluate, y.flatten(1), context, self.device)[0].unflatten(1, self.event_shape)

    @torch.no_grad()
    def straightness(self, y: Any, context: Any = None, *, times: int = 32) -> float:
        """Return how far paths depart from straight lines: 0 for straight ones, which one Euler step follows.

        The mean over outputs and times of |v(t, y_t) - (y_1 - y_0)|^2 (Liu et al. 2209.03003, section 2.2), divided by
        the mean of |y_1 - y_0|^2, in normalised coordinates.

        Args:
            y: (B, \\*D) outputs. context: as for :meth:`transport`. times: midpoints of equal intervals to look at.
        """
        y, context = self._checked(y, context)
        if "distilled" in self.metadata:
            return 0.0
        marks = [(number + 0.5) / times for number in range(times)]

        def measure(rows: Tensor, contexts: Tensor | None) -> tuple[Tensor, Tensor]:
            velocity = self._guided(contexts, 1.0, 0.0)
            states, _ = self._integrate(velocity, rows, [0.0, *marks, 1.0], max(self.steps, times))
            states = self.normalizer(states)
            whole = states[-1] - states[0]
            departed = whole.new_zeros(len(whole))
            for t, at in zip(marks, states[1:-1], strict=True):
                departed += (velocity(t, at) - whole).square().sum(1) / times
            return departed, whole.square().sum(1)

        departed, moved = (float(each.double().sum()) for each in map_rows(measure, y.flatten(1), context, self.device))
        return departed / moved if moved > 0 else 0.0

    @torch.no_grad()
    def win_gradient(self, y: Any, context: Any = None) -> Tensor:
        """Return the gradient of log b(y|x) with respect to y, (B, \\*D).

        Args:
            y: (B, \\*D) outputs. context: as for :meth:`transport`.
        """
        y, context = self._checked(y, context)
        slope = map_rows(lambda rows, contexts: (self._win_slope(rows, contexts),), y.flatten(1), context, self.device)
        return slope[0].unflatten(1, self.event_shape)

    @torch.no_grad()
    def win_probability(self, y: Any, context: Any = None) -> Tensor:
        """Return b(y|x) (B,) in [0, 1]: the chance that y beats an independent draw of the reference.

        Args:
            y: (B, \\*D) outputs. context: as for :meth:`transport`.
        """
        y, context = self._checked(y, context)
        return map_rows(
            lambda rows, contexts: (torch.sigmoid(self.win(rows, contexts)),), y.flatten(1), context, self.device
        )[0]

    @torch.no_grad()
    def candidate_probabilities(
        self, y: Any, context: Any, prompt: Tensor, tags: Sequence[str] | None = None
    ) -> Tensor:
        """Return b(y|x) (B,) of the candidates of several prompts, with the other candidates for opponents.

        So it is where a preference model gives b and a prompt has two or more candidates: they are draws of its own
        reference. Else it is :meth:`win_probability`.

        Args:
            y: (B, \\*D) candidates. context: as for :meth:`transport`.
            prompt: (B,) number of each one's prompt.
            tags: names of their generators, which b does not depend on.
        """
        found = self.win_probability(y, context)
        if not isinstance(self.win, PreferenceWin):
            return found
        y, context = self._checked(y, context)
        prompt = prompt.to(y.device)
        for number in prompt.unique().tolist():
            rows = (prompt == number).nonzero().flatten()
            if len(rows) > 1:
                of_prompt = None if context is None else context[rows]
                found[rows] = candidate_wins(self.win.model, y[rows], of_prompt)
        return found

    @torch.no_grad()
    def alignment(self, y: Any, context: Any = None) -> Tensor:
        """Return how far each of one prompt's candidates lies along the flow's displacement of them.

        Args:
            y: (B, \\*D) the candidates of one prompt. context: (C,), (1, C) or (B, C).

        Returns:
            (B,): the projection of each candidate, from the candidates' mean, on their mean displacement
            T(y) - y, both in normalised coordinates; zeros where the flow does not move them.
        """
        y, context = self._checked(y, context)
        flat = y.flatten(1)
        moved, _ = map_rows(
            lambda rows, contexts: self._pass(rows, contexts, self.steps)[0], flat, context, self.device
        )
        scale = self.normalizer.scale.to(y.device)
        direction = ((moved - flat) / scale).mean(0)
        return ((flat - flat.mean(0)) / scale) @ nn.functional.normalize(direction, dim=0)

    def _checked(self, y: Any, context: Any) -> tuple[Tensor, Tensor | None]:
        """Return float32 outputs (B, \\*D) and a context a row, on the device of ``y``."""
        return check_inputs(y, context, self.event_shape, self.context_dimension)

    def _checked_steps(self, steps: int | None) -> int:
        if steps is None:
            return self.steps
        steps = check_whole("steps", steps, 1)
        if steps > 1 and "distilled" in self.metadata:
            raise ValueError(f"steps={steps} has no meaning for a distilled flow, whose pass is one evaluation")
        return steps


def _forget_graphs(flow: FlowModel, _: Any) -> None:
    flow._graphs.clear()  # of parameters as they were
