"""The two ends of every comparison on laws: outputs left as they are, and exact draws of what is aimed at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.core.bench import Bench
from benchmarks.core.config import MethodConfig
from benchmarks.laws.laws import Law
from pfm import EncodedPairs

__all__ = ["LawIdentity", "LawOracle", "make"]


class LawIdentity:
    """Leaves draws of the reference as they are."""

    draws, evaluations, labels = 1, None, 0

    def learn(self, law: Law, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Learn nothing."""
        return {}

    def move(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        """Return y."""
        return y


class LawOracle:
    """Draws the winners' distribution exactly: the better of two reference draws, by the law's own vote."""

    draws, evaluations, labels = 2, None, 0

    def learn(self, law: Law, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Keep the law."""
        self.law = law
        return {}

    def move(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        """Let y meet another draw."""
        other = self.law.reference(context, len(y), generator)
        return torch.where(self.law.label(y, other, context, generator)[:, None], y, other)


def make(config: MethodConfig) -> LawIdentity | LawOracle:
    """Make the method that the config's name asks for."""
    return {"law_identity": LawIdentity, "law_oracle": LawOracle}[config.name]()
