"""Rollouts: many episodes of one environment in one process, actions chosen for all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box

from pfm._internal.checks import check_whole
from pfm.pbrl.environments import StatefulEnv, UnsupportedEnvironmentError, make_env
from pfm.pbrl.finite import all_finite
from pfm.pbrl.policies import Policy, check_policy

__all__ = ["BatchEnv", "Rollout", "VectorEnv", "episode_returns", "episode_seeds", "play", "rollout"]


@runtime_checkable
class BatchEnv(Protocol):
    """E episodes stepped together. Ended episodes are marked in ``done`` and stay where they are, with reward 0.

    Those of them that a time limit did not end are ``terminated``. ``restart_clock`` puts the time limit off.
    """

    observation_space: Box
    action_space: Box

    @property
    def horizon(self) -> int | None:
        """Steps after which the time limit ends an episode; None without a limit."""
        ...

    @property
    def count(self) -> int:
        """Number E of episodes."""
        ...

    @property
    def done(self) -> np.ndarray:
        """Which episodes have ended, (E,) bool."""
        ...

    @property
    def terminated(self) -> np.ndarray:
        """Which episodes ended by themselves, not by the time limit, (E,) bool."""
        ...

    def reset(self, count: int, seed: int) -> np.ndarray:
        """Begin ``count`` episodes; return their observations (E, O)."""
        ...

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Execute actions (E, A); return observations (E, O), rewards (E,) and which episodes have ended (E,)."""
        ...

    def save_states(self) -> Any:
        """Return the exact states of all episodes."""
        ...

    def restore_states(self, states: Any) -> np.ndarray:
        """Continue from saved states; return their observations (E, O)."""
        ...

    def restart_clock(self) -> None:
        """Put the time limit as far away as after a reset."""
        ...


def episode_seeds(seed: int, count: int, first: int = 0) -> list[int]:
    """Draw the seeds of episodes ``first`` to ``first + count`` of a study, each independent of how many there are."""
    return [
        int(np.random.SeedSequence([seed, episode]).generate_state(1)[0]) for episode in range(first, first + count)
    ]


class VectorEnv:
    """Copies of one gymnasium environment, stepped together in this process; follows :class:`BatchEnv`.

    Args:
        name: the gymnasium id, or a function that makes an environment, with or without wrappers such as
            RescaleAction that keep no state of their own.
        count: how many copies to make at once; ``reset`` and ``restore_states`` make more when they need them.
        settings: for :func:`~pfm.pbrl.environments.make_env`, with an id.

    Attributes:
        name: the gymnasium id, with the wrappers of a function's environment.
        envs: the copies in use.

    Raises:
        UnsupportedEnvironmentError: the state cannot be restored exactly, by the name of the wrapper or simulator.
        TypeError: the name is neither, or actions or observations are no boxes.
    """

    def __init__(self, name: str | Callable[[], gymnasium.Env], count: int = 1, **settings: Any) -> None:
        check_whole("count", count, 1)
        if not isinstance(name, str) and settings:
            raise TypeError(f"settings go with a gymnasium id: got {', '.join(settings)} and a function")
        self.source = name
        self.settings = settings
        self._made: list[StatefulEnv] = []
        self._make(count)
        self.envs: list[StatefulEnv] = self._made[:count]
        first = self._made[0]
        self.name = name if isinstance(name, str) else _described(first)
        if not isinstance(first.action_space, Box) or not isinstance(first.observation_space, Box):
            raise TypeError(
                f"{self.name} has actions {first.action_space} and observations {first.observation_space}: "
                "both must be boxes"
            )
        self.action_space: Box = first.action_space
        self.observation_space: Box = first.observation_space

    @property
    def horizon(self) -> int | None:
        """The steps after which the time limit ends an episode."""
        return self._made[0].horizon

    @property
    def count(self) -> int:
        """The number E of episodes."""
        return len(self.envs)

    @property
    def done(self) -> np.ndarray:
        """(E,) bool: which episodes have ended."""
        return np.array([env.done for env in self.envs], bool)

    @property
    def terminated(self) -> np.ndarray:
        """(E,) bool: which episodes have ended by termination, and not by the time limit alone."""
        return np.array([env.terminated for env in self.envs], bool)

    def reset(self, count: int | None = None, seed: int | Sequence[int] = 0) -> np.ndarray:
        """Start episodes.

        Args:
            count: how many; None for as many as before.
            seed: one number, from which :func:`episode_seeds` draws each episode's own, or one for each episode.

        Returns:
            observations (E, O).
        """
        self._take(self.count if count is None else count)
        seeds = episode_seeds(seed, self.count) if isinstance(seed, int | np.integer) else list(seed)
        if len(seeds) != self.count:
            raise ValueError(f"seed holds {len(seeds)} numbers for {self.count} episodes")
        return self._join([env.reset(seed=int(own))[0] for env, own in zip(self.envs, seeds, strict=True)])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Apply actions (E, A), clipped to the bounds.

        Returns:
            observations (E, O), rewards (E,) float64, done (E,) bool: ended by termination or by the time limit.

        Raises:
            ValueError: the actions have another shape, or are not finite.
            gymnasium.error.ResetNeeded: nothing was begun.
        """
        if self.envs[-1].observation is None:
            raise ResetNeeded("call reset() or restore_states() before the first step")
        expected = (self.count, *self.action_space.shape)
        actions = np.asarray(actions)
        if actions.shape != expected:
            raise ValueError(f"actions must have shape {expected}: got {actions.shape}")
        if not all_finite(actions):
            raise ValueError("actions hold NaN or infinity: see what the policy made of its observations")
        actions = np.minimum(np.maximum(actions, self.action_space.low), self.action_space.high)
        rewards, observations = [], []
        for env, action in zip(self.envs, actions, strict=True):
            if env.done:
                observations.append(env.observation)
                rewards.append(0.0)
            else:
                observation, reward, _, _, _ = env.step(action)
                observations.append(observation)
                rewards.append(reward)
        return self._join(observations), np.array(rewards, np.float64), self.done

    def save_states(self) -> list[dict[str, np.ndarray]]:
        """Copy the states, one of :meth:`StatefulEnv.save_state` for each episode."""
        return [env.save_state() for env in self.envs]

    def restore_states(self, states: Sequence[Any]) -> np.ndarray:
        """Continue from states, of any number E, and give their observations (E, O)."""
        self._take(len(states))
        return self._join([env.restore_state(state) for env, state in zip(self.envs, states, strict=True)])

    def restart_clock(self) -> None:
        """Put the time limit of the episodes that go on as far away as after a reset."""
        for env in self.envs:
            if not env.done:
                env.restart_clock()

    def close(self) -> None:
        """Close all environments."""
        for env in self._made:
            env.close()

    def _take(self, count: int) -> None:
        check_whole("count", count, 1)
        self._make(count)
        self.envs = self._made[:count]

    def _make(self, count: int) -> None:
        while len(self._made) < count:
            if isinstance(self.source, str):
                self._made.append(make_env(self.source, **self.settings))
                _share_model(self._made[-1], self._made[0])
            else:
                self._made.append(stateful(self.source()))

    def _join(self, observations: list[Any]) -> np.ndarray:
        """Put observations into one array, (E, O); joining costs a third of filling row by row."""
        shape = self.observation_space.shape
        joined = np.empty((len(observations), *shape), self.observation_space.dtype)
        np.concatenate(observations, out=joined.reshape(-1, *shape[1:]), casting="unsafe")
        return joined


def stateful(env: Any) -> StatefulEnv:
    """Return an environment that a user has made its exact state.

    Raises:
        TypeError: it is no gymnasium environment.
        UnsupportedEnvironmentError: it has no exact state; the message names what keeps one of its own.
    """
    if not isinstance(env, gymnasium.Env):
        raise TypeError(f"a function that makes an environment must give a gymnasium.Env: got {type(env).__name__}")
    found = env if isinstance(env, StatefulEnv) else StatefulEnv(env)
    if not found.can_restore:
        raise UnsupportedEnvironmentError(found.reason)
    return found


def _described(env: StatefulEnv) -> str:
    """Name an environment by its id and by the wrappers that change what a policy sees or does."""
    names, layer = [], env.env
    while isinstance(layer, gymnasium.Wrapper):
        if isinstance(layer, gymnasium.ActionWrapper | gymnasium.ObservationWrapper | gymnasium.RewardWrapper):
            names.append(type(layer).__name__)
        layer = layer.env
    spec = layer.spec
    name = type(layer).__name__ if spec is None else spec.id
    if not names:
        return name
    space = env.action_space
    bounds = f" {space.low.tolist()} to {space.high.tolist()}" if isinstance(space, Box) else ""
    return f"{name} behind {', '.join(names)}, actions{bounds}"


def _share_model(env: StatefulEnv, first: StatefulEnv) -> None:
    """Let a copy read the constants of the first one, which equal its own: fewer of them compete for the caches.

    Only gymnasium's own MuJoCo environments, none of which changes its model.
    """
    ours: Any = env.unwrapped
    theirs: Any = first.unwrapped
    if type(ours).__module__.startswith("gymnasium.envs.mujoco."):
        ours.model = theirs.model


@dataclass(frozen=True)
class Rollout:
    """Holds T steps of E episodes.

    Attributes:
        observations: (T, E, O), before each action.
        actions: (T, E, A), as they were applied: clipped to the bounds.
        rewards: (T, E) float64, 0 once an episode has ended.
        alive: (T, E) bool, which steps belong to an episode that had not ended before.
        done: (E,) bool, which episodes have ended by now.
        last: (E, O), the observations after the last step.
        states: of the requested steps, ``BatchEnv.save_states`` before the action.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    alive: np.ndarray
    done: np.ndarray
    last: np.ndarray
    states: dict[int, Any] = field(default_factory=dict)

    @property
    def returns(self) -> np.ndarray:
        """(E,) float64: the sums of the rewards."""
        return self.rewards.sum(0)

    def discounted(self, gamma: float) -> np.ndarray:
        """(E,): the sums of gamma**t times the reward of step t."""
        return np.power(gamma, np.arange(len(self.rewards))) @ self.rewards


def rollout(
    env: BatchEnv,
    policy: Policy,
    steps: int,
    *,
    observations: np.ndarray | None = None,
    count: int | None = None,
    seed: int | None = None,
    deterministic: bool = False,
    states_at: Collection[int] = (),
) -> Rollout:
    """Follow a policy for some steps, from a reset or from where the environment stands.

    Args:
        env: the environment; it is left where the rollout ends.
        policy: chooses actions for the whole batch; ``episode_start`` tells it that episodes begin.
        steps: T, at most; fewer when every episode has ended.
        observations: (E, O), where the environment stands now, to go on from there.
        count, seed: how many episodes to start and their seed, when no observations are given.
        deterministic: for the policy.
        states_at: the steps before which the states are saved, as far as the rollout comes.

    Raises:
        ValueError: neither observations nor count and seed, or both; a policy with another action space.
    """
    if (observations is None) == (count is None or seed is None):
        raise ValueError("give either observations, to go on, or both count and seed, to start")
    if observations is None:
        assert count is not None
        assert seed is not None
        observations = env.reset(count, seed)
    check_policy(policy, env)
    state: Any = None
    start = np.ones(env.count, bool)
    wanted = frozenset(states_at)
    expected = (env.count, *env.action_space.shape)
    record = _Record(env, observations, steps)
    for step in range(steps):
        if record.over:
            break
        if step in wanted:
            record.states[step] = env.save_states()
        actions, state = policy.predict(record.observations[step], state, start, deterministic)
        if np.shape(actions) != expected:
            raise ValueError(
                f"the policy gives actions of shape {np.shape(actions)} and the environment takes {expected}: "
                "it belongs to another action space"
            )
        start = np.zeros(env.count, bool)
        record.apply(step, actions)
    return record.finish()


def play(env: BatchEnv, actions: np.ndarray, *, observations: np.ndarray) -> Rollout:
    """Apply fixed segments of actions (E, H, A) from where the environment stands, at observations (E, O)."""
    actions = np.asarray(actions)
    if actions.ndim != 3 or len(actions) != env.count or actions.shape[2:] != env.action_space.shape:
        raise ValueError(
            f"actions must have shape (E, H, A) = ({env.count}, H, {env.action_space.shape[0]}): got {actions.shape}"
        )
    record = _Record(env, observations, actions.shape[1])
    for step in range(actions.shape[1]):
        if record.over:
            break
        record.apply(step, actions[:, step])
    return record.finish()


def episode_returns(
    env: BatchEnv | str | Callable[[], gymnasium.Env],
    policy: Policy,
    episodes: int,
    seed: int | Sequence[int],
    *,
    deterministic: bool = True,
    batch: int = 32,
) -> np.ndarray:
    """Measure the undiscounted returns of whole episodes.

    Args:
        env: a batch environment, a gymnasium id, or a function that makes a gymnasium environment.
        policy: the policy; the same ``seed`` gives every policy the same starts.
        episodes: E.
        seed: of the starts; or of a gymnasium environment one for each episode, (E,).
        deterministic: for the policy.
        batch: how many episodes run together, at most.

    Returns:
        (E,) float64.

    Raises:
        ValueError: fewer than one episode, an environment without a time limit, a policy with other spaces.
    """
    check_whole("episodes", episodes, 1)
    own_env = isinstance(env, str) or not hasattr(env, "restore_states")
    made = VectorEnv(env, min(batch, episodes)) if own_env else None  # type: ignore[arg-type]
    vector: BatchEnv = made if made is not None else env  # type: ignore[assignment]
    if isinstance(seed, int | np.integer):
        seeds = episode_seeds(int(seed), episodes)
    elif isinstance(vector, VectorEnv) and len(seed) == episodes:
        seeds = [int(own) for own in seed]
    else:
        raise ValueError(f"seed holds {len(seed)} numbers: give one, or {episodes} for a gymnasium environment")
    if vector.horizon is None:
        raise ValueError("the environment has no time limit: episodes might never end, wrap it in TimeLimit")
    try:
        check_policy(policy, vector)
        parts = []
        for first in range(0, episodes, batch):
            own = seeds[first : first + batch]
            start = vector.reset(len(own), own) if isinstance(vector, VectorEnv) else vector.reset(len(own), own[0])
            parts.append(_returns(vector, policy, start, deterministic))
        return np.concatenate(parts)
    finally:
        if made is not None:
            made.close()


def _returns(env: BatchEnv, policy: Policy, observations: np.ndarray, deterministic: bool) -> np.ndarray:
    assert env.horizon is not None
    total = np.zeros(env.count)
    state: Any = None
    start = np.ones(env.count, bool)
    for _ in range(env.horizon):
        actions, state = policy.predict(observations, state, start, deterministic)
        start = np.zeros(env.count, bool)
        observations, rewards, done = env.step(actions)
        total += rewards
        if done.all():
            break
    return total


class _Record:
    """Arrays that fill as the steps go by."""

    def __init__(self, env: BatchEnv, observations: np.ndarray, steps: int) -> None:
        check_whole("steps", steps, 1)
        expected = (env.count, *env.observation_space.shape)
        if np.shape(observations) != expected:
            raise ValueError(f"observations must have shape {expected}: got {np.shape(observations)}")
        self.env = env
        self.taken = 0
        self.states: dict[int, Any] = {}
        self.done = env.done
        self.observations = np.empty((steps + 1, *np.shape(observations)), np.asarray(observations).dtype)
        self.observations[0] = observations
        self.actions = np.zeros((steps, env.count, *env.action_space.shape), env.action_space.dtype)
        self.rewards = np.zeros((steps, env.count))
        self.alive = np.zeros((steps, env.count), bool)

    @property
    def over(self) -> bool:
        return bool(self.done.all())

    def apply(self, step: int, actions: np.ndarray) -> None:
        self.alive[step] = ~self.done
        self.actions[step] = np.clip(actions, self.env.action_space.low, self.env.action_space.high)
        self.observations[step + 1], self.rewards[step], self.done = self.env.step(self.actions[step])
        self.taken = step + 1

    def finish(self) -> Rollout:
        taken = self.taken
        return Rollout(
            observations=self.observations[:taken],
            actions=self.actions[:taken],
            rewards=self.rewards[:taken],
            alive=self.alive[:taken],
            done=self.done,
            last=self.observations[taken],
            states=self.states,
        )
