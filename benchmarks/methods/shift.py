"""The mean shift: every output moves by the same vector, s E[y+ - y-].

It is the best constant velocity: E |v - (y+ - y-)|^2 over constants v is least at v = E[y+ - y-], so a flow from the
rejected source that learned nothing but a constant would carry y to y + E[y+ - y-] in one pass. From the reference
source the displacement is y1 - y0 with y1 the winner and y0 a member of the pair picked by a fair coin: half of the
time y0 is the winner itself and nothing moves, so E[y1 - y0] = E[y+ - y-] / 2. That half takes the reference's mean
to the winners' mean exactly, since pi_ref = (p0 + p1) / 2; the whole one overshoots it by as much again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.core.bench import Bench
from benchmarks.core.config import ShiftConfig
from benchmarks.laws.laws import Law
from pfm import EncodedPairs
from pfm.preferences import MeanShift

__all__ = ["Shift", "make"]

SHARE = {"rejected": 1.0, "reference": 0.5}  # of E[y+ - y-], by source


class Shift:
    """Adds ``strength`` times the mean displacement of a source."""

    draws = 1
    evaluations: float | None = None

    def __init__(self, config: ShiftConfig) -> None:
        if config.source not in SHARE:
            raise ValueError(f"method.source must be 'rejected' or 'reference', got {config.source!r}")
        self.scale = config.strength * SHARE[config.source]

    def learn(self, law: Law, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Average the pairs' differences."""
        self.displacement = self.scale * MeanShift().fit(train).direction
        return {"displacement": self.displacement.tolist()}

    def move(self, y: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        """Add the displacement to all outputs (B, D)."""
        return y + self.displacement


def make(config: ShiftConfig) -> Shift:
    """Make the method of a config."""
    return Shift(config)
