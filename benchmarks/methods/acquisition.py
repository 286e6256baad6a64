"""Methods that choose which pairs to label."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.acquisition.config import AcquisitionMethodConfig
from pfm import EncodedPairs
from pfm.acquisition import LaplacePosterior, choose_pairs

__all__ = ["Acquirer", "make"]


class Acquirer:
    """Asks for labels by a criterion; ``shuffled`` says whether it is told noise."""

    def __init__(self, config: AcquisitionMethodConfig) -> None:
        self.config = config
        self.shuffled = config.shuffled

    def ask(
        self, candidates: EncodedPairs, count: int, labelled: EncodedPairs | None, outputs: Tensor, seed: int
    ) -> Tensor:
        """Return the places (count,) of the pairs to label next among the candidates, whose labels it does not read.

        Args:
            candidates: the unlabelled pairs. labelled: the labelled ones, or None before the first.
            outputs: (M, D) the pool's, which set the unit. seed: of what is random.
        """
        model = None
        if self.config.by == "random":
            model = LaplacePosterior().fit(None, outputs)
        elif self.config.members and labelled is not None:
            model = self._members(labelled, outputs, seed)
        else:
            model = LaplacePosterior().fit(labelled, outputs)
        return choose_pairs(candidates, count, by=self.config.by, model=model, seed=seed).index

    def _members(self, labelled: EncodedPairs, outputs: Tensor, seed: int) -> list[LaplacePosterior]:
        names, member = torch.unique(labelled.group, return_inverse=True)
        generator = torch.Generator().manual_seed(seed)
        precision = LaplacePosterior().fit(labelled, outputs).precision
        models = []
        for _ in range(self.config.members):
            drawn = torch.randint(len(names), (len(names),), generator=generator)
            rows = torch.cat([(member == name).nonzero().flatten() for name in drawn.tolist()])
            models.append(LaplacePosterior(precision).fit(labelled.select(rows), outputs))
        return models


def make(config: AcquisitionMethodConfig) -> Acquirer:
    """Make the method."""
    return Acquirer(config)
