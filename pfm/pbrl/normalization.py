"""Statistics by which a policy normalises observations: stable-baselines3's VecNormalize, read without its code.

A checkpoint of stable-baselines3 holds the network and not the running mean and variance of the observations that it
was trained on; ``VecNormalize.save`` keeps them in a pickle of its own. Without them the policy acts on numbers of
another scale, and nothing fails.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.spaces import Box

from pfm.pbrl.finite import all_finite

__all__ = ["NormalizedPolicy", "ObservationStatistics", "beside_checkpoint", "trained_normalized"]

CLIP, EPSILON = 10.0, 1e-8  # VecNormalize's own
TOLERANCE = 1e-4  # beyond the bounds of an observation, for rounding
# What a pickle of VecNormalize is made of besides plain values. Only numpy's own are looked up; the others become
# stand-ins that keep what was stored and run nothing.
_NUMPY = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
}
_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
_NUMPY_NAMES = ("_reconstruct", "scalar", "_frombuffer")
_STAND_INS = re.compile(
    r"stable_baselines3\.common\.(vec_env\.vec_normalize\.VecNormalize|running_mean_std\.RunningMeanStd)|"
    r"(gymnasium|gym)\.spaces\.\w+\.\w+|"
    r"numpy\.random\.(_pickle\.(__generator_ctor|__bit_generator_ctor|__randomstate_ctor)|"
    r"_pcg64\.PCG64|_mt19937\.MT19937|bit_generator\.\w+)"
)


@dataclass(frozen=True)
class ObservationStatistics:
    """The running statistics of observations: what is shown to the policy is clip((y - mean) / sqrt(var + epsilon)).

    Attributes:
        mean, var: (O,) float64, the mean and the variance of each value; var is at least 0.
        clip: the largest absolute value after it.
        epsilon: added to the variance.

    Raises:
        ValueError: shapes disagree, or a value is not finite or negative where it must not be.
    """

    mean: np.ndarray
    var: np.ndarray
    clip: float = CLIP
    epsilon: float = EPSILON

    def __post_init__(self) -> None:
        for name in ("mean", "var"):
            try:
                object.__setattr__(self, name, np.array(getattr(self, name), np.float64))
            except (TypeError, ValueError):
                raise ValueError(f"{name} of the observations must hold numbers (O,)") from None
        if self.mean.shape != self.var.shape or self.mean.ndim != 1:
            raise ValueError(
                f"mean and var of the observations must be of one shape (O,): got {self.mean.shape} and "
                f"{self.var.shape}"
            )
        if not (all_finite(self.mean) and all_finite(self.var) and (self.var >= 0).all()):
            raise ValueError("mean and var of the observations must be finite, and var at least 0")
        if not (np.isfinite(self.epsilon) and self.epsilon >= 0 and self.clip > 0):
            raise ValueError(f"clip must be above 0 and epsilon at least 0: got {self.clip} and {self.epsilon}")

    def __call__(self, observation: Any) -> np.ndarray:
        """Normalise observations (O,) or (E, O) to float32, as VecNormalize does."""
        scaled = (np.asarray(observation) - self.mean) / np.sqrt(self.var + self.epsilon)
        return np.clip(scaled, -self.clip, self.clip).astype(np.float32)

    @classmethod
    def of(cls, source: Any) -> ObservationStatistics | None:
        """Read statistics.

        Args:
            source: a file of ``VecNormalize.save`` (``.pkl``), of which no code is run; an ``.npz`` with ``obs_mean``
                and ``obs_var``, and ``clip_obs`` and ``norm_eps`` if other than 10 and 1e-8; a ``VecNormalize``, or a
                model trained under one; a mapping with ``mean`` and ``var`` (and ``clip``, ``epsilon``); or the pair
                (mean, var).

        Returns:
            None where the source says that observations were not normalised.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no such statistics, or a pickle refers to something else than they need.
            TypeError: it is none of these.
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, str | Path):
            path = Path(source).expanduser()
            if not path.is_file():
                raise FileNotFoundError(f"there are no statistics of observations at {path}")
            if path.suffix == ".npz":
                return cls._of_arrays(path)
            return cls._of_wrapper(_unpickled(path), str(path))
        if isinstance(source, Mapping):
            unknown = sorted(set(map(str, source)) - {"mean", "var", "clip", "epsilon"})
            if unknown or not {"mean", "var"} <= source.keys():
                raise ValueError(
                    f"statistics of observations need mean and var, and may have clip and epsilon: got "
                    f"{', '.join(map(str, source))}"
                )
            return cls(**source)
        if isinstance(source, tuple | list) and len(source) == 2:
            return cls(*source)
        attached = getattr(source, "get_vec_normalize_env", None)  # of a model whose training had one
        source = (attached() or source) if callable(attached) else source
        while source is not None and not hasattr(source, "obs_rms") and hasattr(source, "venv"):
            source = getattr(source, "venv")  # noqa: B009  # a wrapper of vectors of environments, with VecNormalize within
        if hasattr(source, "norm_obs"):
            return cls._of_wrapper(source, type(source).__name__)
        raise TypeError(
            "statistics of observations must be a file of VecNormalize.save, a VecNormalize, a dict with mean and var, "
            f"or the pair (mean, var): got {type(source).__name__}"
        )

    @classmethod
    def _of_arrays(cls, path: Path) -> ObservationStatistics:
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            return cls(
                arrays["obs_mean"], arrays["obs_var"], float(arrays.get("clip_obs", CLIP)),
                float(arrays.get("norm_eps", EPSILON)),
            )  # fmt: skip
        except (OSError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds no obs_mean and obs_var: {error}") from error

    @classmethod
    def _of_wrapper(cls, wrapper: Any, name: str) -> ObservationStatistics | None:
        if not getattr(wrapper, "norm_obs", True):
            return None
        rms = getattr(wrapper, "obs_rms", None)
        if isinstance(rms, Mapping):
            raise ValueError(f"{name} normalises a dictionary of observations, and policies here read one array")
        if rms is None or not hasattr(rms, "mean") or not hasattr(rms, "var"):
            raise ValueError(f"{name} holds no statistics of observations (obs_rms with mean and var)")
        clip, epsilon = getattr(wrapper, "clip_obs", CLIP), getattr(wrapper, "epsilon", EPSILON)
        return cls(rms.mean, rms.var, float(clip), float(epsilon))


class NormalizedPolicy:
    """Shows a policy the observations that it was trained on: those of the environment, normalised.

    Args:
        policy: the policy, with stable-baselines3's ``predict``.
        statistics: of its observations, whatever :meth:`ObservationStatistics.of` reads.

    Raises:
        TypeError, ValueError, FileNotFoundError: the statistics cannot be read, are of no observations, or of other
            ones than the policy's.
    """

    def __init__(self, policy: Any, statistics: Any) -> None:
        found = ObservationStatistics.of(statistics)
        if found is None:
            raise ValueError("these statistics are of rewards alone: the policy reads raw observations")
        theirs = getattr(getattr(policy, "observation_space", None), "shape", None)
        if theirs is not None and tuple(theirs) != found.mean.shape:
            raise ValueError(
                f"the statistics are of {found.mean.shape} observed numbers and the policy reads {tuple(theirs)}: give "
                "those that were saved with it"
            )
        self.policy = policy
        self.statistics = found

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Choose actions; see :class:`pfm.pbrl.Policy`."""
        return self.policy.predict(self.statistics(observation), state, episode_start, deterministic)

    def seed(self, seed: int) -> None:
        """Reset the randomness of the policy."""
        from pfm.pbrl.policies import seed_policy

        seed_policy(self.policy, seed)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "policy" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.policy, name)


# -- what shows that statistics are needed ------------------------------------------------------------------------


def trained_normalized(model: Any) -> bool | None:
    """Return whether a model of stable-baselines3 was trained on normalised observations; None if nothing shows it.

    A checkpoint keeps the last observations of the training. VecNormalize hands out float32 where the environment has
    float64, and values beyond its bounds; and only where there is a VecNormalize does training on policy keep the
    original observations beside them.
    """
    wrapper = getattr(model, "_vec_normalize_env", None)
    if wrapper is not None:
        return bool(getattr(wrapper, "norm_obs", True))
    last, original = getattr(model, "_last_obs", None), getattr(model, "_last_original_obs", None)
    space = getattr(model, "observation_space", None)
    if not isinstance(last, np.ndarray) or not isinstance(space, Box) or last.shape[1:] != space.shape:
        return None
    if space.dtype == np.float64:
        return last.dtype == np.float32
    if ((last < space.low - TOLERANCE) | (last > space.high + TOLERANCE)).any():
        return True
    if not isinstance(original, np.ndarray):
        return None
    if original.shape == last.shape and np.array_equal(original, last):
        return False
    return True if hasattr(model, "gae_lambda") else None  # PPO and A2C; off policy it is the one before


def beside_checkpoint(path: Path) -> str | None:
    """Describe what beside a checkpoint shows that it needs statistics; None if nothing, "" for rewards alone.

    Looked at are pickles named like VecNormalize's, as callbacks, the zoo and hub repositories name them, and the
    ``config.yml`` of the zoo, in the folder of the checkpoint and in those right below.
    """
    folders = [path.parent, path.parent / path.stem]
    folders += sorted(folder for folder in path.parent.iterdir() if folder.is_dir() and folder not in folders)
    number = re.search(r"_(\d+)_steps$", path.stem)
    for folder in folders:
        found = sorted(folder.glob("*[nN]ormalize*.pkl")) if folder.is_dir() else []
        same = [file for file in found if number is not None and f"_{number[1]}_steps" in file.name]
        for file in (same or found)[:1]:
            return f"{file} lies beside it" if _is_needed(file) else ""
    for folder in folders:
        config = folder / "config.yml"
        if config.is_file() and _normalizes(config.read_text(encoding="utf-8", errors="replace")):
            return f"{config} says normalize"
    return None


def _is_needed(file: Path) -> bool:
    try:
        return ObservationStatistics.of(file) is not None
    except ValueError:
        return True  # what it needs is not known, which is no reason to be silent


def _normalizes(config: str) -> bool:
    """Read the setting ``normalize`` of the zoo: true, or arguments of VecNormalize as a dict or its text."""
    found = re.search(r"^[\s-]*['\"]?normalize['\"]?\s*(?::|\n\s*-)\s*(.+(?:\n[ \t]+\w+:.*)*)", config, re.MULTILINE)
    if found is None:
        return False
    value = found[1].strip().lower()
    off = re.match(r"['\"]?(false|null|none|no|off|~)\b", value)
    return not off and re.search(r"norm_obs['\"]?\s*[:=]\s*(false|no|off)\b", value) is None


# -- a pickle of which no code is run ------------------------------------------------------------------------------


class _StandIn:
    """Keeps what was stored of an object of another class."""

    def __new__(cls, *_: Any, **__: Any) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.__dict__.update(part)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take an entry of a mapping."""

    def append(self, value: Any) -> None:
        """Take an entry of a list."""

    def extend(self, values: Any) -> None:
        """Take entries of a list."""


class _Refused(pickle.UnpicklingError):
    """Names what a pickle refers to and statistics do not need."""


class _Unpickler(pickle.Unpickler):
    """Reads a pickle of VecNormalize: numpy's arrays, stand-ins for its classes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NUMPY:
            return _NUMPY[module, name]
        if module in _NUMPY_MODULES and name in _NUMPY_NAMES:
            return getattr(import_module(f"numpy._core.{'numeric' if name == '_frombuffer' else 'multiarray'}"), name)
        if module in ("copyreg", "copy_reg") and name == "_reconstructor":  # how the oldest protocols make an object
            return _reconstructed
        if module in ("builtins", "__builtin__") and name == "object":
            return object
        if (module, name) == ("_codecs", "encode"):  # how older protocols write the bytes of an array
            return _latin_bytes
        if _STAND_INS.fullmatch(f"{module}.{name}"):
            return type(name, (_StandIn,), {})
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused(f"the persistent object {pid!r}")


def _reconstructed(kind: Any, *_: Any) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, _StandIn)):
        raise _Refused(f"an object of {kind}")
    return kind()


def _latin_bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _Refused(f"the encoding {encoding!r}")
    return text.encode("latin1")


def _unpickled(path: Path) -> Any:
    with path.open("rb") as file:
        try:
            return _Unpickler(file).load()
        except _Refused as error:
            raise ValueError(
                f"{path} refers to {error}, which statistics of observations do not need, and was not loaded: give "
                "mean and var as arrays, normalize={'mean': ..., 'var': ...}"
            ) from None
        except Exception as error:  # whatever a damaged pickle makes of the machine that reads it
            raise ValueError(f"{path} is no file of VecNormalize.save: {type(error).__name__}: {error}") from error
