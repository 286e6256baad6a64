"""Pairs whose outputs carry the tags of their sources."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfm._internal.checks import check_choice, check_number, check_seed
from pfm.data.encoded import EncodedPairs
from pfm.devices import with_standard_defaults
from pfm.references.shares import WinRates
from pfm.tastes import check_names

__all__ = ["TaggedPairs", "source_number"]


@dataclass(frozen=True)
@with_standard_defaults
class TaggedPairs:
    """Holds pairs whose outputs carry the tags of their sources.

    Attributes:
        pairs: N labelled pairs, both outputs drawn from the pool.
        chosen_tag, rejected_tag: (N,) int64, numbers of the sources.
        names: of the sources.
    """

    pairs: EncodedPairs
    chosen_tag: Tensor
    rejected_tag: Tensor
    names: tuple[str, ...]

    @classmethod
    def of(
        cls,
        pairs: EncodedPairs,
        chosen_tags: Sequence[Hashable] | Tensor,
        rejected_tags: Sequence[Hashable] | Tensor,
        names: Sequence[Hashable] | None = None,
    ) -> TaggedPairs:
        """Join pairs and tags.

        Args:
            pairs: N pairs.
            chosen_tags, rejected_tags: (N,) tags, as :class:`pfm.generators.GeneratorPool` gives them with its texts.
            names: the sources that there should be; None for those that there are.

        Raises:
            ValueError: tags are missing or too many, or a named source made none of the outputs.
        """
        chosen, rejected = (
            check_names(name, tags, len(pairs))
            for name, tags in (("chosen_tags", chosen_tags), ("rejected_tags", rejected_tags))
        )
        present = set(chosen) | set(rejected)
        listed = sorted(present, key=str) if names is None else list(names)
        if unknown := sorted(present - set(listed), key=str):
            raise ValueError(f"tags must be among {listed}: got {unknown} too")
        if empty := [name for name in listed if name not in present]:
            raise ValueError(f"source {empty[0]!r} made none of the outputs: leave it out of names, or add pairs of it")
        places = {name: place for place, name in enumerate(listed)}
        first, second = (torch.tensor([places[tag] for tag in tags]) for tags in (chosen, rejected))
        return cls(pairs, first, second, tuple(map(str, listed)))

    def __len__(self) -> int:
        return len(self.pairs)

    def select(self, index: Tensor) -> TaggedPairs:
        """Take the pairs at ``index`` (integers or a mask)."""
        tags = self.chosen_tag[index.cpu()], self.rejected_tag[index.cpu()]
        return TaggedPairs(self.pairs.select(index), *tags, self.names)

    def to(self, device: Any) -> TaggedPairs:
        """Copy the pairs to a device; the tags stay on the CPU."""
        return TaggedPairs(self.pairs.to(device), self.chosen_tag, self.rejected_tag, self.names)

    def within(self, name: str) -> EncodedPairs:
        """Take the pairs of which one source made both outputs: what a flow of that source alone is fitted on.

        Raises:
            ValueError: there is no such source, or no such pair.
        """
        number = self.number(name)
        both = (self.chosen_tag == number) & (self.rejected_tag == number)
        if not bool(both.any()):
            raise ValueError(f"source {name!r} has no pairs of two outputs of its own: a flow of it alone needs some")
        return self.pairs.select(both)

    def number(self, name: str) -> int:
        """Return the number of a source."""
        return source_number(name, self.names)

    def shuffle_labels(self, seed: int = 0) -> TaggedPairs:
        """Exchange chosen and rejected, tags with them, in a random half: the control in which nothing is learned."""
        seed = check_seed(seed)
        generator = torch.Generator().manual_seed((seed + 0x5EED) * 0x9E3779B1 % 2**63)
        flip = torch.rand(len(self), generator=generator, device="cpu") < 0.5
        chosen, rejected = self.pairs.chosen, self.pairs.rejected
        rows = flip.to(self.pairs.device).view(-1, *[1] * len(self.pairs.event_shape))
        pairs = EncodedPairs(
            torch.where(rows, rejected, chosen), torch.where(rows, chosen, rejected), self.pairs.context,
            self.pairs.weight, probability=self.pairs.probability, group=self.pairs.group, encoder=self.pairs.encoder,
        )  # fmt: skip
        return TaggedPairs(
            pairs, torch.where(flip, self.rejected_tag, self.chosen_tag),
            torch.where(flip, self.chosen_tag, self.rejected_tag), self.names,
        )  # fmt: skip

    @property
    def shares(self) -> Tensor:
        """Return the share (K,) of each source among the outputs, by the pairs' weights."""
        weight = self._weight.double()
        count = torch.zeros(len(self.names), dtype=torch.float64)
        count.index_add_(0, self.chosen_tag, weight).index_add_(0, self.rejected_tag, weight)
        return (count / count.sum()).float()

    def win_rates(self, prior: float = 1.0) -> WinRates:
        """Count how often outputs of each source beat those of each other.

        Args:
            prior: votes for either side that are added to those cast: sources that were rarely compared stay near 1/2.
        """
        prior = check_number("prior", prior, above=0)
        probability = self.pairs.probability
        won = self._weight.double() if probability is None else (self._weight * probability.cpu()).double()
        lost = self._weight.double() - won
        wins = torch.zeros(len(self.names), len(self.names), dtype=torch.float64)
        wins.index_put_((self.chosen_tag, self.rejected_tag), won, accumulate=True)
        wins.index_put_((self.rejected_tag, self.chosen_tag), lost, accumulate=True)
        votes = wins + wins.T
        rates = (wins + prior) / (votes + 2 * prior)
        return WinRates(self.names, rates.fill_diagonal_(0.5).float(), votes.float())

    def with_codes(self, unit: float) -> EncodedPairs:
        """Append its tag's one-hot code, of length ``unit``, to each output: for models that know who made it."""
        code, device = unit * torch.eye(len(self.names), device="cpu"), self.pairs.device
        batch = self.pairs.gather(torch.arange(len(self), device="cpu"))
        return EncodedPairs(
            torch.cat([batch.chosen, code[self.chosen_tag].to(device)], dim=1),
            torch.cat([batch.rejected, code[self.rejected_tag].to(device)], dim=1),
            batch.context, batch.weight, group=self.pairs.group, encoder=self.pairs.encoder,
            probability=None if self.pairs.probability is None else batch.probability,
        )  # fmt: skip

    @property
    def _weight(self) -> Tensor:
        return torch.ones(len(self.pairs), device="cpu") if self.pairs.weight is None else self.pairs.weight.cpu()


def source_number(name: Any, names: Sequence[str]) -> int:
    """Return the number of a source by its name or number.

    Raises:
        ValueError: there is no such source.
    """
    if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(names) and str(name) not in names:
        return name
    check_choice("tag", str(name), names)
    return names.index(str(name))
