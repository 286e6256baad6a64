"""The device that an argument names, checked before anything is loaded onto it."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["best_device", "checked_device"]


def best_device() -> torch.device:
    """Return CUDA or another accelerator where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def checked_device(device: Any, name: str = "device") -> torch.device:
    """Return the device that an argument names.

    Args:
        device: "auto" or None for the best there is, a name such as "cpu" or "cuda:1", the number of a CUDA device, or
            a ``torch.device``.
        name: of the argument, for errors.

    Raises:
        TypeError: it is none of these.
        ValueError: there is no such device on this machine.
    """
    if device is None or device == "auto":
        return best_device()
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        raise TypeError(
            f"{name} must be a name such as 'cpu' or 'cuda:1', a number or a torch.device, got {type(device).__name__}"
        )
    try:
        found = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except RuntimeError:
        found = None
    if found is None or not _is_here(found):
        raise ValueError(f"{name}={device!r} is not on this machine, which has {_all_here()}: pass one, or 'auto'")
    return found


def _is_here(device: torch.device) -> bool:
    if device.type == "cpu":
        return not device.index
    if device.type == "cuda":
        return (device.index or 0) < torch.cuda.device_count()
    if device.type == "meta":
        return False  # it holds no numbers
    try:
        torch.empty(0, device=device)
    except Exception:  # each backend that is not built has an error of its own
        return False
    return True


def _all_here() -> str:
    found = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    return ", ".join([*found, "mps"] if torch.backends.mps.is_available() else found)
