"""Preference models that see an output otherwise: some of its numbers only, or one more that its prompt gives."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor

from pfm._internal.checks import check_number, check_whole
from pfm._internal.columns import column_statistics
from pfm.data.encoded import EncodedPairs
from pfm.preferences.base import Embedded, PreferenceModel, check_pairs, restored, unfitted

__all__ = ["RelevancePreference", "ViewPreference"]

FAR = 4.0  # standard deviations beyond which a standardised number is cut: one outlying text does not rule


class _Viewing(PreferenceModel):
    """Fits a member on what a subclass makes of the outputs by :meth:`_see`, once :meth:`_look` has looked at them."""

    def __init__(self, member: PreferenceModel | dict[str, Any]) -> None:
        super().__init__()
        if isinstance(member, PreferenceModel):
            self._kind = {"kind": type(member).__name__, "settings": member.settings()}
        else:
            self._kind = {name: member[name] for name in ("kind", "settings")}
        unfitted(self._kind)

    @abstractmethod
    def _look(self, y: Tensor, context: Tensor | None, weight: Tensor) -> None:
        """Find what :meth:`_see` needs, from training outputs (N, D), contexts (N, C) or None and weights (N,)."""

    @abstractmethod
    def _see(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return what the member sees (B, V) of outputs (B, D) under contexts (B, C) or None."""

    @property
    def seed(self) -> int:
        """Return the member's seed; 0 if it has none."""
        return int(getattr(unfitted(self._kind), "seed", 0))

    @seed.setter
    def seed(self, value: int) -> None:
        member = unfitted(self._kind)
        if hasattr(member, "seed"):
            member.seed = value  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
            self._kind = self._kind | {"settings": member.settings()}

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {"member": self._kind}

    @torch.no_grad()
    def fit(self, pairs: EncodedPairs, validation: EncodedPairs | None = None, *, progress: bool = False) -> Self:
        """Fit the member on what it sees of the outputs, and return the model itself."""
        check_pairs(pairs, validation)
        self._ready(dimension=pairs.dimension, contexts=pairs.context_dimension)
        batch = pairs.gather(torch.arange(len(pairs)))
        contexts = None if batch.context is None else batch.context.repeat(2, 1)
        self._look(torch.cat([batch.chosen, batch.rejected]), contexts, batch.weight.repeat(2))
        seen = [None if part is None else self._seen(part) for part in (pairs, validation)]
        assert seen[0] is not None
        assert self.layout is not None
        self.member = unfitted(self._kind)
        self.member._emphasis = self._emphasise(pairs.dimension, seen[0].dimension)
        self.member.fit(seen[0], seen[1], progress=progress)
        self.layout["member"] = self.member.describe()
        self.found = self.member.found
        self._context_needed()
        return self

    def _seen(self, pairs: EncodedPairs) -> EncodedPairs:
        batch = pairs.gather(torch.arange(len(pairs)))
        chosen, rejected = (self._see(side, batch.context) for side in (batch.chosen, batch.rejected))
        return EncodedPairs(
            chosen, rejected, batch.context, batch.weight, probability=batch.probability, group=pairs.group
        )

    def _build(self, dimension: int, contexts: int, member: dict[str, Any] | None = None) -> None:
        self.dimension, self.context_dimension = dimension, contexts
        if member is not None:
            self.member = restored(member)
            self._context_needed()

    def _emphasise(self, dimension: int, seen: int) -> Tensor | None:
        """Return the emphasis (V,) of the ``seen`` columns that are made of outputs of a dimension, or None."""
        return self._emphasis

    def _context_needed(self) -> None:
        """Take no context where the member takes none."""
        self.context_dimension = self.member.context_dimension

    def embed(self, y: Tensor, context: Tensor | None) -> Embedded:
        """Embed what is seen of outputs (B, D) as the member does."""
        return self.member.embed(self._see(y, context), context if self.member.context_dimension else None)

    def _rescale(self, slope: float) -> None:
        self.member._rescale(slope)


class ViewPreference(_Viewing):
    """Fits a preference model on the columns from ``start`` to ``stop`` of the outputs.

    Few pairs do not determine many weights: where a few features beside a long embedding are more informative, a model
    of all columns learns less than one of the features alone. In a :class:`PreferenceEnsemble` held-out prompts
    weigh the views.

    Args:
        member: the model, fitted or not: its settings count.
        start, stop: of the columns, as in a slice; negative ones count from the end, None is the end.
        standardise: cut every column at four standard deviations, so that one outlying output does not rule a rare
            feature.

    Raises:
        ValueError: at the fit, if the slice holds no column.
    """

    mean: Tensor
    spread: Tensor

    def __init__(
        self,
        member: PreferenceModel | dict[str, Any],
        start: int | None = None,
        stop: int | None = None,
        *,
        standardise: bool = False,
    ) -> None:
        super().__init__(member)
        self.start: int | None = check_whole("start", start, also=(None,))
        self.stop: int | None = check_whole("stop", stop, also=(None,))
        self.standardise = standardise

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return super().settings() | {"start": self.start, "stop": self.stop, "standardise": self.standardise}

    def _build(self, dimension: int, contexts: int, member: dict[str, Any] | None = None) -> None:
        width = len(range(dimension)[self.start : self.stop])
        if not width:
            raise ValueError(f"start={self.start}, stop={self.stop} leave none of {dimension} columns: widen the view")
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        super()._build(dimension, contexts, member)

    def _look(self, y: Tensor, context: Tensor | None, weight: Tensor) -> None:
        if self.standardise:
            mean, spread = column_statistics(y[:, self.start : self.stop], weight)
            self.mean.copy_(mean)
            self.spread.copy_(spread)

    def _emphasise(self, dimension: int, seen: int) -> Tensor | None:
        return None if self._emphasis is None else self._emphasis[self.start : self.stop]

    def _see(self, y: Tensor, context: Tensor | None) -> Tensor:
        columns = y[..., self.start : self.stop]
        if not self.standardise:
            return columns
        return ((columns - self.mean) / self.spread).clamp(-FAR, FAR) / len(self.mean) ** 0.5


class RelevancePreference(_Viewing):
    """Fits a preference model on outputs with one number more, in the last column: their inner product with the prompt.

    Within a prompt a linear term in the prompt cancels, so that a linear reward judges every output by itself.
    Relevance to the prompt takes a product of both. Encoders that embed prompts and outputs in one space
    make it their similarity; of vectors of unequal lengths the first numbers count, as many as the shorter one has.
    Without contexts the member is fitted on the outputs themselves.

    Args:
        member: the model, fitted or not: its settings count.
        share: standard deviation of the number, in units of the outputs' root mean square distance from their mean, all
            their columns in equal units: how lightly a penalty treats it.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, member: PreferenceModel | dict[str, Any], share: float = 0.3) -> None:
        super().__init__(member)
        share = check_number("share", share, above=0)
        self.share = share

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return super().settings() | {"share": self.share}

    def _build(self, dimension: int, contexts: int, member: dict[str, Any] | None = None) -> None:
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        super()._build(dimension, contexts, member)

    def _context_needed(self) -> None:
        """Take contexts wherever there are any: the number is made of them."""

    def _look(self, y: Tensor, context: Tensor | None, weight: Tensor) -> None:
        if context is not None:
            mean, spread = column_statistics(_inner(y, context)[:, None], weight)
            self.centre.copy_(mean[0])
            self.scale.copy_(1 / spread[0])

    def _emphasise(self, dimension: int, seen: int) -> Tensor | None:
        if seen == dimension:
            return self._emphasis
        given = torch.ones(dimension) if self._emphasis is None else self._emphasis
        return torch.cat([given, self.share * given.norm()[None]])

    def _see(self, y: Tensor, context: Tensor | None) -> Tensor:
        if context is None:
            return y
        return torch.cat([y, ((_inner(y, context) - self.centre) * self.scale)[..., None]], dim=-1)


def _inner(y: Tensor, context: Tensor) -> Tensor:
    shared = min(y.shape[-1], context.shape[-1])
    return (y[..., :shared] * context[..., :shared]).sum(-1)
