"""Devices: which one to compute on, what it can do, and results that come back to where the inputs were."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = [
    "best_device",
    "device_name",
    "free_memory",
    "new_generator",
    "resolve_device",
    "settle_after_fork",
    "standard_defaults",
    "with_standard_defaults",
]

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C")

DEFAULT = "PFM_DEVICE"


def resolve_device(device: Any = "auto", argument: str = "device") -> torch.device:
    """Return the device that a setting names, having checked that this machine has it.

    Args:
        device: ``"auto"``: the one that the environment variable ``PFM_DEVICE`` names, else CUDA where there is one,
            else the CPU; a name such as ``"cpu"``, ``"cuda"``, ``"cuda:1"``; the number of a CUDA device; or a
            ``torch.device``.
        argument: what errors call the setting.

    Raises:
        TypeError: it is of another type.
        ValueError: it is no device's name, the machine has no such device, or it is one without float64 (Apple's).

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    given = device
    if given == "auto":
        given = os.environ.get(DEFAULT) or ("cuda" if torch.cuda.is_available() else "cpu")
        argument = DEFAULT if os.environ.get(DEFAULT) else argument
    try:
        chosen = torch.device(device_name(given, argument))
    except ValueError:
        chosen = None
    if chosen is not None and chosen.type == "mps" and _count("mps"):
        raise ValueError(f"{argument}={given!r} has no float64, in which fields are solved: use {argument}='cpu'")
    if chosen is None or (chosen.index or 0) >= _count(chosen.type):
        raise ValueError(
            f"{argument}={given!r} is not on this machine, which has {_all_here()}: use {argument}='cpu', or 'auto'"
        )
    return torch.device("cpu") if chosen.type == "cpu" else chosen


def best_device(device: Any = "auto", argument: str = "device") -> torch.device:
    """Return the device for a model that runs on any: "auto" and None are CUDA or Apple's GPU where there is one.

    Args:
        device, argument: as for :func:`resolve_device`.
    """
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if str(device) in ("mps", "mps:0") and torch.backends.mps.is_available():
        return torch.device("mps")
    return resolve_device(device, argument)


def device_name(device: Any, argument: str = "device") -> str:
    """Return a device's name as configurations hold it: ``"auto"``, ``"cpu"``, ``"cuda:1"``, ...

    The device need not be there: a configuration may have been made on another machine.

    Raises:
        TypeError: it is neither a name, a number nor a ``torch.device``. ValueError: it is no device's name.

    >>> device_name(1), device_name(torch.device("cpu"))
    ('cuda:1', 'cpu')
    """
    if isinstance(device, torch.device):
        return str(device)
    if isinstance(device, int) and not isinstance(device, bool):
        if device < 0:
            raise ValueError(f"{argument} must be the number of a device, 0 or above: got {device}")
        return f"cuda:{device}"
    if isinstance(device, str) and device.isdecimal():  # a number from a command line
        return f"cuda:{int(device)}"
    if not isinstance(device, str):
        raise TypeError(
            f"{argument} must be a device such as 'auto', 'cpu', 'cuda:1', 1 or torch.device('cuda'): got "
            f"{type(device).__name__}"
        )
    if device == "auto":
        return device
    try:
        return str(torch.device(device))
    except RuntimeError as error:
        raise ValueError(f"{argument} must be one of auto, cpu, cuda, cuda:1, mps, ...: got {device!r}") from error


def free_memory(device: torch.device) -> float:
    """Return the bytes that are free on a device, infinity where it does not say."""
    if device.type == "cpu":
        return math.inf
    information = getattr(torch.get_device_module(device.type), "mem_get_info", None)
    return math.inf if information is None else float(information(device)[0])


def settle_after_fork() -> None:
    """Compute on one thread from now on if this process is a fork of one that had imported torch.

    A fork does not inherit the threads of its parent's products, and waits for them for ever (GNU OpenMP). Workers of
    a pool share the cores anyway.
    """
    global _forked
    if _forked:
        torch.set_num_threads(1)
        _forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


_forked = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def new_generator(device: torch.device) -> torch.Generator:
    """Return a generator of random numbers on a device; on the CPU where the device's backend has none."""
    try:
        return torch.Generator(device)
    except RuntimeError:
        return torch.Generator()


def _count(kind: str) -> int:
    if kind == "cpu":
        return 1
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    if kind == "meta":  # it holds no values
        return 0
    try:
        module = torch.get_device_module(kind)
        return module.device_count() if module.is_available() else 0
    except (RuntimeError, AttributeError):
        return 0


def _all_here() -> str:
    found = ["cpu", *(f"cuda:{number}" for number in range(_count("cuda")))]
    return ", ".join([*found, "mps"] if _count("mps") else found)


_AUTOCAST_KINDS = ("cpu", "cuda", "mps")


def standard_defaults(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function to run under torch's own defaults, float32 on the CPU, whatever the program has set.

    Under ``torch.inference_mode`` it runs under ``no_grad`` instead, so that fits and gradients of b can switch
    gradients on, and what is made can be used outside. ``torch.autocast`` is switched off: parts that compute in lower
    precision do so by their own settings.

    ``torch.set_default_dtype`` holds for the whole process: threads that run decorated functions share one change.
    """

    @functools.wraps(function)
    def standard(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return standard(*args, **kwargs)
        for kind in _AUTOCAST_KINDS:
            if torch.is_autocast_enabled(kind):
                with torch.autocast(kind, enabled=False):
                    return standard(*args, **kwargs)
        elsewhere = torch.get_default_device().type not in ("cpu", "meta")  # "meta": shapes alone are wanted
        if not elsewhere and torch.get_default_dtype() is torch.float32 and not _float32.depth:
            return function(*args, **kwargs)
        with _float32, torch.device("cpu") if elsewhere else contextlib.nullcontext():
            return function(*args, **kwargs)

    return standard


def with_standard_defaults(cls: type[C]) -> type[C]:
    """Decorate a class so that its constructor and public methods run as :func:`standard_defaults` says."""
    for name, member in list(vars(cls).items()):
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(member, classmethod | staticmethod):
            setattr(cls, name, type(member)(standard_defaults(member.__func__)))
        elif inspect.isfunction(member):
            setattr(cls, name, standard_defaults(member))
    return cls


class _Float32:
    """Makes float32 the default number type while at least one thread is inside."""

    def __init__(self) -> None:
        self.depth = 0
        self._before = torch.float32
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self.depth == 0:
                self._before = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self.depth += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.depth -= 1
            if self.depth == 0:
                torch.set_default_dtype(self._before)


_float32 = _Float32()
