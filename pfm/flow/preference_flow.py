"""PreferenceFlow: a vector field and a win probability, fitted on pairs, applied to outputs."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor

from pfm._internal.archive import save_folder
from pfm._internal.checks import check_same_sizes, check_whole
from pfm.data.encoded import EncodedPairs
from pfm.devices import free_memory, resolve_device, with_standard_defaults
from pfm.flow.card import is_own_card, model_card
from pfm.flow.config import FlowConfig, refuse_options
from pfm.flow.couplings import Joined, WithoutContext, make_coupling
from pfm.flow.distributed import Processes
from pfm.flow.fitting import STATISTICS_ROWS, Steps, at_most, choose_steps, fit_field, on_unit_sphere
from pfm.flow.holdout import held_out_first, training_sets
from pfm.flow.model import FlowModel
from pfm.flow.preference_win import PreferenceWin, rescored
from pfm.flow.registered_field import MLP
from pfm.flow.rounds import Labeller, as_labeller, compare_rounds, labelled, warn_of_cycle
from pfm.flow.storage import check_vacant, download, load_files, load_folder, save_files
from pfm.flow.training import remove_checkpoint
from pfm.flow.win import WinHead
from pfm.preferences.base import PreferenceModel
from pfm.tracking import as_tracker

__all__ = ["PreferenceFlow"]

logger = logging.getLogger(__name__)

LOADING_OPTIONS = ("map_location", "revision", "token", "cache_dir", "force_download", "local_files_only")
RESIDENT_SHARE = 0.5  # of a device's free memory that pairs may take to be kept there


@with_standard_defaults
class PreferenceFlow(FlowModel, PyTorchModelHubMixin, library_name="preference-flow", tags=["preference-flow"]):
    """Carries less-preferred outputs to preferred ones: dy/dt = v(t, y | x), t from 0 to 1.

    Make one with :meth:`fit` or :meth:`from_pretrained`. One pass of a flow fitted with ``source="reference"``
    carries the reference distribution pi_ref to the winners' distribution p1 = 2 pi_ref b, that of best of two, as far
    as the field is learned; b(y|x) is the chance that y beats an independent draw of the reference.

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
        tracker: Any = None,
        processes: Processes | None = None,
    ) -> PreferenceFlow:
        """Fit a flow on labelled pairs.

        Args:
            encoded: the pairs, N of them.
            config: settings; None for the defaults.
            validation: pairs of other prompts, on which the ridge, the residual and the number of steps are
                decided; None holds out ``config.validation_share`` of the prompts of ``encoded``.
            progress: show a progress bar.
            preference: a preference model that gives b in place of the flow's own classifier, and the scores of
                candidate sets for ``best_of`` above 2. It is fitted on the training prompts unless it is fitted
                already; then it must not have seen the validation pairs, which set its guard. See
                :mod:`pfm.flow.preference_win` for the meaning of b when preferences are cyclic.
            checkpoint: folder for the training state; an interrupted fit resumes from it.
            tracker: keeps the validation loss of the network by updates, and the figures of b at the end: anything that
                :func:`pfm.tracking.as_tracker` takes, such as a path, a run of Weights & Biases, a ``SummaryWriter``.
            processes: those of :func:`pfm.processes`, each of which calls ``fit`` with the same arguments and computes
                its share of every batch. The flow is that of one process up to rounding, in all of them.

        Raises:
            TypeError: ``encoded`` is not EncodedPairs, or ``tracker`` no tracker.
            ValueError: shapes of training and validation pairs disagree, or the configuration needs what the
                pairs do not carry.
            ProcessLostError: another of the ``processes`` has ended.
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
        processes = processes or Processes()
        track = as_tracker(tracker) if processes.first else None
        progress = progress and processes.first
        encoded, validation = encoded.counted(), None if validation is None else validation.counted()
        train, held = training_sets(encoded, validation, config)
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
            flow.normalize_by(some.chosen, some.rejected, some.context, some.weight)
        coupling, check = (
            make_coupling(
                part, source=config.source, coupling=config.coupling, best_of=config.best_of, seed=config.seed,
            )
            for part in (train, held)
        )  # fmt: skip
        folder = None if checkpoint is None else Path(checkpoint)
        found = fit_field(
            flow.field, flow.normalizer, coupling, check, config,
            checkpoint=folder, progress=progress, tracker=track, processes=processes,
        )  # fmt: skip
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
                processes=processes,
            ).to_dict()  # fmt: skip
        if preference is None:
            head = WinHead(flow.dimension, flow.context_dimension).to(device)
            judgement = head.fit(encoded, seed=config.seed).to_dict()
            flow._set_win(head, judgement)
        else:
            flow._set_win(win, judgement)
        flow.metadata["unit_norm"] = on_unit_sphere(some.chosen, some.rejected, config)
        flow.metadata |= choose_steps(flow.field, flow.normalizer, check, config)._asdict()
        flow.metadata["seconds"] = round(time.perf_counter() - began, 3)
        if track is not None:
            figures = {f"win/{name}": each for name, each in judgement.items() if isinstance(each, int | float)}
            track.log(figures | {"seconds": flow.metadata["seconds"]}, step=found.log.updates)
        if folder is not None and processes.first:
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
        check_same_sizes("pairs", pairs, self, "the flow's")
        win, judgement = PreferenceWin.made(preference, pairs, pairs, self.config.seed)
        twin = copy.deepcopy(self)
        twin._set_win(win, judgement)
        return twin

    def _set_win(self, win: WinHead | PreferenceWin, judgement: dict[str, Any]) -> None:
        self.win = win.to(self.device)
        self._graphs.clear()
        self.metadata["win"] = judgement
        self.metadata["win_network_kept"] = judgement["network_kept"]

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

        With honest labels and exact flows round n carries to the distribution of the best of 2^n while preferences are
        transitive. ``transport(mode="relabel")`` passes through all rounds; :meth:`win_probability` remains the chance
        against the reference itself. Rounds of cyclic preferences need not converge: the new round is compared with
        those before it, and a :class:`pfm.flow.rounds.CyclingWarning` says when it beats the last one and
        yet loses ground against an earlier one; ``metadata["rounds"]`` holds the figures.

        Args:
            labeller: labels outputs y, y' (B, \\*D) under contexts (B, C) or None with the probability (B,) that y
                is preferred, in [0, 1], or with booleans; or a fitted preference model, which gives the round's b too.
            y, other: (B, \\*D) independent draws of the reference, two for each context; preferably not those of an
                earlier round.
            context: (B, C), or None as the flow was fitted.
            config: settings of the round; None for this flow's.
            check: draws, at most, that are labelled again in every comparison of rounds, 2 n - 1 of them for round n;
                0 for no comparison.

        Returns:
            a flow with one more round; this one is unchanged.

        Raises:
            ValueError: shapes disagree, or the labels are not (B,) numbers in [0, 1].
        """
        one, contexts = self._checked(y, context)
        two = self._checked(other, context)[0].to(one.device)
        if len(one) != len(two):
            raise ValueError(f"y and other must hold equally many draws: got {len(one)} and {len(two)}")
        check_whole("check", check, 0)
        label_pairs = as_labeller(labeller)
        draws = one[:check], two[:check], None if contexts is None else contexts[:check]
        one, two = (self.transport(draws, contexts, mode="relabel") for draws in (one, two))
        label = labelled(label_pairs, one, two, contexts)
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
            found = compare_rounds(ours, theirs, label_pairs, draws[2])
            chain.metadata["rounds"] = [*chain.metadata.get("rounds", []), found.to_dict()]
            warn_of_cycle(found)
        return chain

    def _config_here(self) -> FlowConfig:
        """Return the settings for a further fit where the flow is now, which may not be where it was fitted."""
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
        order, count = held_out_first(len(y), prompt, config)
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
        student.metadata |= Steps(1, None, 1)._asdict() | found.to_dict() | {
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
        """Save the flow to a folder, as safetensors and JSON; a failed save leaves the folder unchanged.

        Args:
            save_directory: the folder, made if absent.
            config: ignored; the flow describes itself.
            repo_id: repository on the hub; None takes the folder's name.
            push_to_hub: also upload the flow.
            model_card_kwargs: metadata of the model card, such as ``license`` or ``language``. A card that a person has
                taken over is kept.
            push_to_hub_kwargs: as for ``push_to_hub``.

        Returns:
            The commit's address if the flow was uploaded, else None.

        Raises:
            FileExistsError: the folder holds another kind of model, whose files would be lost.
        """
        folder = Path(save_directory).expanduser()
        check_vacant(folder)
        with save_folder(folder) as staging:
            self._save_pretrained(staging)
            if is_own_card(folder / "README.md"):  # the user may have written one
                self.generate_model_card(**(model_card_kwargs or {})).save(staging / "README.md")
        if not push_to_hub:
            return None
        return self.push_to_hub(
            repo_id=repo_id or folder.resolve().name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs
        )

    def generate_model_card(self, *args: Any, **values: Any) -> ModelCard:
        """Make the model card; ``values``, such as ``license``, go into its metadata for the hub."""
        return model_card(self, **values)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_files(self, save_directory)

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
            return load_folder(cls, folder, device)
        if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name, re.ASCII):
            raise FileNotFoundError(f"{name} is not a folder: give one written by PreferenceFlow.save_pretrained")
        paths = download(
            name, revision=revision, token=token, cache_dir=cache_dir, force_download=force_download,
            local_files_only=local_files_only,
        )  # fmt: skip
        return load_files(cls, *paths, device)

    def summary(self) -> str:
        """Summarise in a few lines what was fitted and what held-out prompts confirmed."""
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
                f"  path   {self.config.solver}, {self.steps} step{'s' * (self.steps != 1)}"
                + ("" if error is None else f", {error:.1%} from the exact solution"),
                f"  b      orders {win.get('accuracy', math.nan):.1%} of held-out pairs rightly, "
                + ("all of them" if z is None else f"z-score {z:.1f} against chance")
                + f"; guard at a difference of {self.guard_margin:.3g}",
            ]
        )


def _resident(pairs: EncodedPairs, device: torch.device) -> EncodedPairs:
    """Bring pairs to the device they are trained on, or leave on the CPU what would fill it: batches are streamed."""
    if device.type == "cpu":
        return pairs.to(device)
    return pairs.to(device) if pairs.table_bytes <= RESIDENT_SHARE * free_memory(device) else pairs.to("cpu")


def _root(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("preference-flow")
    except PackageNotFoundError:
        return "unknown"
