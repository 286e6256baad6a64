"""The state of an optimizer as tensors by name, to be kept in a file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["optimizer_state", "optimizer_tensors"]


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the state by the parameter's number and the name of the value, such as "0.exp_avg"."""
    states = optimizer.state_dict()["state"]
    return {f"{number}.{key}": torch.as_tensor(v) for number, own in states.items() for key, v in own.items()}


def optimizer_state(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what ``optimizer.load_state_dict`` takes, with the optimizer's own settings.

    A tensor of a parameter's shape is laid out in memory as that parameter: a fused step pairs parameters and moments
    by their places in memory, and a file holds every tensor in rows, so that the moments of a transposed parameter
    would be those of other entries.

    Args:
        tensors: as :func:`optimizer_tensors` gives them.

    Raises:
        ValueError: a name has no number. IndexError: the optimizer has fewer parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
        states.setdefault(int(number), {})[key] = value
    return {"state": states, "param_groups": optimizer.state_dict()["param_groups"]}
