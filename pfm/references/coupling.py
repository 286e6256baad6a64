"""Each member of a pair, with its own tag in the context, joined to the pair's winner."""

from __future__ import annotations

import torch
from torch import Tensor

from pfm._internal.checks import check_choice
from pfm.flow.couplings import SOURCES, Coupled
from pfm.references.pairs import TaggedPairs

__all__ = ["TaggedEnds"]


class TaggedEnds:
    """Joins each member of a pair, with its own tag in the context, to the pair's winner.

    ``source="reference"``: items are the members of all pairs; ``source="rejected"``: the losers. A soft label p
    joins to either output, with weights p and 1 - p.
    """

    def __init__(self, tagged: TaggedPairs, source: str) -> None:
        check_choice("source", source, SOURCES)
        self.pairs, self.reference = tagged.pairs, source == "reference"
        self.soft = tagged.pairs.probability is not None
        if self.soft and not self.reference:
            raise ValueError("source='rejected' with soft labels has no one loser a pair: use source='reference'")
        self.rows_per_item = 2 if self.soft else 1
        self._code = torch.eye(len(tagged.names), dtype=torch.float32, device=self.device)
        self._tags = torch.stack([tagged.chosen_tag, tagged.rejected_tag], dim=1).flatten().to(self.device)
        weight = tagged.pairs.weight
        self._mean_weight = 1.0 if weight is None else float(weight.mean())

    @property
    def device(self) -> torch.device:
        """Return the device of the samples."""
        return self.pairs.device

    def __len__(self) -> int:
        return len(self.pairs) * (2 if self.reference else 1)

    def _places(self, index: Tensor) -> Tensor:
        return index if self.reference else 2 * index + 1

    def group_of(self, index: Tensor) -> Tensor:
        """Return the prompts of the source samples at ``index`` (B,), on the CPU."""
        return self.pairs.group[self._places(index).cpu() // 2]

    def draw(self, index: Tensor, generator: torch.Generator | None = None) -> Coupled:
        """Join the source samples at ``index`` (B,) to winners, ``rows_per_item * B`` rows."""
        places = self._places(index.to(self.pairs.device, non_blocking=True))
        pair = places // 2
        source = self.pairs.members(places)
        batch = self.pairs.gather(pair)
        code = self._code[self._tags[places]]
        context = code if batch.context is None else torch.cat([batch.context, code], dim=1)
        weight = batch.weight / self._mean_weight
        if not self.soft:
            return Coupled(source, batch.chosen, context, weight)
        # The mean weight stays 1: p + (1 - p) of an item are two rows.
        weights = torch.cat([weight * batch.probability, weight * (1 - batch.probability)]) * 2
        return Coupled(source.repeat(2, 1), torch.cat([batch.chosen, batch.rejected]), context, weights, 2)
