"""Light environments in array code: many episodes stepped at once, for tests and studies of many pairs.

Both follow the protocol :class:`~pfm.pbrl.rollouts.BatchEnv`. States are rows of one array (E, S), so that saving and
restoring are copies, and a step costs the same few array operations whatever E is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.spaces import Box

from pfm._internal.checks import check_whole

__all__ = ["BatchedPendulum", "BatchedPointMass"]


class _Batched:
    """E episodes of one dynamical system; the state (E, S) ends with the count of steps.

    An episode ends after ``horizon`` steps, by time alone. From then on its row is constant and its rewards are 0.
    """

    observation_space: Box
    action_space: Box
    horizon: int
    width: int  # S - 1

    def __init__(self) -> None:
        self._states = np.zeros((0, self.width + 1))

    @property
    def count(self) -> int:
        """The number E of episodes."""
        return len(self._states)

    @property
    def done(self) -> np.ndarray:
        """(E,) bool: which episodes have ended."""
        return self._states[:, -1] >= self.horizon

    @property
    def terminated(self) -> np.ndarray:
        """(E,) bool: which episodes have ended by something else than time: none."""
        return np.zeros(self.count, bool)

    def reset(self, count: int, seed: int) -> np.ndarray:
        """Start ``count`` episodes; the first of them do not depend on how many there are.

        Returns:
            observations (E, O) float32.
        """
        check_whole("count", count, 1)
        draws = self._start(count, np.random.default_rng(seed))
        self._states = np.column_stack([draws, np.zeros(count)])
        return self._observe()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Apply actions (E, A), clipped to the bounds.

        Returns:
            observations (E, O) float32, rewards (E,) float64, done (E,) bool.

        Raises:
            ValueError: the actions have another shape, or are not finite.
        """
        expected = (self.count, *self.action_space.shape)
        actions = np.asarray(actions)
        if actions.shape != expected:
            raise ValueError(f"actions must have shape {expected}: got {actions.shape}")
        if not np.isfinite(actions).all():
            raise ValueError("actions hold NaN or infinity: see what the policy made of its observations")
        actions = np.clip(actions, self.action_space.low, self.action_space.high)
        reward, moved = self._move(self._states[:, :-1], actions)
        ended = self.done
        if ended.any():
            reward = np.where(ended, 0.0, reward)
            moved = np.where(ended[:, None], self._states[:, :-1], moved)
        self._states = np.column_stack([moved, self._states[:, -1] + ~ended])
        return self._observe(), reward, self.done

    def restart_clock(self) -> None:
        """Put the time limit of the episodes that go on as far away as after a reset."""
        self._states[~self.done, -1] = 0

    def save_states(self) -> np.ndarray:
        """Copy the states, (E, S) float64."""
        return self._states.copy()

    def restore_states(self, states: Any) -> np.ndarray:
        """Continue from states (E, S), of any number E, and give their observations (E, O)."""
        states = np.array(states, np.float64)
        if states.ndim != 2 or states.shape[1] != self.width + 1:
            raise ValueError(f"states must have shape (E, {self.width + 1}): got {states.shape}")
        self._states = states
        return self._observe()

    def _start(self, count: int, generator: np.random.Generator) -> np.ndarray:
        raise NotImplementedError

    def _move(self, state: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def _observe(self) -> np.ndarray:
        raise NotImplementedError


class BatchedPendulum(_Batched):
    """Gymnasium's Pendulum-v1, many at a time: the same dynamics, rewards, bounds and limit of 200 steps.

    State: angle from upright (rad), angular velocity (rad/s), steps. Observation: cosine, sine, angular velocity.
    """

    horizon = 200
    width = 2
    observation_space: Box = Box(np.array([-1, -1, -8], np.float32), np.array([1, 1, 8], np.float32), dtype=np.float32)
    action_space: Box = Box(-2.0, 2.0, (1,), np.float32)

    def _start(self, count: int, generator: np.random.Generator) -> np.ndarray:
        return generator.uniform([-np.pi, -1.0], [np.pi, 1.0], (count, 2))

    def _move(self, state: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        angle, speed = state.T
        torque = action[:, 0]
        wrapped = (angle + np.pi) % (2 * np.pi) - np.pi
        cost = wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2
        # a rod of mass 1 and length 1 under g = 10: acceleration 3g/2l sin + 3u/ml², semi-implicit Euler of 0.05 s
        speed = np.clip(speed + (15.0 * np.sin(angle) + 3.0 * torque) * 0.05, -8.0, 8.0)
        return -cost, np.column_stack([angle + speed * 0.05, speed])

    def _observe(self) -> np.ndarray:
        angle, speed = self._states[:, 0], self._states[:, 1]
        return np.column_stack([np.cos(angle), np.sin(angle), speed]).astype(np.float32)


class BatchedPointMass(_Batched):
    """A point of unit mass in the plane that force moves to the origin, many at a time.

    Linear dynamics and quadratic costs, so that the best policy is known in closed form (the linear-quadratic
    regulator). State: position (m), velocity (m/s), steps. Observation: position and velocity, (4,). Action: force
    in [-1, 1]² (N), held for 0.1 s. Reward: -(|position|² + 0.1 |velocity|² + 0.01 |force|²), of the state before
    the step. Start: position uniform in [-1, 1]², velocity in [-0.5, 0.5]². 50 steps.
    """

    horizon = 50
    width = 4
    seconds = 0.1
    observation_space: Box = Box(-np.inf, np.inf, (4,), np.float32)
    action_space: Box = Box(-1.0, 1.0, (2,), np.float32)

    def _start(self, count: int, generator: np.random.Generator) -> np.ndarray:
        return generator.uniform(-1.0, 1.0, (count, 4)) * [1.0, 1.0, 0.5, 0.5]

    def _move(self, state: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        position, velocity = state[:, :2], state[:, 2:]
        cost = (position**2).sum(1) + 0.1 * (velocity**2).sum(1) + 0.01 * (action**2).sum(1)
        moved = position + velocity * self.seconds + action * (self.seconds**2 / 2)
        return -cost, np.column_stack([moved, velocity + action * self.seconds])

    def _observe(self) -> np.ndarray:
        return self._states[:, :-1].astype(np.float32)
