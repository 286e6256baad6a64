"""Checks of what a flow is applied to: outputs, contexts, times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pfm._internal.checks import as_float_tensor, check_finite

__all__ = ["check_inputs", "check_times"]


def check_inputs(
    y: Any, context: Any, event_shape: Sequence[int], context_dimension: int, fitted: str = "this flow was fitted"
) -> tuple[Tensor, Tensor | None]:
    r"""Return float32 outputs (B, \*D) and a context for each row, (B, C) or None, on the device of ``y``.

    Args:
        y: (B, \*D) outputs. context: (B, C), (1, C) or (C,); None for flows without contexts.
        event_shape: (\*D). context_dimension: C, 0 for flows without contexts.
        fitted: how errors name the flow.

    Raises:
        ValueError: shapes disagree, values are not finite, or a context is missing or not wanted.
    """
    y = as_float_tensor("y", y).float()
    if y.shape[1:] != torch.Size(event_shape) or y.ndim < 2:
        wanted = ", ".join(["B", *map(str, event_shape)])
        raise ValueError(f"y must be ({wanted}), as {fitted}: got {tuple(y.shape)}")
    check_finite("y", y)
    if context_dimension == 0:
        if context is not None:
            raise ValueError(f"context must be None: {fitted} without contexts")
        return y, None
    if context is None:
        raise ValueError(f"context (B, {context_dimension}) is missing: {fitted} with contexts")
    context = as_float_tensor("context", context).to(y.device, torch.float32)
    if context.ndim == 1:
        context = context[None]
    if context.ndim != 2 or context.shape[1] != context_dimension or context.shape[0] not in (1, len(y)):
        raise ValueError(
            f"context must be ({len(y)}, {context_dimension}), one row an output, or one row for all: "
            f"got {tuple(context.shape)}"
        )
    check_finite("context", context)
    return y, context.expand(len(y), -1)


def check_times(times: Any) -> list[float]:
    """Return times as a list.

    Raises:
        ValueError: there are none, or they are not increasing numbers in [0, 1].
    """
    marks = [float(t) for t in torch.as_tensor(times).flatten()]
    if not marks or any(not 0 <= t <= 1 for t in marks) or marks != sorted(set(marks)):
        raise ValueError(f"times must be increasing numbers in [0, 1]: got {marks}")
    return marks
