"""Best of n: draws of the reference's segments, of which a learned reward or the simulator itself chooses one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.baselines.rewards import NetworkReward
from benchmarks.control.config import ControlBestOfConfig
from benchmarks.control.learning import Candidate, ControlData, Displaced
from benchmarks.core.bench import Bench
from pfm.pbrl.running import run_on
from pfm.pbrl.states import pick_states

__all__ = ["SegmentBestOf", "make"]


class SegmentBestOf:
    """Draws n segments a plan, and executes the beginning of the best."""

    def __init__(self, config: ControlBestOfConfig) -> None:
        if config.by not in ("reward", "oracle"):
            raise ValueError(f"method.by must be 'reward' or 'oracle': got {config.by!r}")
        self.config = config
        self.episodes = config.episodes

    def learn(self, data: ControlData, bench: Bench) -> dict[str, Any]:
        """Fit the reward; an oracle has nothing to fit."""
        if self.config.by == "oracle":
            self._candidates = [
                Candidate({"candidates": n}, _Oracle(data, n, self.config.execute)) for n in self.config.candidates
            ]
            return {}
        reward = NetworkReward(data.seed)
        notes = reward.fit(data.pairs).notes()
        generator = torch.Generator().manual_seed(data.seed)

        def best_of(count: int) -> Any:
            def displacement(seen: Tensor) -> Tensor:
                drawn = data.draws(len(seen) * count, generator)
                with torch.no_grad():
                    score = reward.reward(drawn.flatten(1), seen.repeat_interleave(count, 0)).view(-1, count)
                return drawn.unflatten(0, (-1, count))[torch.arange(len(seen)), score.argmax(1)]

            return displacement

        self._candidates = [
            Candidate({"candidates": n}, Displaced.on(data, best_of(n))) for n in self.config.candidates
        ]
        return notes

    def candidates(self) -> list[Candidate]:
        """Return one policy for every n."""
        return self._candidates


class _Oracle:
    """Runs n segments, and the reference after them, on a copy of the simulator, and takes the one of most reward."""

    def __init__(self, data: ControlData, count: int, execute: int) -> None:
        self.data, self.count, self.execute = data, count, execute
        self._generator = torch.Generator().manual_seed(data.seed)
        self._played: Any = None
        self._simulator = data.environment()

    def bind(self, env: Any) -> _Oracle:
        """Play in another environment."""
        self._played = env
        return self

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Choose actions (E, A); the state holds segments in execution and the next step of them."""
        base, _ = self.data.reference.predict(observation, None, None, deterministic=True)
        if state is None or state[1] >= self.execute:
            state = (self._plan(), 0)
        segment, place = state
        action = np.clip(base, self.data.train.low, self.data.train.high) + segment[:, place]
        action = np.clip(action, self.data.train.low, self.data.train.high).astype(np.float32)
        return action, (segment, place + 1)

    def _plan(self) -> np.ndarray:
        states = self._played.save_states()
        rows = np.flatnonzero(~self._played.done)
        chosen = np.zeros((len(self._played.done), *self.data.shape), dtype=np.float32)
        if len(rows) == 0:
            return chosen
        drawn = self.data.draws(len(rows) * self.count, self._generator).numpy()
        repeated = np.repeat(rows, self.count)
        ran = run_on(self._simulator, self.data.reference, pick_states(states, repeated), drawn, self.data.continuation)
        value = (ran.rewards.sum(1) + ran.after).reshape(-1, self.count)
        chosen[rows] = drawn.reshape(len(rows), self.count, *self.data.shape)[np.arange(len(rows)), value.argmax(1)]
        return chosen


def make(config: ControlBestOfConfig) -> SegmentBestOf:
    """Make the method of a config."""
    return SegmentBestOf(config)
