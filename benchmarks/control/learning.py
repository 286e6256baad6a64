"""What every method of control is given, and what it gives back: policies to choose from.

All learned methods read the same labelled pairs in the same coordinates: what was added to the reference's own actions
(:meth:`pfm.pbrl.SegmentPairs.encode`), so that the reference is the zero segment and none of them has to learn it.
Shapes: N pairs, H steps, A action values, D = H A, O observation values, B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from benchmarks.baselines.networks import Network
from benchmarks.core.bench import Bench
from pfm import EncodedPairs
from pfm.pbrl.segments import SegmentPairs

__all__ = ["Candidate", "ControlData", "ControlMethod", "Displaced", "Displacement", "observation_network"]

Displacement = Callable[[Tensor], Tensor]
"""What to add to the reference, in action units: observations (B, O) -> segments (B, H, A)."""


@dataclass(frozen=True)
class ControlData:
    """Holds what a method may use: labelled pairs, the reference, and what makes its simulator."""

    train: SegmentPairs
    reference: Any
    environment: Any
    continuation: int
    noise: float | None
    seed: int

    @cached_property
    def pairs(self) -> EncodedPairs:
        """Encode the training pairs as residuals."""
        return self.train.encode("residual", ties="drop")

    @cached_property
    def factor(self) -> Tensor:
        """Return L (D, K), with L L' about the covariance of the residuals: the noise, as executed, is about L z."""
        return torch.from_numpy(self.train.directions()).flatten(0, 1)

    @property
    def shape(self) -> torch.Size:
        """Return (H, A)."""
        return self.pairs.event_shape

    def whiten(self, residuals: Tensor) -> Tensor:
        """Return z (B, K), of unit covariance, for residuals (B, D)."""
        return residuals @ torch.linalg.pinv(self.factor).T

    def colour(self, z: Tensor) -> Tensor:
        """Undo :meth:`whiten`, and give segments: (..., K) -> (..., H, A)."""
        return (z @ self.factor.T).unflatten(-1, self.shape)

    def draws(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw residuals (count, H, A) with the covariance of the pairs' members."""
        return self.colour(torch.randn(count, self.factor.shape[1], generator=generator))


@dataclass(frozen=True)
class Candidate:
    """A policy, and what it is among those that a method can choose from."""

    settings: dict[str, Any]
    policy: Any


@runtime_checkable
class ControlMethod(Protocol):
    """Learns from labelled pairs of segments, and gives policies, of which held-out episodes choose one."""

    def learn(self, data: ControlData, bench: Bench) -> dict[str, Any]:
        """Fit; return what was found, as JSON values."""
        ...

    def candidates(self) -> list[Candidate]:
        """Return the policies to choose from, at least one."""
        ...


@dataclass
class Displaced:
    """Adds a learned displacement's first step to the reference's deterministic action, and plans anew every step."""

    reference: Any
    displacement: Displacement
    low: np.ndarray
    high: np.ndarray
    strength: float = 1.0
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def on(cls, data: ControlData, displacement: Displacement, strength: float = 1.0) -> Displaced:
        """Displace the reference of ``data``."""
        return cls(data.reference, displacement, data.train.low, data.train.high, strength)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Choose actions as stable-baselines3's ``predict`` does; (E, O) -> (E, A)."""
        base, state = self.reference.predict(observation, state, episode_start, deterministic=True)
        seen = np.atleast_2d(np.asarray(observation, dtype=np.float32))
        added = self.displacement(torch.from_numpy(seen)).detach()[:, 0].numpy()
        if np.ndim(observation) == 1:
            added = added[0]
        action = np.clip(base, self.low, self.high) + self.strength * added
        return np.clip(action, self.low, self.high).astype(np.float32), state


def observation_network(data: ControlData, outputs: int, seed: int, hidden: int = 128) -> Network:
    """Make a network of the observation alone, standardised; zero before training."""
    seen = torch.from_numpy(data.train.observation)
    network = Network(seen.shape[1], 0, outputs, hidden=hidden, seed=seed)
    network.mean.copy_(seen.mean(0))
    network.spread.copy_(seen.std(0, correction=0).clamp_min(1e-6))
    return network
