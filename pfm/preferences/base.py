"""The base of all preference models: one embedding an output, and log-odds that are skew by construction.

A model embeds an output y under a context x as a reward r and k planes v in R^2k, and compares two embeddings by

    s(y > y' | x) = r - r' + sum over l of (v_2l v'_2l+1 - v_2l+1 v'_2l),      P(y > y' | x) = sigmoid(s).

The reward alone is a Bradley-Terry model, the planes alone the General Preference Model (Zhang et al. 2410.02197,
whose strengths lambda_l(x) and temperature are taken into v). Whatever the parameters are, s(y, y') = -s(y', y), so
that P + P' = 1; n outputs cost n embeddings, and all n^2 comparisons are products of them.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from pfm._internal.archive import load_module, read_description, read_folder, save_folder, save_tensors
from pfm._internal.checks import as_float_tensor, check_finite, check_same_sizes, check_shape
from pfm._internal.files import replace_json, require_files
from pfm.data.encoded import EncodedPairs
from pfm.devices import with_standard_defaults
from pfm.preferences.logistic import fit_temperature

__all__ = ["Embedded", "PreferenceModel", "check_pairs", "check_table", "load", "restored", "unfitted"]

DESCRIPTION, TENSORS = "preference.json", "preference.safetensors"
CHUNK_VALUES = 2**25  # floats of opponents that are embedded at a time
SKEW_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Embedded:
    """Holds embedded outputs: reward (...,) in log-odds, and planes (..., 2 k), of which k may be 0."""

    reward: Tensor
    planes: Tensor

    def scaled(self, slope: Tensor | float) -> Embedded:
        """Return the embedding whose log-odds are ``slope`` >= 0 times these."""
        slope = torch.as_tensor(slope).to(self.reward.device)
        return Embedded(self.reward * slope, self.planes * slope.sqrt())

    def against(self, other: Embedded) -> Tensor:
        """Return the log-odds (...,) that these outputs are preferred to others, place by place."""
        score = self.reward - other.reward
        if self.planes.shape[-1]:
            even, odd = self.planes[..., 0::2], self.planes[..., 1::2]
            score = score + (even * other.planes[..., 1::2] - odd * other.planes[..., 0::2]).sum(-1)
        return score

    def against_all(self, other: Embedded) -> Tensor:
        """Return the log-odds (..., n, m) of each of n outputs against each of m."""
        score = self.reward[..., :, None] - other.reward[..., None, :]
        if self.planes.shape[-1]:
            even, odd = self.planes[..., 0::2], self.planes[..., 1::2]
            there = even @ other.planes[..., 1::2].mT
            # Of outputs with themselves it is the mirror image, to the last bit.
            back = there.mT if other is self else odd @ other.planes[..., 0::2].mT
            score = score + (there - back)
        return score

    def __getitem__(self, index: Any) -> Embedded:
        return Embedded(self.reward[index], self.planes[index])


@with_standard_defaults
class PreferenceModel(nn.Module, ABC):
    """Compares outputs of one context by log-odds that are skew-symmetric for whatever preference it has learned.

    A subclass gives :meth:`fit`, :meth:`embed`, the arguments of its constructor by :meth:`settings`, and
    :meth:`_build`, which makes its tensors and networks for given sizes, before a fit and before loading.

    Attributes:
        dimension: number of values in an output; 0 before the fit.
        context_dimension: number of values in a context; 0 if the model takes none, and then any context given is
            left out of account.
        found: what the fit found (JSON values).
        layout: arguments of :meth:`_build` and the ``event_shape`` of the outputs, or None before the fit.
    """

    _kinds: ClassVar[dict[str, type[PreferenceModel]]] = {}
    # Standard deviations (D,) that the fit is to give the columns relative to each other; set by a model that makes
    # some of the columns, before it fits this one on them. None: all alike.
    _emphasis: Tensor | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        with_standard_defaults(cls)
        if "fit" in vars(cls):
            cls.fit = _prepared(cls.fit)
        if not cls.__name__.startswith("_"):
            PreferenceModel._kinds[cls.__name__] = cls

    def __init__(self) -> None:
        super().__init__()
        self.dimension = 0
        self.context_dimension = 0
        self.found: dict[str, Any] = {}
        self.layout: dict[str, Any] | None = None

    # -- what a subclass gives ----------------------------------------------------------------------------------

    @abstractmethod
    def fit(self, pairs: EncodedPairs, validation: EncodedPairs | None = None, *, progress: bool = False) -> Self:
        """Fit on labelled pairs and return the model itself.

        All is computed on the CPU; the fitted model is then moved to the device of ``pairs``.

        Args:
            pairs: the pairs; soft labels and weights count.
            validation: pairs of other prompts, by which what the model may decide is decided; None holds out
                prompts of ``pairs``.
            progress: show a progress bar.

        Raises:
            ValueError: all pairs are ties, or the validation pairs are of other shapes.
        """

    @abstractmethod
    def embed(self, y: Tensor, context: Tensor | None) -> Embedded:
        """Embed outputs (B, D) under contexts (B, C) or None; rows do not depend on each other."""

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor as JSON values."""
        return {}

    @abstractmethod
    def _build(self, **layout: Any) -> None:
        """Make tensors and networks of the sizes in ``layout``, and set ``dimension``."""

    @abstractmethod
    def _rescale(self, slope: float) -> None:
        """Multiply all log-odds by ``slope`` >= 0."""

    @torch.no_grad()
    def calibrate(self, pairs: EncodedPairs) -> Self:
        """Set the temperature on pairs of prompts that the model was not fitted on, and return the model itself.

        One factor of the log-odds, by maximum likelihood: with both orders of each pair Platt's offset is 0. A model
        that orders the pairs wrongly is left with even chances.
        """
        check_pairs(pairs)
        batch = pairs.to("cpu").gather(torch.arange(len(pairs), device="cpu"))
        score = self.score(batch.chosen, batch.rejected, batch.context)
        self._rescale(fit_temperature(score, batch.probability, batch.weight))
        return self

    # -- comparing ----------------------------------------------------------------------------------------------

    def score(self, y: Any, other: Any, context: Any = None) -> Tensor:
        """Return the log-odds (B,) that y (B, \\*D) is preferred to other (B, \\*D), under contexts (B, C) or (C,).

        ``other`` may have one row, for all of y. Inputs may be on any device; the result is on that of y.

        Raises:
            RuntimeError: the model is not fitted.
            ValueError: shapes disagree with those fitted on, or a value is not finite.
        """
        home = _home(y)
        y, contexts = self._checked("y", y, context)
        other, others = self._checked("other", other, context)
        if len(other) not in (1, len(y)) and len(y) != 1:
            raise ValueError(f"y and other must hold equally many outputs: got {len(y)} and {len(other)}")
        if contexts is not None and others is not None and len(contexts) != len(others):
            # One row against many: under each of their contexts.
            longer = contexts if len(contexts) > len(others) else others
            y, other = y.expand(len(longer), -1), other.expand(len(longer), -1)
            contexts = others = longer
        return self.embed(y, contexts).against(self.embed(other, others)).to(home)

    def table(self, y: Any, context: Any = None) -> Tensor:
        """Return the log-odds (n, n) of one prompt's candidates y (n, \\*D) against each other, under context (C,)."""
        home = _home(y)
        y, context = self._checked("y", y, context)
        every = self.embed(y, context)
        return every.against_all(every).to(home)

    def win_probability(self, y: Any, opponents: Any, context: Any = None) -> Tensor:
        """Return the mean probability (B,) that y (B, \\*D) is preferred to its opponents, (M, \\*D) or (B, M, \\*D).

        Args:
            y: the outputs.
            opponents: (M, \\*D) for all of y, or (B, M, \\*D) for each its own. The shape \\*D of one output, which
                distinguishes the two, is that of the training pairs or of ``y``.
            context: (B, C), or (C,) for one of all rows.

        Raises:
            ValueError: the shapes fit neither reading, or both.
        """
        home = _home(y)
        given = as_float_tensor("y", y).shape[1:]
        y, context = self._checked("y", y, context)
        opponents = as_float_tensor("opponents", opponents).to(y.device, torch.float32)
        own = self._own_opponents(opponents.shape, {given, self.event_shape or given}, len(y))
        if not own:
            opponents, _ = self._checked("opponents", opponents, None, needs_context=False)
        else:
            opponents = opponents.flatten(2)
            check_finite("opponents", opponents.flatten(0, 1))
        count = opponents.shape[1] if own else len(opponents)
        if count == 0:
            raise ValueError("opponents holds no outputs: at least one is needed")
        shared = not own and (context is None or _one_row(context))
        if shared:
            theirs = self.embed(opponents, None if context is None else context[:1].expand(count, -1))
            return torch.sigmoid(self.embed(y, context).against_all(theirs)).mean(1).to(home)
        rows = max(1, CHUNK_VALUES // (count * self.dimension))
        pieces = [y.new_zeros(0)]
        for at in range(0, len(y), rows):
            some = slice(at, at + rows)
            contexts = None if context is None else context[some]
            many = opponents[some] if own else opponents.expand(len(y[some]), -1, -1)
            repeated = None if contexts is None else contexts.repeat_interleave(count, 0)
            theirs = self.embed(many.flatten(0, 1), repeated)
            theirs = Embedded(*(part.unflatten(0, (-1, count)) for part in (theirs.reward, theirs.planes)))
            pieces.append(torch.sigmoid(self.embed(y[some], contexts)[:, None].against_all(theirs)[:, 0]).mean(1))
        return torch.cat(pieces).to(home)

    @property
    def event_shape(self) -> torch.Size | None:
        """Return the shape \\*D of one output; None before the fit, and of models that were saved without it."""
        shape = (self.layout or {}).get("event_shape")
        return None if shape is None else torch.Size(shape)

    @staticmethod
    def _own_opponents(shape: torch.Size, outputs: set[torch.Size], count: int) -> bool:
        """Return whether opponents of a shape are one set for each of ``count`` outputs of one of the shapes."""
        shared, own = shape[1:] in outputs, len(shape) > 2 and shape[0] == count and shape[2:] in outputs
        if shared and own:
            raise ValueError(
                f"opponents of shape {tuple(shape)} may be {shape[0]} for all of y or {shape[1]} for each of its "
                f"{count} outputs: give y and opponents in the shape of the training outputs, (B, *D) beside (M, *D) "
                "or (B, M, *D)"
            )
        return own

    def _checked(self, name: str, y: Any, context: Any, *, needs_context: bool = True) -> tuple[Tensor, Tensor | None]:
        if self.layout is None:
            raise RuntimeError(f"{type(self).__name__} is not fitted: call fit(pairs) first")
        y = as_float_tensor(name, y).to(self._device, torch.float32)
        check_shape(name, y, ("B", "*D"), "one row an output")
        if y.flatten(1).shape[1] != self.dimension:
            raise ValueError(f"{name} must have {self.dimension} values a row: got {y.flatten(1).shape[1]}")
        y = y.flatten(1)
        check_finite(name, y)
        if self.context_dimension == 0 or not needs_context:
            return y, None
        if context is None:
            raise ValueError(f"context (B, {self.context_dimension}) is missing: this model was fitted with contexts")
        context = as_float_tensor("context", context).to(self._device, torch.float32)
        if context.ndim == 1:
            context = context[None]
        if (
            context.ndim != 2
            or context.shape[1] != self.context_dimension
            or (len(context) not in (1, len(y)) and len(y) != 1)
        ):
            raise ValueError(
                f"context must be ({len(y)}, {self.context_dimension}), one row an output, or one row for all: "
                f"got {tuple(context.shape)}"
            )
        check_finite("context", context)
        if len(context) == 1:
            return y, context.expand(len(y), -1)
        return y.expand(len(context), -1), context

    @property
    def _device(self) -> torch.device:
        for tensor in (*self.buffers(), *self.parameters()):
            return tensor.device
        return torch.device("cpu")

    # -- saving -------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Give, as JSON values, all but the tensors: :func:`restored` makes the model from it."""
        return {
            "kind": type(self).__name__,
            "settings": self.settings(),
            "layout": self.layout,
            "found": self.found,
        }

    def save(self, folder: str | Path) -> Path:
        """Write the fitted model to a folder, as safetensors and JSON; :func:`pfm.preferences.load` reads it.

        Raises:
            RuntimeError: the model is not fitted.
        """
        if self.layout is None:
            raise RuntimeError(f"{type(self).__name__} is not fitted: call fit(pairs) first")
        folder = Path(folder).expanduser()
        with save_folder(folder) as staging:
            save_tensors(staging / TENSORS, self.state_dict())
            replace_json(staging / DESCRIPTION, self.describe())
        return folder

    def _ready(self, *, event_shape: list[int] | None = None, **layout: Any) -> None:
        """Create the tensors and networks, frozen, and record their sizes."""
        self._build(**layout)
        self.layout = layout if event_shape is None else layout | {"event_shape": event_shape}
        self.requires_grad_(False)
        self.eval()


def _prepared(fit: Callable[..., Any]) -> Callable[..., Any]:
    """Let a subclass's fit see pairs of positive weight only, on the CPU; then note the shape of one output.

    The fitted model is moved to where the pairs are.
    """

    @functools.wraps(fit)
    def prepared(
        self: PreferenceModel, pairs: EncodedPairs, validation: EncodedPairs | None = None, **options: Any
    ) -> Any:
        check_pairs(pairs, validation)
        if validation is not None:
            options["validation"] = validation.counted().to("cpu")
        fitted = fit(self.cpu(), pairs.counted().to("cpu"), **options)
        if self.layout is not None:
            self.layout["event_shape"] = list(pairs.event_shape)
        return fitted.to(pairs.device)

    return prepared


def _home(y: Any) -> torch.device:
    return y.device if isinstance(y, Tensor) else torch.device("cpu")


def unfitted(described: dict[str, Any]) -> PreferenceModel:
    """Make a model of a kind with its settings.

    Raises:
        ValueError: the kind is not known here, or its settings are not.
    """
    kinds = PreferenceModel._kinds
    try:
        kind, settings = described["kind"], described["settings"]
        if kind in kinds:
            return kinds[kind](**settings)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the description of a preference model is damaged: {error!r}") from error
    raise ValueError(f"kind must be one of {', '.join(sorted(kinds))}: got {kind!r}")


def restored(described: dict[str, Any]) -> PreferenceModel:
    """Build a model from its description; its tensors are loaded afterwards.

    Raises:
        ValueError: the description is of no model known here.
    """
    model = unfitted(described)
    try:
        model._ready(**described["layout"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"the description of a preference model is damaged: {error!r}") from error
    model.found = dict(described.get("found") or {})
    return model


def load(folder: str | Path) -> PreferenceModel:
    """Load the model that :meth:`PreferenceModel.save` wrote.

    Raises:
        FileNotFoundError: the folder or one of its files is not there.
        ValueError: a file is damaged, or the two do not belong together.
    """
    folder = Path(folder).expanduser()
    return read_folder(folder, (DESCRIPTION, TENSORS), lambda: _load(folder))


def _load(folder: Path) -> PreferenceModel:
    require_files(folder, (DESCRIPTION, TENSORS), "PreferenceModel.save")
    try:
        described = read_description(folder / DESCRIPTION)
        return load_module(lambda: restored(described), folder / TENSORS, DESCRIPTION)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} holds a damaged preference model ({error}): save or fit it again") from error


# -- what is refused ---------------------------------------------------------------------------------------------


def check_pairs(pairs: EncodedPairs, validation: EncodedPairs | None = None) -> None:
    """Refuse pairs that say nothing, and validation pairs of other shapes.

    Raises:
        TypeError: not EncodedPairs.
        ValueError: every pair is a tie, or shapes disagree.
    """
    for name, part in (("pairs", pairs), ("validation", validation)):
        if part is None and name == "validation":
            continue
        if not isinstance(part, EncodedPairs):
            raise TypeError(
                f"{name} must be EncodedPairs: got {type(part).__name__}; PreferencePairs.encode makes them"
            )
    if pairs.probability is not None:
        decided = pairs.probability != 0.5
        if pairs.weight is not None:
            decided &= pairs.weight > 0
        if not bool(decided.any()):
            raise ValueError(
                f"all {len(pairs)} pairs are ties (probability 0.5): they hold no preference; "
                "give pairs of which at least one was decided"
            )
    if validation is not None:
        check_same_sizes("validation", validation, pairs, "the training pairs'")


def check_table(table: Any) -> Tensor:
    """Check a preference table, P(i > j) or log-odds (n, n), and give it in log-odds, float64, exactly skew.

    Log-odds must be skew, s_ij = -s_ji; a table whose values all lie in [0, 1] is taken for probabilities, with
    P_ij + P_ji = 1, of which 0 and 1 become log-odds of -/+ log(1e6).

    Raises:
        ValueError: it is not square, not finite, or not skew.
    """
    found = as_float_tensor("table", table).double()
    if found.ndim != 2 or found.shape[0] != found.shape[1] or found.shape[0] == 0:
        raise ValueError(f"table must be square, (n, n) with n >= 1: got {tuple(found.shape)}")
    check_finite("table", found)
    chances = bool(((found >= 0) & (found <= 1)).all()) and bool((found > 0).any())
    apart = (found + found.T - (1 if chances else 0)).abs()
    apart.fill_diagonal_(0)  # an output against itself is a tie, whatever was written there
    row, column = divmod(int(apart.argmax()), len(found))
    limit = SKEW_TOLERANCE * max(1.0, float(found.abs().max()))
    if float(apart.max()) > limit:
        rule = "P(i > j) + P(j > i) = 1" if chances else "s(i, j) = -s(j, i)"
        raise ValueError(
            f"table is not skew: {rule} fails at ({row}, {column}), where it holds {float(found[row, column]):g} and "
            f"{float(found[column, row]):g}; average both orders first, e.g. (s - s.T) / 2"
        )
    odds = torch.logit(found, eps=1e-6) if chances else found
    return (odds - odds.T) / 2


def _one_row(context: Tensor) -> bool:
    return len(context) > 0 and (context.stride(0) == 0 or bool((context == context[0]).all()))
