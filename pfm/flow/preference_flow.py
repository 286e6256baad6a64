"""PreferenceFlow: a vector field and a win probability, fitted on pairs, applied to outputs."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from pfm._internal.archive import (
    load_module,
    read_description,
    read_folder,
    save_folder,
    save_tensors,
    tensor_shapes,
)
from pfm._internal.chunks import Work, map_rows
from pfm._internal.files import replace_json, require_files
from pfm.data.encoded import EncodedPairs
from pfm.data.tensors import as_float_tensor, check_finite, row_hash
from pfm.devices import free_memory, resolve_device, with_standard_defaults
from pfm.errors import NonFiniteWarning
from pfm.flow import cuda_graphs as graphs
from pfm.flow.config import FlowConfig, refuse_options
from pfm.flow.couplings import Joined, WithoutContext, make_coupling
from pfm.flow.fields import SMALL, Field, Normalizer, Velocity
from pfm.flow.fitting import at_most, choose_steps, fit_field, matmul_precision
from pfm.flow.integration import ADAPTIVE_SOLVERS, STAGES, integrate
from pfm.flow.preference_win import PreferenceWin, candidate_wins, rescored
from pfm.flow.registered_field import MLP, RegisteredField
from pfm.flow.rounds import Labeller, as_labeller, compare_rounds, labelled, warn_of_cycle
from pfm.flow.training import remove_checkpoint
from pfm.flow.win import WinHead
from pfm.preferences.base import PreferenceModel

__all__ = ["PreferenceFlow"]

logger = logging.getLogger(__name__)

MODES = ("single", "gated", "reapply", "relabel")
FAILURES = ("keep", "raise")
DESCRIPTION, TENSORS = "config.json", "model.safetensors"  # the hub's names
DESCRIBED = ("event_shape", "context_dimension", "config", "metadata")
LOADING_OPTIONS = ("map_location", "revision", "token", "cache_dir", "force_download", "local_files_only")
STATISTICS_ROWS = 20_000
_CALLER = 4  # of a public method under no_grad, past the decorations: whom a warning is for
RESIDENT_SHARE = 0.5  # of a device's free memory that pairs may take to be kept there


@with_standard_defaults
class PreferenceFlow(nn.Module, PyTorchModelHubMixin, library_name="preference-flow", tags=["preference-flow"]):
    """Carries less-preferred outputs to preferred ones: dy/dt = v(t, y | x), t from 0 to 1.

    Make one with :meth:`fit` or :meth:`from_pretrained`. One pass of a flow fitted with ``source="reference"``
    carries the reference's law pi_ref to the winners' law p1 = 2 pi_ref b, the law of best of two, as far as the
    field is learned; b(y|x) is the chance that y beats an independent draw of the reference.

    Its numbers are float32 on every device: ``half()``, ``bfloat16()`` and ``double()`` are refused, and
    ``FlowConfig(dtype=...)`` says how precisely it computes. Copies, :meth:`distill`, :meth:`relabel` and loading make
    flows of the subclass that they are called on, whose constructor takes the same four arguments.

    Args:
        event_shape: shape (\\*D) of one output.
        context_dimension: number of values C in a context, 0 for none.
        config: a :class:`pfm.FlowConfig` or its dict.
        metadata: what the fit found and where the vectors come from (JSON values).

    >>> rejected, chosen = torch.randn(2, 40, 1, generator=torch.Generator().manual_seed(0)).sort(0).values
    >>> pairs = EncodedPairs(chosen, rejected)  # of two numbers the larger is preferred
    >>> flow = PreferenceFlow.fit(pairs, FlowConfig(residual=False), progress=False)
    >>> bool((flow.transport(rejected) > rejected).all())
    True
    >>> (flow.win_probability([[2.0], [-2.0]]) > 0.5).tolist()
    [True, False]
    >>> _ = flow.save_pretrained("my-flow")
    >>> again = PreferenceFlow.from_pretrained("my-flow")
    >>> torch.equal(again.transport(rejected), flow.transport(rejected))
    True
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
        """Give the number of values in one output."""
        return math.prod(self.event_shape)

    @property
    def steps(self) -> int:
        """Give the number of fixed steps of a pass."""
        return int(self.metadata.get("steps") or (1 if self.config.steps == "auto" else self.config.steps))

    @property
    def evaluations(self) -> int:
        """Give the number of evaluations of the field in one pass; of an adaptive solver, on the validation data."""
        return self._evaluations(self.steps)

    def _evaluations(self, steps: int) -> int:
        if self.config.solver in ADAPTIVE_SOLVERS:
            return int(self.metadata.get("evaluations") or 0)
        return steps * STAGES[self.config.solver]

    @property
    def rounds(self) -> int:
        """Give the number of rounds of labels behind this flow: 1, and one more for every :meth:`relabel`."""
        return 1 + len(self.later)

    @property
    def preference(self) -> PreferenceModel | None:
        """Give the preference model behind b, or None where b is the flow's own classifier."""
        return self.win.model if isinstance(self.win, PreferenceWin) else None

    @property
    def guard_margin(self) -> float:
        """Give the smallest difference in b that held-out pairs confirm; infinity if they confirm none."""
        return float(self.win.margin)

    @property
    def device(self) -> torch.device:
        """Give the device of the parameters."""
        return self.normalizer.mean.device

    # -- fitting ------------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        encoded: EncodedPairs,
        config: FlowConfig | Mapping[str, Any] | None = None,
        validation: EncodedPairs | None = None,
        progress: bool = True,
        *,
        preference: PreferenceModel | None = None,
        checkpoint: str | Path | None = None,
    ) -> PreferenceFlow:
        """Fit a flow on labelled pairs.

        Args:
            encoded: the pairs, N of them.
            config: settings; None for the defaults.
            validation: pairs of other prompts, on which the ridge, the residual and the number of steps are
                decided; None holds out ``config.validation_share`` of the prompts of ``encoded``.
            progress: show a progress bar.
            preference: a preference model that is to give b, in place of the flow's own classifier, and the scores of
                candidate sets for ``best_of`` above 2; fitted on the training prompts here if it is not yet. Its guard
                is set on the validation pairs, which a model that is fitted already should not have seen. See
                :mod:`pfm.flow.preference_win` for what b means when preferences go round.
            checkpoint: folder for the training state; a fit that was stopped goes on from it.

        Raises:
            TypeError: ``encoded`` is not EncodedPairs.
            ValueError: shapes of training and validation pairs disagree, or the configuration asks for what the
                pairs do not carry.
        """
        if not isinstance(encoded, EncodedPairs):
            raise TypeError(
                f"encoded must be EncodedPairs: got {type(encoded).__name__}; text pairs are encoded by "
                "PreferencePairs.encode(encoder), tensors by EncodedPairs(chosen, rejected)"
            )
        if config is None:
            config = FlowConfig()
        elif not isinstance(config, FlowConfig):
            config = FlowConfig.from_dict(dict(config))
        began = time.perf_counter()
        encoded, validation = encoded.counted(), None if validation is None else validation.counted()
        train, held = _training_sets(encoded, validation, config)
        if preference is not None:
            if isinstance(preference, PreferenceModel) and preference.layout is None:
                preference.fit(train, progress=progress)
            win, judgement = PreferenceWin.made(preference, encoded, held, config.seed)
            if config.best_of > 2:
                train, held = (rescored(part, preference) for part in (train, held))
        device = resolve_device(config.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            flow = cls(encoded.event_shape, encoded.context_dimension, config)
        flow.to(device)
        train, held = (_resident(part, device) for part in (train, held))
        if config.context_free and not encoded.context_dimension:
            raise ValueError("context_free=True leaves contexts out, and these pairs have none: use context_free=False")
        with torch.no_grad():
            some = train.gather(at_most(len(train), STATISTICS_ROWS, config.seed))
            flow.normalizer.fit(some.chosen, some.rejected, some.context, some.weight)
            flow._set_units()
        coupling, check = (
            make_coupling(
                part, source=config.source, coupling=config.coupling, best_of=config.best_of, seed=config.seed,
            )
            for part in (train, held)
        )  # fmt: skip
        folder = None if checkpoint is None else Path(checkpoint)
        found = fit_field(flow.field, flow.normalizer, coupling, check, config, checkpoint=folder, progress=progress)
        flow.metadata |= found.to_dict() | {
            "encoder": encoded.encoder,
            "dimension": flow.dimension,
            "context_dimension": flow.context_dimension,
            "pairs": len(encoded),
            "prompts": len(torch.unique(encoded.group)),
            "version": _version(),
        }
        if flow.context_free is not None:
            flow.metadata["context_free"] = fit_field(
                flow.context_free, flow.normalizer, WithoutContext(coupling), WithoutContext(check), config,
                checkpoint=None if folder is None else folder / "context_free", progress=progress,
            ).to_dict()  # fmt: skip
        if preference is None:
            head = WinHead(flow.dimension, flow.context_dimension).to(device)
            judgement = head.fit(encoded, seed=config.seed).to_dict()
            flow._set_win(head, judgement)
        else:
            flow._set_win(win, judgement)
        flow.metadata["unit_norm"] = _on_unit_sphere(some.chosen, some.rejected, config)
        flow._set_steps(*choose_steps(flow.field, flow.normalizer, check, config))
        flow.metadata["seconds"] = round(time.perf_counter() - began, 3)
        if folder is not None:
            remove_checkpoint(folder / "context_free")
            remove_checkpoint(folder)
        logger.info("fitted on %d pairs: %s", len(encoded), json.dumps(flow.metadata, default=str))
        return flow.eval()

    def with_preference(self, preference: PreferenceModel, pairs: EncodedPairs) -> PreferenceFlow:
        """Copy the flow, with b(y|x) from a fitted preference model: gate, guard, selection, slope of b.

        Args:
            preference: the model.
            pairs: labelled pairs, best of prompts that the model was not fitted on: they say from which difference in
                b on it can be trusted, and one member of each is kept as an opponent, a draw of the reference.

        Raises:
            TypeError: not a preference model. ValueError: it or the pairs are of other shapes than the flow.
        """
        for name in ("event_shape", "context_dimension"):
            ours, theirs = getattr(self, name), getattr(pairs, name)
            if ours != theirs:
                raise ValueError(f"pairs must have the flow's {name} {ours}: got {theirs}")
        win, judgement = PreferenceWin.made(preference, pairs, pairs, self.config.seed)
        twin = copy.deepcopy(self)
        twin._set_win(win, judgement)
        return twin

    def _set_win(self, win: WinHead | PreferenceWin, judgement: dict[str, Any]) -> None:
        self.win = win.to(self.device)
        self._graphs.clear()
        self.metadata["win"] = judgement
        self.metadata["win_network_kept"] = judgement["network_kept"]

    def _set_units(self) -> None:
        for field in (self.field, self.context_free):
            if field is not None:
                field.unit.copy_(self.normalizer.displacement)

    def _set_steps(self, steps: int, error: float | None, evaluations: int) -> None:
        self.metadata |= {"steps": steps, "steps_error": error, "evaluations": evaluations}

    def relabel(
        self,
        labeller: Labeller | PreferenceModel,
        y: Any,
        other: Any,
        context: Any = None,
        *,
        config: FlowConfig | Mapping[str, Any] | None = None,
        check: int = 512,
        progress: bool = True,
    ) -> PreferenceFlow:
        """Add a round: carry reference draws through the rounds so far, have them labelled, fit a flow on the labels.

        With honest labels and exact flows round n carries to the law of the best of 2^n while preferences are
        transitive. ``transport(mode="relabel")`` passes through all rounds; what :meth:`win_probability` gives
        stays the chance against the reference itself. Preferences that go round need not converge: the new round is
        compared with those before it, and a :class:`pfm.flow.rounds.CyclingWarning` says when it beats the last one and
        yet loses ground against an earlier one; ``metadata["rounds"]`` holds the figures.

        Args:
            labeller: labels outputs y, y' (B, \\*D) under contexts (B, C) or None with the probability (B,) that y
                is preferred, in [0, 1], or with booleans; or a fitted preference model, which gives the round's b too.
            y, other: (B, \\*D) independent draws of the reference, two for each context; better not those of an
                earlier round.
            context: (B, C), or None as the flow was fitted.
            config: settings of the round; None for this flow's.
            check: draws, at most, that are labelled again in every comparison of rounds, 2 n - 1 of them for round n;
                0 for no comparison.

        Returns:
            a flow with one more round; this one stays as it is.

        Raises:
            ValueError: shapes disagree, or the labels are not (B,) numbers in [0, 1].
        """
        one, contexts = self._checked(y, context)
        two = self._checked(other, context)[0].to(one.device)
        if len(one) != len(two):
            raise ValueError(f"y and other must hold equally many draws: got {len(one)} and {len(two)}")
        if isinstance(check, bool) or not isinstance(check, int) or check < 0:
            raise ValueError(f"check must be a whole number of at least 0: got {check!r}")
        ask = as_labeller(labeller)
        draws = one[:check], two[:check], None if contexts is None else contexts[:check]
        one, two = (self.transport(draws, contexts, mode="relabel") for draws in (one, two))
        label = labelled(ask, one, two, contexts)
        label = label.to(one.device)
        first = (label >= 0.5).view(-1, *[1] * len(self.event_shape))
        hard = bool(((label == 0) | (label == 1)).all())
        pairs = EncodedPairs(
            torch.where(first, one, two), torch.where(first, two, one), contexts,
            probability=None if hard else torch.maximum(label, 1 - label), encoder=self.metadata.get("encoder"),
        )  # fmt: skip
        further = type(self).fit(
            pairs, self._config_here() if config is None else config, progress=progress,
            preference=labeller if isinstance(labeller, PreferenceModel) else None,
        )  # fmt: skip
        chain = copy.deepcopy(self)
        chain.later.append(further.to(self.device))
        if len(draws[0]):
            ours, theirs = (
                [draw, *(chain.transport(draw, draws[2], mode="relabel", rounds=n + 1) for n in range(chain.rounds))]
                for draw in draws[:2]
            )
            found = compare_rounds(ours, theirs, ask, draws[2])
            chain.metadata["rounds"] = [*chain.metadata.get("rounds", []), found.to_dict()]
            warn_of_cycle(found)
        return chain

    def _config_here(self) -> FlowConfig:
        """Give the settings for a further fit where the flow is now, which may not be where it was fitted."""
        return self.config if self.config.device == "auto" else self.config.replace(device=str(self.device))

    def distill(
        self,
        y: Any,
        context: Any = None,
        *,
        mode: str = "single",
        rounds: int | None = None,
        strength: float = 1.0,
        config: FlowConfig | Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> PreferenceFlow:
        """Fit a flow whose pass is one evaluation of its field and ends where this one's ends.

        The student learns the teacher's displacement of given outputs, so they should be of the kind that it will
        be applied to: draws of the reference. It takes over b and its guard.

        Args:
            y: (B, \\*D) outputs, or EncodedPairs, of which both members are taken with their contexts.
            context: as for :meth:`transport`. mode, rounds, strength: of the teacher's transport to be learned. Of
                EncodedPairs whole prompts are held out to judge by.
            config: settings of the student's training; None for this flow's.

        Returns:
            a flow with ``metadata["distilled"]``: on outputs held out, ``error`` is the root mean square distance
            from the teacher's results relative to the distance that the teacher moves, ``relative_error`` relative
            to the results' spread, ``teacher_evaluations`` what a pass of the teacher costs.

        Raises:
            ValueError: shapes disagree with the flow's, or there are fewer than two outputs.
        """
        began = time.perf_counter()
        prompt = None
        if isinstance(y, EncodedPairs):
            prompt = y.group.repeat(2)
            y, context = torch.cat([y.chosen, y.rejected]), None if y.context is None else y.context.repeat(2, 1)
        y, context = self._checked(y, context)
        y, context = y.to(self.device), None if context is None else context.to(self.device)
        if len(y) < 2:
            raise ValueError(f"y must hold at least two outputs, one of them to judge by: got {len(y)}")
        if config is None:
            config = self._config_here()
        elif not isinstance(config, FlowConfig):
            config = FlowConfig.from_dict(dict(config))
        config = config.replace(
            solver="euler", steps=1, coupling="paired", best_of=2, context_free=False, source=self.config.source
        )
        taught = self.transport(y, context, mode=mode, rounds=rounds, strength=strength)
        order, count = _held_out_first(len(y), prompt, config)
        order = order.to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            student = type(self)(self.event_shape, self.context_dimension, config)
        student.to(self.device)
        student.normalizer.load_state_dict(self.normalizer.state_dict())
        student._set_units()
        train, check = (
            Joined(y[index].flatten(1), taught[index].flatten(1), None if context is None else context[index])
            for index in (order[count:], order[:count])
        )
        found = fit_field(student.field, student.normalizer, train, check, config, one_step=True, progress=progress)
        student.win = copy.deepcopy(self.win)
        student._set_steps(1, None, 1)
        student.metadata |= found.to_dict() | {
            name: self.metadata.get(name)
            for name in ("encoder", "dimension", "context_dimension", "pairs", "prompts", "version", "win",
                         "win_network_kept", "unit_norm")
        }  # fmt: skip
        held = order[:count]
        apart = student.transport(y[held], None if context is None else context[held]) - taught[held]
        moved = taught[held] - y[held]
        spread = taught[held] - taught[held].mean(0)
        passes = 1 if mode not in ("reapply", "relabel") else self._checked_rounds(rounds, mode)
        student.metadata["distilled"] = {
            "error": _root(apart) / max(_root(moved), 1e-30),
            "relative_error": _root(apart) / max(_root(spread), 1e-30),
            "teacher_evaluations": self.evaluations * passes,
        }
        student.metadata["seconds"] = round(time.perf_counter() - began, 3)
        return student.eval()

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
                kept with probability b(y|x), else carried; exact for a flow with ``source="rejected"``. Which rows
                are kept is drawn from the row's own values, its context, ``seed`` and the number of the round, so it is
                repeatable and independent of the batch.
                ``"reapply"``: ``rounds`` passes of the same flow; it has no target law and leaves the data's
                support as rounds grow. ``"relabel"``: the rounds of :meth:`relabel`, each by its own flow.
            steps: fixed steps a pass; None for the number chosen at the end of the fit.
            rounds: passes of ``"reapply"``, None for 1; rounds of ``"relabel"``, None for all there are.
            strength: up to 1, the time at which the integration stops, so that 0 leaves y as it is; above 1 the
                whole displacement is multiplied: y + strength (T(y) - y).
            guidance: w in v(t, y) + w (v(t, y | x) - v(t, y)), from the field without contexts, for flows fitted with
                ``context_free=True`` (Ho and Salimans 2207.12598, on velocities as in Zheng et al. 2311.13443): 1
                is the field itself, 0 ignores the context, above 1 goes beyond it.
            win_gradient: multiple of S grad log b(y|x) that is added to the velocity; S (\\*D) is the outputs'
                variance under one context, so that for Gaussian outputs and small slopes 1 moves as far as a pass.
            on_failure: what becomes of rows for which the field leaves the finite numbers: ``"keep"`` gives their last
                finite state, with a :class:`pfm.NonFiniteWarning` that says which they are; ``"raise"`` raises.
            seed: another one draws anew which rows the gate keeps; a whole number.

        Returns:
            (B, \\*D) float32, on the device of ``y`` (the CPU for arrays and lists), wherever the flow is. Rows do
            not depend on their neighbours in the batch, with fixed-step solvers.

        Raises:
            ValueError: shapes disagree with the flow's, values are not finite, or an argument is out of range.
            FloatingPointError: the field left the finite numbers and ``on_failure="raise"``.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}: got {mode!r}")
        if on_failure not in FAILURES:
            raise ValueError(f"on_failure must be one of {', '.join(FAILURES)}: got {on_failure!r}")
        rounds = self._checked_rounds(rounds, mode)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed must be a whole number: got {seed!r}")
        for name, value, low in (("strength", strength, 0.0), ("guidance", guidance, 0.0),
                                 ("win_gradient", win_gradient, -math.inf)):  # fmt: skip
            if not (math.isfinite(value) and value >= low):
                raise ValueError(f"{name} must be a {'finite number' if low else 'number >= 0'}: got {value}")
        if guidance != 1 and self.context_free is None:
            raise ValueError(
                f"guidance={guidance:g} needs a field without contexts: fit the flow with "
                "FlowConfig(context_free=True), or use guidance=1"
            )
        if mode == "gated" and self.config.source != "rejected":
            warnings.warn(
                "mode='gated' is exact for flows with source='rejected'; this one was fitted with "
                f"source={self.config.source!r}, for which mode='single' is",
                stacklevel=_CALLER,
            )
        y, context = self._checked(y, context)
        asked = self._checked_steps(steps) if steps is not None else None
        if strength == 0:
            return y.clone()

        def carry(state: Tensor, contexts: Tensor | None, hold: bool = False) -> tuple[Tensor, Tensor]:
            finite = torch.ones(len(state), dtype=torch.bool, device=state.device)
            for number in range(rounds):
                flow = self._round(number) if mode == "relabel" else self
                gated = mode == "gated" or (mode == "relabel" and flow.config.source == "rejected")
                gate = (seed, number) if gated else None
                state, well = flow._pass(
                    state, contexts, asked or flow.steps, strength, guidance, win_gradient, gate, hold
                )
                finite = finite & well
            return state, finite

        settings = (self.config, self.steps, mode, rounds, asked, strength, guidance, seed)
        work = carry if win_gradient or mode == "relabel" else self._recorded(settings, carry)
        flat = y.flatten(1)
        result, finite = map_rows(work, flat, context, self.device)
        if not bool(finite.all()):
            lost = ~finite
            contexts = None if context is None else context[lost]
            result[lost], finite[lost] = map_rows(partial(carry, hold=True), flat[lost], contexts, self.device)
            warning = NonFiniteWarning(finite)
            if on_failure == "raise":
                raise FloatingPointError(f"{warning}; on_failure='keep' gives their last finite state")
            warnings.warn(warning, stacklevel=_CALLER)
        return result.unflatten(1, self.event_shape)

    def _recorded(self, settings: Hashable, carry: Work) -> Work:
        """Give what replays a pass of few rows on a GPU, where launching its kernels one by one takes longer."""
        if not graphs.supported(self.device) or self.config.solver in ADAPTIVE_SOLVERS:
            return carry

        def recorded(rows: Tensor, contexts: Tensor | None) -> tuple[Tensor, ...]:
            return self._graphs(settings, carry, rows, contexts)

        return recorded

    def _apply(self, fn: Any, recurse: bool = True) -> PreferenceFlow:
        """Move the flow, as ``to(device)`` does; its numbers stay float32.

        Raises:
            TypeError: another number type is asked for, as by ``half()``, ``bfloat16()``, ``double()``.
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

    def _round(self, number: int) -> PreferenceFlow:
        later = self.later[number - 1] if number else self
        assert isinstance(later, PreferenceFlow)
        return later

    def _checked_rounds(self, rounds: int | None, mode: str) -> int:
        if rounds is None:
            return self.rounds if mode == "relabel" else 1
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
            raise ValueError(f"rounds must be a whole number of at least 1: got {rounds!r}")
        if mode == "relabel" and rounds > self.rounds:
            raise ValueError(
                f"rounds={rounds} is more than the {self.rounds} this flow has: add rounds with PreferenceFlow.relabel"
            )
        if rounds > 1 and mode not in ("reapply", "relabel"):
            raise ValueError(f"rounds={rounds} needs mode='reapply' or mode='relabel': got mode={mode!r}")
        return rounds

    def _pass(
        self,
        y: Tensor,
        context: Tensor | None,
        steps: int,
        strength: float = 1.0,
        guidance: float = 1.0,
        win_gradient: float = 0.0,
        gate: tuple[int, int] | None = None,
        hold: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Carry flat outputs (B, D) on the flow's device once; give them and which rows (B,) stayed finite."""
        device = self.device
        lower = self.config.dtype == "bfloat16" and device.type != "cpu"
        with matmul_precision(self.config.dtype, device), torch.autocast(device.type, torch.bfloat16, enabled=lower):
            velocity = self._guided(context, guidance, win_gradient)
            states, well = self._integrate(velocity, y, (0.0, min(strength, 1.0)), steps, hold=hold)
        result = states[-1]
        if strength > 1:
            result = y + strength * (result - y)
        if self.metadata.get("unit_norm"):
            result = nn.functional.normalize(result, dim=1)
        if gate is not None:
            kept = torch.sigmoid(self.win(y, context)) > _gate_uniforms(y, context, *gate)
            result, well = torch.where(kept[:, None], y, result), kept | well
        return result, well

    def _guided(self, context: Tensor | None, guidance: float, win_gradient: float) -> Velocity:
        """Give the velocity in normalised coordinates, as :meth:`transport` describes it."""
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

    @torch.no_grad()
    def trajectory(self, y: Any, context: Any = None, *, times: Any) -> Tensor:
        """Give the states along one pass, on the device of ``y``.

        Args:
            y: (B, \\*D) outputs. context: as for :meth:`transport`.
            times: (T,) increasing times in [0, 1].

        Returns:
            (T, B, \\*D); on a flow of unit vectors every state is projected to the sphere.
        """
        marks = [float(t) for t in torch.as_tensor(times).flatten().tolist()]
        if not marks or any(not 0 <= t <= 1 for t in marks) or marks != sorted(set(marks)):
            raise ValueError(f"times must be increasing numbers in [0, 1]: got {marks}")
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
        """Give the field v(t, y | x) (B, \\*D), in the outputs' units for a pass, at a time t in [0, 1].

        Args:
            t: one time for all rows. y: (B, \\*D) outputs. context: as for :meth:`transport`.
        """
        if not 0 <= t <= 1:
            raise ValueError(f"t must lie in [0, 1]: got {t}")

        def evaluate(rows: Tensor, contexts: Tensor | None) -> tuple[Tensor]:
            velocity = self.field.at(self.normalizer.context(contexts))
            return (velocity(float(t), self.normalizer(rows)) * self.normalizer.scale,)

        y, context = self._checked(y, context)
        return map_rows(evaluate, y.flatten(1), context, self.device)[0].unflatten(1, self.event_shape)

    @torch.no_grad()
    def straightness(self, y: Any, context: Any = None, *, times: int = 32) -> float:
        """Give how far paths depart from straight lines: 0 for straight ones, which one Euler step follows.

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
        """Give the gradient of log b(y|x) with respect to y, (B, \\*D).

        Args:
            y: (B, \\*D) outputs. context: as for :meth:`transport`.
        """
        y, context = self._checked(y, context)
        slope = map_rows(lambda rows, contexts: (self._win_slope(rows, contexts),), y.flatten(1), context, self.device)
        return slope[0].unflatten(1, self.event_shape)

    @torch.no_grad()
    def win_probability(self, y: Any, context: Any = None) -> Tensor:
        """Give b(y|x) (B,) in [0, 1]: the chance that y beats an independent draw of the reference.

        Args:
            y: (B, \\*D) outputs. context: as for :meth:`transport`.
        """
        y, context = self._checked(y, context)
        return map_rows(
            lambda rows, contexts: (torch.sigmoid(self.win(rows, contexts)),), y.flatten(1), context, self.device
        )[0]

    @torch.no_grad()
    def candidate_probabilities(self, y: Any, context: Any, prompt: Tensor) -> Tensor:
        """Give b(y|x) (B,) of the candidates of several prompts, with the other candidates for opponents.

        So it is where a preference model gives b and a prompt has two or more candidates: they are draws of its own
        reference. Else it is :meth:`win_probability`.

        Args:
            y: (B, \\*D) candidates. context: as for :meth:`transport`.
            prompt: (B,) number of each one's prompt.
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
        """Give how far each of one prompt's candidates lies along the flow's displacement of them.

        Args:
            y: (B, \\*D) the candidates of one prompt. context: (C,), (1, C) or (B, C).

        Returns:
            (B,): the projection of each candidate, from the candidates' mean, on their mean displacement
            T(y) - y, both in normalised coordinates; zeros where the flow does not move them.
        """
        y, context = self._checked(y, context)
        flat = y.flatten(1)
        moved, _ = map_rows(lambda rows, contexts: self._pass(rows, contexts, self.steps), flat, context, self.device)
        scale = self.normalizer.scale.to(y.device)
        direction = ((moved - flat) / scale).mean(0)
        return ((flat - flat.mean(0)) / scale) @ nn.functional.normalize(direction, dim=0)

    def _checked(self, y: Any, context: Any) -> tuple[Tensor, Tensor | None]:
        """Give float32 outputs (B, \\*D) and a context a row, on the device of ``y``."""
        y = as_float_tensor("y", y).float()
        if y.shape[1:] != self.event_shape or y.ndim < 2:
            wanted = ", ".join(["B", *map(str, self.event_shape)])
            raise ValueError(f"y must be ({wanted}), as this flow was fitted: got {tuple(y.shape)}")
        check_finite("y", y)
        if self.context_dimension == 0:
            if context is not None:
                raise ValueError("context must be None: this flow was fitted without contexts")
            return y, None
        if context is None:
            raise ValueError(f"context (B, {self.context_dimension}) is missing: this flow was fitted with contexts")
        context = as_float_tensor("context", context).to(y.device, torch.float32)
        if context.ndim == 1:
            context = context[None]
        if context.ndim != 2 or context.shape[1] != self.context_dimension or context.shape[0] not in (1, len(y)):
            raise ValueError(
                f"context must be ({len(y)}, {self.context_dimension}), one row an output, or one row for all: "
                f"got {tuple(context.shape)}"
            )
        check_finite("context", context)
        return y, context.expand(len(y), -1)

    def _checked_steps(self, steps: int | None) -> int:
        if steps is None:
            return self.steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1: got {steps!r}")
        if steps > 1 and "distilled" in self.metadata:
            raise ValueError(f"steps={steps} has no meaning for a distilled flow, whose pass is one evaluation")
        return steps

    # -- saving -------------------------------------------------------------------------------------------------

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Save the flow to a folder, as safetensors and JSON; a save that fails leaves the folder as it was.

        Args:
            save_directory: the folder, made if absent.
            config: ignored; the flow describes itself.
            repo_id: repository on the hub; None takes the folder's name.
            push_to_hub: also upload the flow.
            model_card_kwargs: values of the model card's template.
            push_to_hub_kwargs: as for ``push_to_hub``.

        Returns:
            The commit's address if the flow was uploaded, else None.
        """
        folder = Path(save_directory).expanduser()
        with save_folder(folder) as staging:
            self._save_pretrained(staging)
            if not (folder / "README.md").exists():  # the user may have written one
                self.generate_model_card(**(model_card_kwargs or {})).save(staging / "README.md")
        if not push_to_hub:
            return None
        return self.push_to_hub(
            repo_id=repo_id or folder.resolve().name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        save_tensors(save_directory / TENSORS, self.state_dict())
        replace_json(save_directory / DESCRIPTION, self._described())

    def _described(self) -> dict[str, Any]:
        metadata = dict(self.metadata)
        if isinstance(self.win, PreferenceWin):
            metadata["preference"] = self.win.describe()
        rounds = [self._round(number)._described() for number in range(1, self.rounds)]
        if rounds:
            metadata["later"] = [{name: found[name] for name in ("config", "metadata")} for found in rounds]
        return {
            "event_shape": list(self.event_shape),
            "context_dimension": self.context_dimension,
            "config": self.config.to_dict(),
            "metadata": metadata,
        }

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str | int | torch.device = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **unknown: Any,
    ) -> PreferenceFlow:
        """Load a flow from a folder written by ``save_pretrained``, or from the hub.

        Nothing in the files is run, contacted or allocated before the two were found to belong together.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository on the hub.
            map_location: the device to load to; a number is that of a CUDA device.
            revision: branch, tag or commit on the hub.
            token, cache_dir, force_download, local_files_only: as for ``huggingface_hub.hf_hub_download``.

        Raises:
            FileNotFoundError: the folder or one of its files is not there, nor such a repository.
            ValueError: a file is damaged, the two do not belong together, or there is no such device.
            TypeError: an option is misspelt, or ``map_location`` is no device.
        """
        unknown.pop("strict", None)  # always so here
        if unknown:
            refuse_options("PreferenceFlow.from_pretrained", unknown, LOADING_OPTIONS)
        device = resolve_device(map_location, "map_location")
        name = os.fspath(pretrained_model_name_or_path)
        folder = Path(name).expanduser()
        if folder.is_dir():
            return read_folder(folder, (DESCRIPTION, TENSORS), lambda: cls._from_folder(folder, device))
        if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, re.ASCII):
            raise FileNotFoundError(f"{name} is not a folder: give one written by PreferenceFlow.save_pretrained")
        paths = _downloaded(
            name, revision=revision, token=token, cache_dir=cache_dir, force_download=force_download,
            local_files_only=local_files_only,
        )  # fmt: skip
        return cls._from_files(*paths, device)

    @classmethod
    def _from_folder(cls, folder: Path, device: torch.device) -> PreferenceFlow:
        require_files(folder, (DESCRIPTION, TENSORS), "PreferenceFlow.save_pretrained")
        return cls._from_files(folder / DESCRIPTION, folder / TENSORS, device)

    @classmethod
    def _from_files(cls, description: Path, tensors: Path, device: torch.device) -> PreferenceFlow:
        described = read_description(description)
        missing = [key for key in DESCRIBED if key not in described]
        if missing:
            raise ValueError(f"{description} is damaged or is not a preference flow's: it lacks {', '.join(missing)}")
        shapes = tensor_shapes(tensors)
        try:
            _check_sizes(described, shapes)
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{tensors} does not fit its {DESCRIPTION} at {error}") from error
        return load_module(
            lambda: cls(**{key: described[key] for key in DESCRIBED}), tensors, DESCRIPTION, device=device
        ).eval()

    def summary(self) -> str:
        """Say in a few lines what was fitted and what held-out prompts confirmed."""
        found, win, training = self.metadata, self.metadata.get("win", {}), self.metadata.get("training", {})
        name = "residual" if self.config.field == MLP else f"field {self.config.field!r}"
        residual = f"{name} not confirmed by held-out prompts, dropped"
        if found.get("residual_kept"):
            residual = f"{name} kept at {100 * training['gain']:.0f}%"
        elif not self.config.residual:
            residual = "no residual, as configured"
        ridge, error, z = found.get("ridge"), found.get("steps_error"), win.get("z")
        linear = f"linear part {'without slope' if ridge is None else f'at ridge {ridge:g}'}"
        if not self.config.linear:
            linear = "no linear part, as configured"
        return "\n".join(
            [
                f"PreferenceFlow on outputs {tuple(self.event_shape)}, context {self.context_dimension or 'none'}",
                f"  data   {found.get('pairs')} pairs of {found.get('prompts')} prompts, {found.get('seconds')} s",
                f"  field  {linear}; {residual}",
                f"  path   {self.config.solver}, {self.steps} steps"
                + ("" if error is None else f", {error:.1%} from the exact solution"),
                f"  b      orders {win.get('accuracy', math.nan):.1%} of held-out pairs rightly, "
                + ("all of them" if z is None else f"z-score {z:.1f} against chance")
                + f"; guard at a difference of {self.guard_margin:.3g}",
            ]
        )


def _forget_graphs(flow: PreferenceFlow, _: Any) -> None:
    flow._graphs.clear()  # of parameters as they were


def _training_sets(
    encoded: EncodedPairs, validation: EncodedPairs | None, config: FlowConfig
) -> tuple[EncodedPairs, EncodedPairs]:
    if validation is not None:
        for name in ("event_shape", "context_dimension"):
            ours, theirs = getattr(encoded, name), getattr(validation, name)
            if ours != theirs:
                raise ValueError(f"validation must have the training pairs' {name} {ours}: got {theirs}")
        return encoded, validation
    if len(torch.unique(encoded.group)) >= 2:
        return encoded.split(config.validation_share, config.seed)
    if len(encoded) < 2:
        raise ValueError("one pair is not enough to fit and to validate: at least two are needed")
    warnings.warn(
        "all pairs belong to one prompt: validating on held-out pairs instead of held-out prompts, so nothing "
        "here says how the flow does on another prompt",
        stacklevel=4,
    )
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(config.seed), device="cpu")
    count = min(max(round(config.validation_share * len(encoded)), 1), len(encoded) - 1)
    return encoded.select(order[count:]), encoded.select(order[:count])


def _held_out_first(count: int, prompt: Tensor | None, config: FlowConfig) -> tuple[Tensor, int]:
    """Order rows so that those of held-out prompts come first; give the order and how many they are.

    ``prompt`` (N,) is the prompt of each row; None, or one prompt for all, makes each row a prompt of its own.
    """
    names, member = torch.arange(count, device="cpu").repeat(2).view(2, -1)
    if prompt is not None and bool((prompt != prompt[0]).any()):
        names, member = torch.unique(prompt, return_inverse=True)
    shuffled = torch.randperm(len(names), generator=torch.Generator().manual_seed(config.seed), device="cpu")
    rank = shuffled.argsort()[member]
    held = min(max(round(config.validation_share * len(names)), 1), len(names) - 1)
    return rank.argsort(stable=True), int((rank < held).sum())


def _resident(pairs: EncodedPairs, device: torch.device) -> EncodedPairs:
    """Bring pairs to the device they are trained on, or leave on the CPU what would fill it: batches are streamed."""
    if device.type == "cpu":
        return pairs.to(device)
    return pairs.to(device) if pairs.table_bytes <= RESIDENT_SHARE * free_memory(device) else pairs.to("cpu")


def _on_unit_sphere(chosen: Tensor, rejected: Tensor, config: FlowConfig) -> bool:
    if config.unit_norm != "auto":
        return config.unit_norm == "on"
    # Below a handful of dimensions, outputs of norm one are more likely labels or signs than embeddings.
    both = torch.cat([chosen[:4096], rejected[:4096]])
    return both.shape[1] >= 8 and bool((both.norm(dim=1) - 1).abs().max() < 1e-3)


def _gate_uniforms(y: Tensor, context: Tensor | None, seed: int, number: int) -> Tensor:
    """Return a uniform number in [0, 1) for each row, a hash of the row, its context, the seed and the round's number.

    It does not depend on the row's neighbours. One output is drawn for anew under every context and in every round.
    """
    start = (seed * 0x9E3779B97F4A7C15 + (number + 1) * 0xD1B54A32D192ED03) % 2**64
    state = row_hash(y, start - 2**64 if start >= 2**63 else start)
    if context is not None:
        state = row_hash(context, state)
    state = (state ^ ((state >> 32) & 0xFFFFFFFF)) * 0x2545F4914F6CDD1D
    return ((state >> 11) & 0x1FFFFFFFFFFFFF).double().div(2**53).float()


def _root(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _downloaded(name: str, **options: Any) -> tuple[Path, Path]:
    from huggingface_hub import hf_hub_download

    try:
        first, second = (Path(hf_hub_download(name, file, **options)) for file in (DESCRIPTION, TENSORS))
    except (OSError, ValueError) as error:  # all errors of the hub are one of these
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{name} is no folder here, and was not loaded from the hub ({type(error).__name__}: {reason}): give a "
            "folder written by PreferenceFlow.save_pretrained, or a repository on the hub that you can reach"
        ) from error
    return first, second


def _check_sizes(described: Mapping[str, Any], shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Compare the sizes in a description with the shapes of the tensors, before a module is made by them."""
    event_shape, context_dimension = described["event_shape"], described["context_dimension"]
    if not isinstance(event_shape, list):
        raise TypeError(f"event_shape: expected a list of whole numbers, got {event_shape!r}")
    for number in (*event_shape, context_dimension):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise TypeError(f"event_shape or context_dimension: expected whole numbers of at least 0, got {number!r}")
    for name, size in (("normalizer.mean", math.prod(event_shape)), ("normalizer.context_mean", context_dimension)):
        found = shapes[name][0] if name in shapes else None
        if found != (size,):
            raise ValueError(f"{name}: expected shape {(size,)}, got {found}")
    # A field has a tensor and more for each of its layers, and a normalizer for each of its rounds.
    flows = sum(name.endswith("normalizer.mean") for name in shapes)
    pending = [described]
    while pending:
        part = pending.pop()
        flows -= 1
        if flows < 0:
            raise ValueError("later: expected no more rounds than there are tensors of")
        layers = dict(part["config"]).get("layers", 1)
        if isinstance(layers, int) and layers > len(shapes):
            raise ValueError(f"layers: expected at most {len(shapes)}, the number of its tensors, got {layers}")
        pending += part["metadata"].get("later", [])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("preference-flow")
    except PackageNotFoundError:
        return "unknown"
