"""Gymnasium environments whose exact state can be saved and restored.

A deep copy of a MuJoCo or Box2D environment silently restarts it. Here each kind of simulator is saved by what
its next step reads, as plain arrays:

- MuJoCo: the integration state of ``mj_getState`` (positions, velocities, activations, controls, time, warm start of
  the constraint solver), and the body positions of the last forward pass, which lie one substep behind and which the
  rewards of Ant and Humanoid read before the step.
- Pendulum, MountainCarContinuous: ``env.unwrapped.state``.
- Box2D (BipedalWalker, LunarLander): the solver keeps contact impulses that cannot be read, so the state is the random
  generator before the reset and the actions since, which are played again.

The step counter of the time limit and the last observation belong to every state. No step of the supported classic and
MuJoCo environments draws random numbers, so their generators are not part of it; LunarLander draws in each step, which
the replay repeats.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import gymnasium
import numpy as np
from gymnasium import wrappers
from gymnasium.utils import seeding

from pfm.errors import PfmError

__all__ = [
    "State",
    "StateMismatchError",
    "StatefulEnv",
    "UnsupportedEnvironmentError",
    "make_env",
    "stack_states",
    "unstack_states",
]

State = Mapping[str, np.ndarray]
"""A saved state: named arrays without objects, fit for ``np.savez``."""

STATELESS = (
    wrappers.ClipAction,
    wrappers.ClipReward,
    wrappers.DtypeObservation,
    wrappers.FlattenObservation,
    wrappers.OrderEnforcing,
    wrappers.PassiveEnvChecker,
    wrappers.RescaleAction,
    wrappers.RescaleObservation,
    wrappers.ReshapeObservation,
    wrappers.TimeLimit,  # its counter is saved
)


class UnsupportedEnvironmentError(PfmError, TypeError):
    """Raised when the state of an environment cannot be saved exactly."""


class StateMismatchError(PfmError, ValueError):
    """Raised when a saved state does not belong to the environment, or its replay gave another result."""


def make_env(name: str, **settings: Any) -> StatefulEnv:
    """Make a gymnasium environment with exact :meth:`~StatefulEnv.save_state` and :meth:`~StatefulEnv.restore_state`.

    Args:
        name: the gymnasium id, such as ``Reacher-v5``.
        settings: for ``gymnasium.make``, such as ``render_mode="rgb_array"``.

    Raises:
        UnsupportedEnvironmentError: the environment cannot be restored exactly.
        ImportError: the simulator is not installed.
        gymnasium.error.Error: there is no environment of this name.
    """
    spec = copy.copy(gymnasium.spec(name))
    spec.order_enforce = False  # StatefulEnv checks for the reset itself
    try:
        env = gymnasium.make(spec, **{"disable_env_checker": True, **settings})
    except gymnasium.error.DependencyNotInstalled as error:
        raise ImportError(f'{name} needs a simulator: pip install "preference-flow[pbrl]" ({error})') from error
    stateful = StatefulEnv(env)
    if not stateful.can_restore:
        raise UnsupportedEnvironmentError(stateful.reason)
    return stateful


class StatefulEnv(gymnasium.Wrapper):
    """Wraps a gymnasium environment so that its exact state can be saved and restored.

    Wrappers that keep a state of their own go outside of this one; those that map actions or observations alone, such
    as RescaleAction, may be within. Actions that reach the simulator of a replayed (Box2D) environment are cast to the
    type of its action space first, so that a replay does the very same arithmetic.

    Attributes:
        can_restore: whether the state can be saved.
        reason: why it cannot, with the way out; empty if it can.
        done: whether the episode has ended, by termination or by the time limit.
        terminated: whether it has ended by termination: nothing more is to be earned. A state that is restored after
            the end counts as terminated if its time was not up.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.done = True
        self.terminated = False
        self._observation: Any = None
        self._limit: wrappers.TimeLimit | None = None
        self._simulator: _Classic | _Mujoco | _Box2d | None = None
        self._recorder: _Box2d | None = None
        self.reason = ""
        # what a time limit that is the only other wrapper limits: it is stepped without that wrapper, and counted here
        self._limited = env.env if type(env) is wrappers.TimeLimit else None
        layer = env
        self._observers: list[Any] = []
        while isinstance(layer, gymnasium.Wrapper):
            if not isinstance(layer, (*STATELESS, StatefulEnv)):
                name = type(layer).__name__
                within = ", ".join(kind.__name__ for kind in STATELESS)
                self.reason = (
                    f"{name} may keep a state of its own, which is not saved: put it outside, "
                    f"{name}(StatefulEnv(env)), or leave it out; within may be {within}"
                )
                return
            if isinstance(layer, wrappers.TimeLimit):
                self._limit = layer
            if isinstance(layer, gymnasium.ObservationWrapper):
                self._observers.insert(0, layer)
            layer = layer.env
        simulator = _simulator_of(layer)
        if simulator is None:
            self.reason = (
                f"the state of {type(layer).__module__}.{type(layer).__name__} cannot be saved exactly: "
                "use Pendulum, MountainCarContinuous, a MuJoCo environment of gymnasium, BipedalWalker or LunarLander"
            )
        self._simulator = simulator
        self._recorder = simulator if isinstance(simulator, _Box2d) else None

    @property
    def can_restore(self) -> bool:
        """Return whether states can be saved and restored exactly."""
        return self._simulator is not None

    @property
    def observation(self) -> Any:
        """The observation of the last reset, step or restored state; None before."""
        return self._observation

    @property
    def elapsed(self) -> int:
        """The steps since the reset, as the time limit counts them; 0 without a limit."""
        return 0 if self._limit is None else self._limit._elapsed_steps or 0

    @property
    def horizon(self) -> int | None:
        """The steps after which the time limit ends an episode; None without a limit."""
        return None if self._limit is None else self._limit._max_episode_steps

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; see :meth:`gymnasium.Env.reset`."""
        if self._recorder is not None:
            self._recorder.before_reset(seed, options)
            seed = None
        self._observation, info = self.env.reset(seed=seed, options=options)
        if self._recorder is not None:
            self._recorder.resetting = False
        self.done = self.terminated = False
        return self._observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Execute an action; see :meth:`gymnasium.Env.step`."""
        if self._observation is None:
            raise gymnasium.error.ResetNeeded("call reset() before the first step")
        if self._limited is None:
            self._observation, reward, self.terminated, truncated, info = self.env.step(action)
        else:
            self._observation, reward, self.terminated, truncated, info = self._limited.step(action)
            limit: Any = self._limit
            limit._elapsed_steps = elapsed = limit._elapsed_steps + 1
            if elapsed >= limit._max_episode_steps:
                truncated = True
        self.done = self.terminated or truncated
        return self._observation, reward, self.terminated, truncated, info

    def restart_clock(self) -> None:
        """Count steps from 0 again, so that the time limit is as far away as after a reset; nothing else changes."""
        if self._limit is not None:
            self._limit._elapsed_steps = 0

    def save_state(self) -> dict[str, np.ndarray]:
        """Copy the exact state into named arrays.

        Returns:
            ``elapsed`` () int64, ``done`` () bool, the last observation, and what the simulator's next step reads.

        Raises:
            UnsupportedEnvironmentError: the environment has no exact state.
            RuntimeError: the environment was never reset.
        """
        simulator = self._checked()
        if self._observation is None:
            raise RuntimeError("there is no state to save: call reset() first")
        return {
            **simulator.save(),
            **_observed(self._observation),
            "elapsed": np.array(self.elapsed, np.int64),
            "done": np.array(self.done),
        }

    def restore_state(self, state: State) -> Any:
        """Put the environment back into a saved state and give the observation of that moment.

        Args:
            state: from :meth:`save_state` of an environment with the same name and settings.

        Raises:
            UnsupportedEnvironmentError: the environment has no exact state.
            StateMismatchError: the state is of another environment.
        """
        simulator = self._checked()
        expected = simulator.keys | {"elapsed", "done"}
        if missing := sorted(expected - state.keys()):
            raise StateMismatchError(
                f"state lacks {', '.join(missing)} and holds {', '.join(sorted(state))}: it is of another environment"
            )
        if self._observation is None:  # gives the observation its kind, and the simulator its parts
            self.reset(seed=0)
        simulator.restore(state, self._observation)
        if isinstance(simulator, _Box2d):
            replayed = simulator.observation
            if simulator.replayed:
                for layer in self._observers:
                    replayed = layer.observation(replayed)
            for key, saved in _saved_observation(state).items():
                if not np.array_equal(saved, _observed(replayed)[key], equal_nan=True):
                    raise StateMismatchError(
                        f"the replay of {len(state['actions'])} actions ends in another {key} than the saved one: "
                        "the state comes from an environment with other settings, or another version of the simulator"
                    )
            self._observation = replayed
        else:
            self._observation = _restored(state, self._observation)
        if self._limit is not None:
            self._limit._elapsed_steps = int(state["elapsed"])
        self.done = bool(state["done"])
        self.terminated = self.done and (self.horizon is None or self.elapsed < self.horizon)
        return self._observation

    def _checked(self) -> _Classic | _Mujoco | _Box2d:
        if self._simulator is None:
            raise UnsupportedEnvironmentError(self.reason)
        return self._simulator


def stack_states(states: Sequence[State]) -> dict[str, np.ndarray]:
    """Put many states into one set of arrays, to be stored together.

    Arrays of equal shapes are stacked, (N, ...). Arrays whose first axis differs, such as the actions of replayed
    environments, are joined along it, and ``<name>.lengths`` (N,) keeps where each one ends.

    Raises:
        ValueError: there are no states, or they have different names.
    """
    if not states:
        raise ValueError("states is empty: at least one is needed")
    names = states[0].keys()
    for row, state in enumerate(states):
        if state.keys() != names:
            raise ValueError(
                f"states[{row}] holds {sorted(state)} and states[0] {sorted(names)}: "
                "stack the states of one environment"
            )
    stacked: dict[str, np.ndarray] = {}
    for name in names:
        arrays = [state[name] for state in states]
        if name == "actions":
            stacked[name] = np.concatenate(arrays)
            stacked[f"{name}.lengths"] = np.array([len(array) for array in arrays], np.int64)
        else:
            stacked[name] = np.stack(arrays)
    return stacked


def unstack_states(stacked: State) -> list[dict[str, np.ndarray]]:
    """Undo :func:`stack_states`."""
    columns: dict[str, Sequence[np.ndarray]] = {}
    for name, array in stacked.items():
        if name.endswith(".lengths"):
            continue
        lengths = stacked.get(f"{name}.lengths")
        columns[name] = list(array) if lengths is None else np.split(array, np.cumsum(lengths)[:-1])
    return [
        {name: np.asarray(row) for name, row in zip(columns, rows, strict=True)}
        for rows in zip(*columns.values(), strict=True)
    ]


class _Classic:
    """Pendulum and MountainCarContinuous: the state is one array."""

    keys = frozenset({"state"})

    def __init__(self, env: Any) -> None:
        self.env = env

    def save(self) -> dict[str, np.ndarray]:
        return {"state": np.array(self.env.state)}

    def restore(self, state: State, observation: Any) -> None:
        _check_shape("state", state["state"], np.shape(self.env.state))
        self.env.state = np.array(state["state"])


class _Mujoco:
    """MuJoCo: the integration state, the goal if there is one apart, and the positions that rewards read late."""

    def __init__(self, env: Any) -> None:
        mujoco: Any = import_module("mujoco")

        self.env = env
        self.mujoco = mujoco
        self.signature = int(mujoco.mjtState.mjSTATE_INTEGRATION)
        self.size = mujoco.mj_stateSize(env.model, self.signature)

    @property
    def keys(self) -> frozenset[str]:
        goal = {"goal"} if _has_goal(self.env) else set()
        return frozenset({"integration", "xpos", "xipos"} | goal)

    def save(self) -> dict[str, np.ndarray]:
        data = self.env.data
        integration = np.empty(self.size)
        self.mujoco.mj_getState(self.env.model, data, integration, self.signature)
        saved = {"integration": integration, "xpos": data.xpos.copy(), "xipos": data.xipos.copy()}
        if _has_goal(self.env):
            saved["goal"] = np.array(self.env.goal)
        return saved

    def restore(self, state: State, observation: Any) -> None:
        model, data = self.env.model, self.env.data
        for key, shape in (("integration", (self.size,)), ("xpos", data.xpos.shape), ("xipos", data.xipos.shape)):
            _check_shape(key, state[key], shape)
        self.mujoco.mj_setState(model, data, np.asarray(state["integration"], np.float64), self.signature)
        self.mujoco.mj_kinematics(model, data)  # what is rendered stands where the state says
        self.mujoco.mj_camlight(model, data)
        data.xpos[:] = state["xpos"]
        data.xipos[:] = state["xipos"]
        if _has_goal(self.env):
            self.env.goal = np.array(state["goal"])


class _Box2d:
    """Box2D: the random generator before the reset and the actions since."""

    keys = frozenset({"generator", "actions"})

    def __init__(self, env: Any) -> None:
        self.env = env
        self.type = env.action_space.dtype
        self.generator = np.zeros(0, np.uint64)
        self.actions: list[np.ndarray] = []
        self.observation: Any = None
        self.replayed = False
        # What is recorded is what reaches the simulator, behind all wrappers of actions; but a reset steps by itself.
        self.resetting = False
        self._earlier = vars(env).get("step")  # of another StatefulEnv around the same simulator
        env.step = lambda action: self._step(action if self.resetting else self.record(action))

    def before_reset(self, seed: int | None, options: Any) -> None:
        if options:
            raise ValueError(f"options of reset are not part of the state: got {options!r}; leave them out")
        if seed is not None:
            self.env._np_random, self.env._np_random_seed = seeding.np_random(seed)
        self.generator = _pack(self.env.np_random)
        self._clear()
        self.actions = []
        self.resetting = True

    def _step(self, action: Any) -> Any:
        return type(self.env).step(self.env, action) if self._earlier is None else self._earlier(action)

    def record(self, action: Any) -> np.ndarray:
        action = np.array(action, self.type)
        self.actions.append(action)
        return action

    def save(self) -> dict[str, np.ndarray]:
        shape = (len(self.actions), *self.env.action_space.shape)
        return {
            "generator": self.generator.copy(),
            "actions": np.array(self.actions, self.type).reshape(shape),
        }

    def restore(self, state: State, observation: Any) -> None:
        generator, actions = state["generator"], state["actions"]
        _check_shape("generator", generator, (6,))
        _check_shape("actions", actions, (len(actions), *self.env.action_space.shape))
        done = len(self.actions)
        # what the two have in common need not be played again
        same = (
            np.array_equal(generator, self.generator)
            and 0 < done <= len(actions)
            and np.array_equal(np.array(self.actions), actions[:done])
        )
        if same:
            self.observation = observation
        else:
            _unpack(self.env.np_random, generator)
            self.generator = np.array(generator)
            self._clear()
            self.actions = []
            self.resetting = True
            self.observation, _ = self.env.reset()
            self.resetting = False
        missing, step = list(np.array(actions[len(self.actions) :], self.type)), self._step
        for action in missing:
            self.observation = step(action)[0]
        self.replayed = bool(missing) or not same
        self.actions += missing

    def _clear(self) -> None:
        """Start from an empty world: one that was used orders its contacts otherwise."""
        if type(self.env).__name__ == "BipedalWalker":  # LunarLander does so itself
            import Box2D

            self.env._destroy()
            self.env.world = Box2D.b2World()


def _simulator_of(env: Any) -> _Classic | _Mujoco | _Box2d | None:
    """Find the way to save an unwrapped environment by its class, importing no simulator that it does not use."""
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(env).__mro__}
    if kinds & {
        "gymnasium.envs.classic_control.pendulum.PendulumEnv",
        "gymnasium.envs.classic_control.continuous_mountain_car.Continuous_MountainCarEnv",
    }:
        return _Classic(env)
    if "gymnasium.envs.mujoco.mujoco_env.MujocoEnv" in kinds:
        return _Mujoco(env)
    if kinds & {
        "gymnasium.envs.box2d.bipedal_walker.BipedalWalker",
        "gymnasium.envs.box2d.lunar_lander.LunarLander",
    }:
        return _Box2d(env)
    return None


def _has_goal(env: Any) -> bool:
    return isinstance(getattr(env, "goal", None), np.ndarray)


def _check_shape(name: str, array: np.ndarray, expected: tuple[int, ...]) -> None:
    if np.shape(array) != expected:
        raise StateMismatchError(
            f"{name} of the state has shape {np.shape(array)}, and this environment needs {expected}: "
            "restore the state in an environment with the same name and settings"
        )


def _observed(observation: Any) -> dict[str, np.ndarray]:
    """Name the arrays of an observation, an array or (of goal environments) a dict of arrays."""
    if isinstance(observation, Mapping):
        return {f"observation.{key}": np.array(value) for key, value in observation.items()}
    return {"observation": np.array(observation)}


def _saved_observation(state: State) -> dict[str, np.ndarray]:
    return {key: value for key, value in state.items() if key.partition(".")[0] == "observation"}


def _restored(state: State, like: Any) -> Any:
    saved = _saved_observation(state)
    if isinstance(like, Mapping):
        return {key.removeprefix("observation."): np.array(value) for key, value in saved.items()}
    return np.array(saved["observation"])


WORD = (1 << 64) - 1


def _pack(generator: np.random.Generator) -> np.ndarray:
    """Write the state of a PCG64 generator as (6,) uint64: state and increment in halves, and the spare 32 bits."""
    whole: Any = generator.bit_generator.state
    state, increment = whole["state"]["state"], whole["state"]["inc"]
    words = [state >> 64, state & WORD, increment >> 64, increment & WORD, whole["has_uint32"], whole["uinteger"]]
    return np.array(words, np.uint64)


def _unpack(generator: np.random.Generator, words: np.ndarray) -> None:
    high, low, increment_high, increment_low, spare, value = (int(word) for word in words)
    generator.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": high << 64 | low, "inc": increment_high << 64 | increment_low},
        "has_uint32": spare,
        "uinteger": value,
    }
