"""Behaviour cloning, of all segments or of the winners of the comparisons.

The mean of the winners' distribution is the simplest summary of preferences, and it cannot leave that distribution.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.baselines.networks import fit_early_stopped
from benchmarks.control.config import ControlCloneConfig
from benchmarks.control.learning import Candidate, ControlData, Displaced, observation_network
from benchmarks.core.bench import Bench
from pfm.pbrl import ClonedPolicy

__all__ = ["Clone", "make"]


class Clone:
    """Predicts a segment from the observation, and executes its first step."""

    def __init__(self, config: ControlCloneConfig) -> None:
        for name, known in (("rows", ("all", "winners")), ("form", ("actions", "residual"))):
            if getattr(config, name) not in known:
                raise ValueError(f"method.{name} must be one of {', '.join(known)}: got {getattr(config, name)!r}")
        self.config = config

    def learn(self, data: ControlData, bench: Bench) -> dict[str, Any]:
        """Clone actions by least squares; or residuals, with the reference below."""
        train = data.train
        if self.config.form == "actions":
            space = data.reference.action_space
            seen = np.repeat(train.observation, train.members, axis=0)
            acted = train.actions.reshape(-1, *train.actions.shape[2:])
            if self.config.rows == "winners":
                chosen = _winners(data)
                seen, acted = seen[chosen], acted[chosen]
            policy = ClonedPolicy.fit(seen, acted, action_space=space, seed=data.seed)
            self._candidates = [Candidate({"form": "actions"}, policy)]
            return {"rows": len(seen)}
        if self.config.rows != "winners":
            raise ValueError("method.form='residual' of all rows is the reference itself: use method.rows='winners'")
        pairs = data.pairs
        every = pairs.gather(torch.arange(len(pairs)))
        network = observation_network(data, data.factor.shape[1], data.seed)
        assert every.context is not None
        context, aim = every.context, data.whiten(every.chosen)

        def loss(index: Tensor) -> Tensor:
            return (network(context[index], None) - aim[index]).square().sum(1)

        fitted = fit_early_stopped(network, loss, pairs, seed=data.seed)

        def displacement(seen: Tensor) -> Tensor:
            return data.colour(network(seen, None))

        self._candidates = [
            Candidate({"strength": strength}, Displaced.on(data, displacement, strength))
            for strength in self.config.strengths
        ]
        return fitted.notes()

    def candidates(self) -> list[Candidate]:
        """Return one policy for every strength."""
        return self._candidates


def _winners(data: ControlData) -> np.ndarray:
    """Return the rows of the preferred members, of all members one state after the other."""
    train = data.train
    assert train.label is not None
    state, first, second = train.comparisons.T
    decided = np.isfinite(train.label) & (train.label != 0.5)
    member = np.where(train.label > 0.5, first, second)
    return (state * train.members + member)[decided]


def make(config: ControlCloneConfig) -> Clone:
    """Make the method of a config."""
    return Clone(config)
