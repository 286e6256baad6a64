"""Frozen policies: pretrained actors, stable-baselines3 checkpoints, added noise.

A policy is whatever has stable-baselines3's ``predict``; nothing here trains one by reinforcement.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from gymnasium.spaces import Box

from pfm._internal.checks import check_choice, check_number
from pfm.pbrl.cloning import ClonedPolicy
from pfm.pbrl.environments import make_env
from pfm.pbrl.finite import all_finite
from pfm.pbrl.normalization import (
    NormalizedPolicy,
    ObservationStatistics,
    beside_checkpoint,
    trained_normalized,
)

__all__ = [
    "ActorPolicy",
    "ClonedPolicy",
    "NoisyPolicy",
    "NormalizedPolicy",
    "ObservationStatistics",
    "Policy",
    "check_policy",
    "load_policy",
    "seed_policy",
]

EXPLORATION = 1e-6  # what generalised state-dependent exploration adds to its variance


@runtime_checkable
class Policy(Protocol):
    """Chooses actions as stable-baselines3's models do.

    ``predict`` takes one observation (O,) or a batch (E, O), the state it returned before (None at first), for each
    episode whether it begins now (E,), and whether to take the mode of its distribution in place of a draw. It gives
    the actions (A,) or (E, A), and its new state, None if it keeps none.
    """

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Choose actions for observations; return them and the new state."""
        ...


def load_policy(path: str | Path, *, action_space: Box | None = None, seed: int = 0, normalize: Any = None) -> Policy:
    """Load a frozen policy.

    Args:
        path: ``.npz``: an actor's layers, see :class:`ActorPolicy`; ``.zip``: a checkpoint of stable-baselines3, which
            is unpickled, so it must come from where you trust code; ``.safetensors``: a :class:`ClonedPolicy`.
        action_space: of an actor; None for that of the environment it was trained in.
        seed: of an actor's stochastic actions.
        normalize: the statistics of the observations that a checkpoint was trained on under ``VecNormalize``: its
            ``vec_normalize.pkl``, of which no code is run, the wrapper itself, or mean and variance, see
            :meth:`ObservationStatistics.of`. False: it reads raw observations.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no policy, or the statistics are of other observations.

    Warns:
        UserWarning: a checkpoint shows that it was trained on normalised observations, and no statistics are given.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no policy at {path}")
    policy = _loaded(path, action_space, seed, warn=normalize is None)
    if normalize is None or normalize is False:
        return policy
    statistics = ObservationStatistics.of(normalize)
    return policy if statistics is None else NormalizedPolicy(policy, statistics)


def _loaded(path: Path, action_space: Box | None, seed: int, *, warn: bool) -> Policy:
    if path.suffix == ".npz":
        return ActorPolicy.load(path, action_space=action_space, seed=seed)
    if path.suffix == ".zip":
        return _load_checkpoint(path, warn=warn)
    if path.suffix == ".safetensors":
        policy = ClonedPolicy.load(path)
        policy.seed(seed)
        return policy
    raise ValueError(f"{path.name} must end in .npz, .zip or .safetensors to be a policy")


def check_policy(policy: Any, env: Any) -> None:
    """Check that a policy acts in an environment's spaces, as far as it names its own.

    Args:
        policy: the policy.
        env: anything with ``action_space`` and ``observation_space``.

    Raises:
        TypeError: it has no ``predict``.
        ValueError: another action or observation space.
    """
    if not callable(getattr(policy, "predict", None)):
        raise TypeError(f"a policy needs predict(observation, ...): got {type(policy).__name__}")
    theirs, ours = getattr(policy, "action_space", None), env.action_space
    if theirs is not None:
        same = (
            isinstance(theirs, Box)
            and isinstance(ours, Box)
            and theirs.shape == ours.shape
            and np.allclose(theirs.low, ours.low)
            and np.allclose(theirs.high, ours.high)
        )
        if not same:
            way = "take one made for it"
            if isinstance(theirs, Box) and theirs.shape == ours.shape:
                way = (
                    "if it was trained behind a wrapper such as RescaleAction, give the environment with it, as a "
                    "callable that makes it: lambda: RescaleAction(gymnasium.make(...), -1, 1)"
                )
            raise ValueError(f"the policy acts in {theirs} and the environment takes {ours}: {way}")
    if not isinstance(policy, NormalizedPolicy) and trained_normalized(policy):
        warnings.warn(
            f"this {type(policy).__name__} was trained under VecNormalize, and acts wrongly on observations as they "
            "are: give NormalizedPolicy(policy, statistics), as load_policy(..., normalize=...) does",
            stacklevel=3,
        )
    theirs, ours = getattr(policy, "observation_space", None), env.observation_space
    if theirs is not None and theirs.shape != ours.shape:
        raise ValueError(f"the policy reads {theirs.shape} numbers and the environment shows {ours.shape}")


def seed_policy(policy: Any, seed: int) -> None:
    """Reset the randomness of a policy: its own ``seed``, or (stable-baselines3) torch's global stream."""
    own = getattr(policy, "seed", None)
    if callable(own):
        own(seed)
        return
    import torch

    torch.manual_seed(seed)


class ActorPolicy:
    """The actor network of a pretrained agent, in numpy.

    The file holds layers ``W0``, ``b0``, ... and optionally the statistics of normalised observations (``obs_mean``,
    ``obs_var``, ``clip_obs``, ``norm_eps``) and ``log_std`` or ``logstd_W``, ``logstd_b`` of a stochastic actor; its
    ``meta`` is JSON: ``algo``, ``env``, ``hidden_activation`` (tanh or relu), ``output``, ``time_feature``. Outputs:
    ``clip`` clips to the bounds; ``tanh`` maps tanh of the output onto them; ``hardtanh2_tanh`` clips to [-2, 2]
    before that. A time feature appends 1 - t/1000 to the observation, t the steps since the episode began.

    Attributes:
        algorithm: what trained it.
        env_name: the version of its environment in which it can run today.
        stochastic: whether it has a distribution to draw from; otherwise it acts the same whatever ``deterministic``
            says.
        action_space: the bounds of its actions.
    """

    def __init__(
        self, arrays: dict[str, np.ndarray], meta: dict[str, Any], *, action_space: Box | None = None, seed: int = 0
    ) -> None:
        self.algorithm = str(meta["algo"])
        self.env_name = _runnable(meta["env"])
        self.meta = meta
        self.action_space: Box = make_env(self.env_name).action_space if action_space is None else action_space  # type: ignore[assignment]
        self._layers = []
        while f"W{len(self._layers)}" in arrays:
            index = len(self._layers)
            self._layers.append((np.float32(arrays[f"W{index}"]).T.copy(), np.float32(arrays[f"b{index}"])))
        self._activation = _choose("hidden_activation", meta["hidden_activation"], {"tanh": np.tanh, "relu": _relu})
        self._output = _choose("output", meta["output"], {"clip": "clip", "tanh": "tanh", "hardtanh2_tanh": "hard"})
        self._statistics = None
        if "obs_mean" in arrays:
            scale = np.sqrt(arrays["obs_var"] + arrays["norm_eps"])
            self._statistics = arrays["obs_mean"], scale, float(arrays["clip_obs"])
        self._log_std = arrays.get("log_std")
        self._log_std_layer = (arrays["logstd_W"].T, arrays["logstd_b"]) if "logstd_W" in arrays else None
        self._timed = bool(meta.get("time_feature", False))
        actions = self._layers[-1][1].shape
        if actions != self.action_space.shape:
            raise ValueError(f"the actor gives {actions} numbers and the action space is {self.action_space}")
        self._noise = np.random.default_rng(seed)

    @classmethod
    def load(cls, path: str | Path, *, action_space: Box | None = None, seed: int = 0) -> ActorPolicy:
        """Read an actor; see :func:`load_policy`."""
        try:
            with np.load(Path(path).expanduser(), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            meta = json.loads(str(arrays.pop("meta")))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds no actor (arrays W0, b0, ... and meta as JSON): {error}") from error
        if "W0" not in arrays:
            raise ValueError(f"{path} holds {sorted(arrays)} and no layer W0, b0")
        return cls(arrays, meta, action_space=action_space, seed=seed)

    @property
    def stochastic(self) -> bool:
        """Return whether the policy draws its actions."""
        return self._log_std is not None or self._log_std_layer is not None

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Choose actions; see :class:`Policy`. Draws are independent from step to step."""
        observation = np.asarray(observation)
        rows = np.atleast_2d(observation)
        if not all_finite(rows):
            raise ValueError("observation holds NaN or infinity")
        if self._timed:
            steps = np.zeros(len(rows)) if state is None else state[0]
            if episode_start is not None:
                steps = np.where(episode_start, 0.0, steps)
            rows = np.column_stack([rows, 1.0 - steps / 1000.0])
            state = (steps + 1.0,)
        hidden = self._normalised(rows)
        for weight, bias in self._layers[:-1]:
            hidden = hidden @ weight
            hidden += bias
            self._activation(hidden, out=hidden)
        weight, bias = self._layers[-1]
        action = hidden @ weight
        action += bias
        if self._output == "hard":
            action = np.clip(action, -2.0, 2.0)
        if not deterministic and self.stochastic:
            action = action + self._std(hidden) * self._noise.standard_normal(action.shape)
        low, high = self.action_space.low, self.action_space.high
        if self._output != "clip":
            action = low + (np.tanh(action) + 1.0) / 2.0 * (high - low)
        action = np.minimum(np.maximum(action, low), high).astype(self.action_space.dtype, copy=False)
        return (action if observation.ndim == 2 else action[0]), state

    def seed(self, seed: int) -> None:
        """Reset the draws."""
        self._noise = np.random.default_rng(seed)

    def _std(self, hidden: np.ndarray) -> np.ndarray:
        if self._log_std_layer is not None:
            weight, bias = self._log_std_layer
            return np.exp(np.clip(hidden @ weight + bias, -20.0, 2.0))
        assert self._log_std is not None
        if self._log_std.ndim == 1:
            return np.exp(self._log_std)
        # generalised state-dependent exploration (Raffin et al., 2005.05719): the noise is a random map of the features
        return np.sqrt(np.square(hidden) @ np.exp(2.0 * self._log_std) + EXPLORATION)

    def _normalised(self, rows: np.ndarray) -> np.ndarray:
        expected = self._layers[0][0].shape[0]
        if self.meta["env"] == "Ant-v3" and rows.shape[1] < expected:
            # 84 contact forces at the end, which were 0 in Ant-v3 and which Ant-v4 leaves out
            rows = np.pad(rows, ((0, 0), (0, expected - rows.shape[1])))
        if rows.shape[1] != expected:
            raise ValueError(f"observation must have {expected} numbers: got {rows.shape[1]}; use {self.env_name}")
        if self._statistics is not None:
            mean, scale, clip = self._statistics
            rows = np.minimum(np.maximum((rows - mean) / scale, -clip), clip)
        return rows.astype(np.float32)


class NoisyPolicy:
    """Adds independent Gaussian noise to a policy's deterministic actions, and clips them to the bounds.

    Args:
        policy: the policy.
        sigma: standard deviation, in half ranges of each action (1 reaches from the middle to a bound).
        seed: of the noise.
        action_space: the bounds; None for the policy's own.
    """

    def __init__(self, policy: Policy, sigma: float, seed: int = 0, action_space: Box | None = None) -> None:
        space = action_space if action_space is not None else getattr(policy, "action_space", None)
        if not isinstance(space, Box) or not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
            raise ValueError(f"action_space must be a box with finite bounds: got {space}")
        sigma = check_number("sigma", sigma, least=0)
        self.policy = policy
        self.sigma = sigma
        self.action_space = space
        self._noise = np.random.default_rng(seed)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Choose actions; see :class:`Policy`. Without noise when deterministic."""
        action, state = self.policy.predict(observation, state, episode_start, deterministic=True)
        if deterministic:
            return action, state
        half = (self.action_space.high - self.action_space.low) / 2.0
        noisy = action + self.sigma * half * self._noise.standard_normal(np.shape(action))
        return np.clip(noisy, self.action_space.low, self.action_space.high).astype(self.action_space.dtype), state

    def seed(self, seed: int) -> None:
        """Reset the noise, and that of the wrapped policy."""
        self._noise = np.random.default_rng(seed)
        seed_policy(self.policy, seed)


def _runnable(name: str) -> str:
    """Name the version in which an actor of an older one still runs and its returns were measured again."""
    task, _, version = name.rpartition("-")
    if task == "LunarLanderContinuous":
        return "LunarLanderContinuous-v3"
    if version in ("v2", "v3") and task in ("Ant", "HalfCheetah", "Hopper", "Humanoid", "Swimmer", "Walker2d"):
        return f"{task}-v4"
    return name


def _choose(name: str, value: Any, known: dict[str, Any]) -> Any:
    check_choice(f"{name} of the actor", value, known)
    return known[value]


def _relu(array: np.ndarray, out: np.ndarray) -> np.ndarray:
    return np.maximum(array, 0, out=out)


def _load_checkpoint(path: Path, *, warn: bool) -> Policy:
    """Find the algorithm of a checkpoint by the settings that only it has, and load it for prediction."""
    try:
        import stable_baselines3
    except ImportError as error:  # pragma: no cover - the extra is installed where tests run
        raise ImportError(f'{path.name} needs stable-baselines3: pip install "preference-flow[pbrl]"') from error
    try:
        with zipfile.ZipFile(path) as file:
            settings = json.loads(file.read("data"))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint of stable-baselines3: {error}") from error
    marks = {"target_entropy": "SAC", "target_policy_noise": "TD3", "clip_range": "PPO", "gae_lambda": "A2C"}
    algorithm = next((name for mark, name in marks.items() if mark in settings), None)
    module = str(settings.get("policy_class", {}).get("__module__", ""))
    if algorithm is None or not module.startswith("stable_baselines3."):
        raise ValueError(
            f"{path.name} is of no algorithm for continuous actions that is known here ({', '.join(marks.values())}): "
            "load it yourself, any object with predict is a policy"
        )
    unneeded = {"learning_rate": 0.0, "lr_schedule": _constant, "clip_range": _constant, "buffer_size": 1}
    kept = {name: value for name, value in unneeded.items() if name in settings}
    policy = getattr(stable_baselines3, algorithm).load(path, device="cpu", custom_objects=kept)
    if warn:
        _warn_of_normalization(path, policy)
    return policy


def _warn_of_normalization(path: Path, policy: Any) -> None:
    shows = trained_normalized(policy)
    found = None if shows is False else beside_checkpoint(path)
    if found is None and shows:
        found = "its last observations of the training are normalised"
    if found:
        warnings.warn(
            f"{path.name} was trained under VecNormalize ({found}), and acts wrongly on raw observations: pass "
            "its statistics, load_policy(..., normalize='vec_normalize.pkl'), or normalize=False if it needs none",
            stacklevel=4,
        )


def _constant(_: float) -> float:
    return 0.0
