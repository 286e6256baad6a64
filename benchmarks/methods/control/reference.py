"""The reference itself, by its mode or with the noise with which the segments were drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.control.config import ControlMethodConfig
from benchmarks.control.learning import Candidate, ControlData
from benchmarks.core.bench import Bench
from pfm.pbrl import NoisyPolicy

__all__ = ["Reference", "make"]


@dataclass
class _Stochastic:
    policy: Any

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> Any:
        return self.policy.predict(observation, state, episode_start, deterministic=False)


class Reference:
    """Learns nothing."""

    def __init__(self, config: ControlMethodConfig) -> None:
        if config.kind not in ("deterministic", "stochastic"):
            raise ValueError(f"method.kind must be 'deterministic' or 'stochastic': got {config.kind!r}")
        self.config = config

    def learn(self, data: ControlData, bench: Bench) -> dict[str, Any]:
        """Keep the reference."""
        self.policy = data.reference
        if self.config.kind == "stochastic":
            noisy = data.reference if data.noise is None else NoisyPolicy(data.reference, data.noise, seed=data.seed)
            self.policy = _Stochastic(noisy)
        return {}

    def candidates(self) -> list[Candidate]:
        """Return the one policy there is."""
        return [Candidate({"kind": self.config.kind}, self.policy)]


def make(config: ControlMethodConfig) -> Reference:
    """Make the method of a config."""
    return Reference(config)
