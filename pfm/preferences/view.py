"""A preference model on some of an output's numbers: one view of several, such as the surface features alone."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from pfm.encoded import EncodedPairs
from pfm.preferences.base import Embedded, PreferenceModel, check_pairs, restored, unfitted

__all__ = ["ViewPreference"]


class ViewPreference(PreferenceModel):
    """Fits a preference model on the columns from ``start`` to ``stop`` of the outputs.

    Few pairs cannot weigh many numbers: of a long embedding and a few features that tell more, a model of all of them
    learns less than one of the features alone. In a :class:`PreferenceEnsemble` held-out prompts weigh the views.

    Args:
        member: the model, fitted or not: its settings count.
        start, stop: of the columns, as in a slice; negative ones count from the end, None is the end.

    Raises:
        ValueError: at the fit, if the slice holds no column.
    """

    def __init__(
        self, member: PreferenceModel | dict[str, Any], start: int | None = None, stop: int | None = None
    ) -> None:
        super().__init__()
        if isinstance(member, PreferenceModel):
            self._kind = {"kind": type(member).__name__, "settings": member.settings()}
        else:
            self._kind = {name: member[name] for name in ("kind", "settings")}
        unfitted(self._kind)
        for name, value in (("start", start), ("stop", stop)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name} must be a whole number or None: got {value!r}")
        self.start, self.stop = start, stop

    @property
    def seed(self) -> int:
        """Give the member's seed; 0 if it has none."""
        return int(self._kind["settings"].get("seed", 0))

    @seed.setter
    def seed(self, value: int) -> None:
        if "seed" in self._kind["settings"]:
            self._kind = {"kind": self._kind["kind"], "settings": self._kind["settings"] | {"seed": value}}

    def settings(self) -> dict[str, Any]:
        """Give the arguments of the constructor."""
        return {"member": self._kind, "start": self.start, "stop": self.stop}

    def _build(self, dimension: int, member: dict[str, Any]) -> None:
        self.dimension = dimension
        self.member = restored(member)
        self.context_dimension = self.member.context_dimension

    @torch.no_grad()
    def fit(self, pairs: EncodedPairs, validation: EncodedPairs | None = None, *, progress: bool = False) -> Self:
        """Fit the member on its columns, and return the model itself."""
        check_pairs(pairs, validation)
        columns = slice(self.start, self.stop)
        if not len(range(pairs.dimension)[columns]):
            raise ValueError(
                f"start={self.start}, stop={self.stop} leave none of {pairs.dimension} columns: widen the view"
            )
        fitted = unfitted(self._kind).fit(
            _seen(pairs, columns), None if validation is None else _seen(validation, columns), progress=progress
        )
        self._ready(dimension=pairs.dimension, member=fitted.describe())
        self.member = fitted
        self.found = fitted.found
        return self

    def embed(self, y: Tensor, context: Tensor | None) -> Embedded:
        """Embed the columns of outputs (B, D) as the member does."""
        return self.member.embed(y[..., self.start : self.stop], context)

    def _rescale(self, slope: float) -> None:
        self.member._rescale(slope)


def _seen(pairs: EncodedPairs, columns: slice) -> EncodedPairs:
    """Give the same pairs of the outputs' columns."""
    every = torch.arange(len(pairs))
    part = pairs.select(every)
    first, second = pairs._tables
    narrow = first[:, columns]
    part._tables = (narrow, narrow if second is first else second[:, columns])
    part.event_shape = narrow.shape[1:]
    part.candidates = None
    return part
