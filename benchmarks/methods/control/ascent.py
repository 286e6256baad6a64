"""Ascent on a learned reward: from the reference's segment along the gradient of a Bradley–Terry network.

Steps are of equal length in units of the noise, so that the length of the way is what is chosen on held-out episodes;
how far the network can be trusted, the gradient does not say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.control.config import ControlAscentConfig
from benchmarks.control.learning import Candidate, ControlData, Displaced
from benchmarks.control.rewards import RewardEnsemble
from benchmarks.core.bench import Bench

__all__ = ["SegmentAscent", "make"]


class SegmentAscent:
    """Climbs the reward that it fitted."""

    def __init__(self, config: ControlAscentConfig) -> None:
        self.config = config

    def learn(self, data: ControlData, bench: Bench) -> dict[str, Any]:
        """Fit the reward on the pairs."""
        reward = RewardEnsemble(self.config.members, data.seed)
        notes = reward.fit(data.pairs)
        size = data.factor.shape[1]
        generator = torch.Generator().manual_seed(data.seed)

        def climbed(count: int, length: float) -> Any:
            step = length * size**0.5 / self.config.steps

            def displacement(seen: Tensor) -> Tensor:
                start = torch.randn(len(seen), count, size, generator=generator)
                start[:, 0] = 0.0
                z, rows = start.flatten(0, 1), seen.repeat_interleave(count, 0)
                for _ in range(self.config.steps):
                    slope = reward.slope(data.colour(z).flatten(1), rows) @ data.factor
                    z = z + step * slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12)
                ends = data.colour(z)
                if count == 1:
                    return ends
                with torch.no_grad():
                    best = reward.reward(ends.flatten(1), rows).view(-1, count).argmax(1)
                return ends.unflatten(0, (-1, count))[torch.arange(len(seen)), best]

            return displacement

        self._candidates = [
            Candidate({"candidates": count, "length": length}, Displaced.on(data, climbed(count, length)))
            for count in self.config.candidates
            for length in self.config.lengths
        ]
        return notes

    def candidates(self) -> list[Candidate]:
        """Return one policy for every number of candidates and length."""
        return self._candidates


def make(config: ControlAscentConfig) -> SegmentAscent:
    """Make the method of a config."""
    return SegmentAscent(config)
