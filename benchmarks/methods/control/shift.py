"""The mean displacement from rejected to chosen segments, the same everywhere or a network of the observation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.networks import fit_early_stopped
from benchmarks.control.config import ControlShiftConfig
from benchmarks.control.learning import Candidate, ControlData, Displaced, observation_network
from benchmarks.core.bench import Bench

__all__ = ["Shift", "make"]


class Shift:
    """Adds a multiple of E[chosen - rejected], or of E[chosen - rejected | observation]."""

    def __init__(self, config: ControlShiftConfig) -> None:
        if config.model not in ("constant", "network"):
            raise ValueError(f"method.model must be 'constant' or 'network': got {config.model!r}")
        self.config = config

    def learn(self, data: ControlData, bench: Bench) -> dict[str, Any]:
        """Average the displacements, or regress them on what is seen."""
        pairs = data.pairs
        every = pairs.gather(torch.arange(len(pairs)))
        away = data.whiten((2 * every.probability - 1)[:, None] * (every.chosen - every.rejected))
        mean = away.mean(0)
        notes: dict[str, Any] = {}
        if self.config.model == "constant":

            def displacement(seen: Tensor) -> Tensor:
                return data.colour(mean).expand(len(seen), *data.shape)
        else:
            network = observation_network(data, data.factor.shape[1], data.seed)
            assert every.context is not None
            context = every.context
            fitted = fit_early_stopped(
                network,
                lambda index: (network(context[index], None) + mean - away[index]).square().sum(1),
                pairs,
                seed=data.seed,
            )
            notes = fitted.notes()

            def displacement(seen: Tensor) -> Tensor:
                return data.colour(mean + network(seen, None))

        self._candidates = [
            Candidate({"strength": strength}, Displaced.on(data, displacement, strength))
            for strength in self.config.strengths
        ]
        return notes

    def candidates(self) -> list[Candidate]:
        """Return one policy for every strength."""
        return self._candidates


def make(config: ControlShiftConfig) -> Shift:
    """Make the method of a config."""
    return Shift(config)
