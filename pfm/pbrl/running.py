"""Segments run from restored states, and what follows them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pfm.pbrl.finite import all_finite

__all__ = [
    "Continued",
    "check_actions",
    "check_observation",
    "clip_action",
    "clipper",
    "correlated_noise",
    "expected_value",
    "follow",
    "half_range",
    "run_on",
]

Value = Callable[[np.ndarray], np.ndarray]

"""What is still to come after observations (B, O), discounted: (B,)."""
Memory = tuple[np.ndarray, ...] | None
"""What a policy's ``predict`` hands on from step to step: arrays with one row an episode."""


@dataclass(frozen=True)
class Continued:
    """Holds B segments that were run from restored states, and what followed them.

    ``actions`` and ``reference_actions`` (B, H, A), ``rewards`` (B, H), 0 after an episode's end; ``after`` (B,)
    discounted to the segment's first step; ``steps`` (B,) before the episode's end; ``simulated`` steps were taken.
    """

    actions: np.ndarray
    reference_actions: np.ndarray
    rewards: np.ndarray
    after: np.ndarray
    steps: np.ndarray
    simulated: int

    @classmethod
    def concatenate(cls, parts: list[Continued]) -> Continued:
        """Join runs of equal length."""
        names = ("actions", "reference_actions", "rewards", "after", "steps")
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return cls(**joined, simulated=sum(part.simulated for part in parts))


def run_on(
    env: Any,
    policy: Any,
    states: Any,
    segments: np.ndarray,
    continuation: int,
    *,
    form: str = "residual",
    memory: Memory = None,
    stochastic: np.ndarray | None = None,
    discount: float = 1.0,
    value: Value | None = None,
) -> Continued:
    """Run segments from saved states, then the deterministic reference, and add up the rewards.

    Args:
        env: a batch environment. policy: the reference.
        states: B states as ``env.save_states`` gives them.
        segments: (B, H, A), in the form that ``form`` names: what is added to the reference's own actions at the
            observations on the way (``"residual"``), or the actions themselves (``"actions"``).
        continuation: steps of the reference after the segment. value: what is expected after those, or after the last
            observation of an episode that the time limit cut; nothing after a termination.
        memory: the reference's own state at the saved states, a tuple of arrays (B, ...); None if it keeps none.
        stochastic: (B,) rows whose reference acts stochastically during the segment; None for none.
        discount: of rewards a step.

    Raises:
        ValueError: shapes disagree, or an observation is not finite.
    """
    observation = env.restore_states(states)
    count, length, size = segments.shape
    if count != env.count or size != env.action_space.shape[0]:
        raise ValueError(
            f"segments must be ({env.count}, H, {env.action_space.shape[0]}), one a state: got {segments.shape}"
        )
    alive = ~env.done
    start, going_on = np.full(count, memory is None), np.zeros(count, dtype=bool)
    actions, reference_actions = np.zeros((2, count, length, size))
    rewards, after = np.zeros((count, length)), np.zeros(count)
    steps, taken = None, np.zeros(count, dtype=np.int64)  # in the segment, and in all
    simulated = 0
    clip, dtype = clipper(env.action_space), env.action_space.dtype
    draws = stochastic is not None and bool(stochastic.any())
    for step in range(length + continuation):
        left = int(np.count_nonzero(alive))
        if left == 0:
            break
        if step == length:
            steps = taken.copy()
        reference, following = policy.predict(observation, memory, start, True)
        check_actions(reference, env, count)
        reference = clip(reference)
        action = reference
        if step < length:
            if draws:
                assert stochastic is not None
                drawn, _ = policy.predict(observation, memory, start, False)
                action = np.where(stochastic[:, None], clip(drawn), reference)
            action = clip(action + segments[:, step] if form == "residual" else segments[:, step])
            actions[:, step], reference_actions[:, step] = action, reference
            if step and left < count:
                actions[~alive, step] = actions[~alive, step - 1]
                reference_actions[~alive, step] = reference_actions[~alive, step - 1]
        memory, start = following, going_on
        simulated += left
        taken += alive
        observation, reward, done = env.step(action.astype(dtype))
        if left < count:
            reward = np.where(alive, reward, 0.0)
        if step < length:
            rewards[:, step] = reward
        else:
            after += discount**step * reward
        alive &= ~done
        check_observation(observation, alive, f"step {step + 1} of a segment")
    if steps is None:  # the segment was all there was
        steps = taken.copy()
    ran = int(steps.max())
    if 0 < ran < length:  # every episode had ended
        for each in (actions, reference_actions):
            each[:, ran:] = each[:, ran - 1 : ran]
    if value is not None:
        open_ended = ~env.terminated  # what a time limit cut off would still have earned
        if open_ended.any():
            after[open_ended] += discount ** taken[open_ended] * expected_value(value, observation[open_ended])
    return Continued(actions, reference_actions, rewards, after, steps, simulated)


def correlated_noise(
    random: np.random.Generator, shape: tuple[int, ...], scale: float, correlation: float
) -> np.ndarray:
    """Draw Gaussian noise (..., H, A) of standard deviation ``scale``, correlated from step to step along H."""
    noise = random.standard_normal(shape)
    for step in range(1, shape[-2]):
        noise[..., step, :] = follow(noise[..., step - 1, :], noise[..., step, :], correlation)
    return scale * noise


def follow(before: np.ndarray, fresh: np.ndarray, correlation: float) -> np.ndarray:
    """Return noise (..., A) that follows the noise ``before``, of unit variance."""
    return correlation * before + math.sqrt(1 - correlation**2) * fresh


def half_range(space: Any) -> np.ndarray:
    """Return half the range of each action (A,), 1 where it is unbounded."""
    half = (space.high.astype(np.float64) - space.low.astype(np.float64)) / 2
    return np.where(np.isfinite(half), half, 1.0)


def clip_action(action: np.ndarray, env: Any) -> np.ndarray:
    """Clip actions (..., A) to the bounds, in float64."""
    return clipper(env.action_space)(action)


def clipper(space: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Return what clips actions (..., A) to the bounds of a space, in float64: for few rows faster than ``np.clip``."""
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)

    def clip(action: np.ndarray) -> np.ndarray:
        clipped = np.maximum(action, low)
        return np.minimum(clipped, high, out=clipped)

    return clip


def check_actions(action: Any, env: Any, count: int) -> None:
    """Check the actions of a policy.

    Raises:
        ValueError: they are not (count, A) of the environment's action space, or not finite.
    """
    wanted = (count, *env.action_space.shape)
    if np.shape(action) != wanted:
        raise ValueError(
            f"the policy gives actions {np.shape(action)} and the environment takes {wanted}: it was made for another "
            "action space"
        )
    if not all_finite(np.asarray(action)):
        raise ValueError("the policy gives actions that are NaN or infinite")


def check_observation(observation: np.ndarray, alive: np.ndarray, where: str) -> None:
    """Refuse observations (B, O) that are not finite in rows that are ``alive`` (B,)."""
    if all_finite(observation):
        return
    finite = np.isfinite(observation)
    bad = alive & ~finite.all(1)
    if bad.any():
        raise ValueError(
            f"the environment gives NaN or infinite observations in {where} ({int(bad.sum())} of {int(alive.sum())} "
            "rows): less noise, or another seed; shards that were finished are kept"
        )


def expected_value(value: Value, observation: np.ndarray) -> np.ndarray:
    """Return what a value expects after observations (B, O), (B,) float64.

    Raises:
        ValueError: it gives another shape, or numbers that are not finite.
    """
    expected = np.asarray(value(observation), dtype=np.float64)
    if expected.shape not in ((len(observation),), (len(observation), 1)):
        raise ValueError(f"value must give ({len(observation)},), one number an observation: got {expected.shape}")
    if not np.isfinite(expected).all():
        raise ValueError("value gives NaN or infinity")
    return expected.reshape(-1)
