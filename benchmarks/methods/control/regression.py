"""Regression from the rejected segment to the chosen one: y becomes an estimate of E[chosen | rejected = y, observed].

It is the baseline of the moves on laws (:mod:`benchmarks.methods.regression`), applied to the zero residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.control.config import ControlRegressionConfig
from benchmarks.control.learning import Candidate, ControlData, Displaced
from benchmarks.core.bench import Bench
from benchmarks.core.config import RegressionConfig
from benchmarks.methods.regression import Regression

__all__ = ["SegmentRegression", "make"]


class SegmentRegression:
    """Predicts what would be chosen over the reference's own segment, and over that, and so on."""

    def __init__(self, config: ControlRegressionConfig) -> None:
        self.config = config

    def learn(self, data: ControlData, bench: Bench) -> dict[str, Any]:
        """Fit the regression on the pairs."""
        model = Regression(RegressionConfig(name="regression", family="regression", label="", model="network"))
        notes = model.learn(None, data.pairs, bench)  # type: ignore[arg-type]  # it asks nothing of a law
        shape = data.shape

        def moved(rounds: int) -> Any:
            def displacement(seen: Tensor) -> Tensor:
                y = torch.zeros(len(seen), shape.numel())
                for _ in range(rounds):
                    y = model.predict(y, seen)
                return y.unflatten(1, shape)

            return displacement

        self._candidates = [
            Candidate({"rounds": rounds}, Displaced.on(data, moved(rounds))) for rounds in self.config.rounds
        ]
        return notes

    def candidates(self) -> list[Candidate]:
        """Return one policy for every number of rounds."""
        return self._candidates


def make(config: ControlRegressionConfig) -> SegmentRegression:
    """Make the method of a config."""
    return SegmentRegression(config)
