"""Log the figures of a fit while it runs: to a file, TensorBoard, Weights & Biases, MLflow.

A tracker is anything with ``log(values, step=...)``, as a run of Weights & Biases is. :func:`as_tracker` also takes a
writer of TensorBoard, the module ``mlflow``, a function, and a path, to which JSON lines are appended. Nothing is
imported and nothing is sent anywhere unless such an object is given.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

__all__ = ["Tracker", "as_tracker"]


@runtime_checkable
class Tracker(Protocol):
    """Keeps figures by step."""

    def log(self, values: Mapping[str, float], step: int) -> object:
        """Keep the figures of one step."""
        ...


class _Adapter:
    """Writes one figure after the other, or all of a step, by a function of what was given."""

    def __init__(self, write: Callable[[Mapping[str, float], int], object]) -> None:
        self.write = write

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.write(values, step)


class _Once:
    """Passes figures to a tracker; after its first failure it warns once and stops, so that the fit goes on."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker: Tracker | None = tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        if self.tracker is None or not finite:
            return
        try:
            self.tracker.log(finite, step=step)
        except Exception as error:
            self.tracker = None
            warnings.warn(
                f"the tracker failed at step {step} and is no longer used; the fit goes on: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )


def as_tracker(tracker: Any) -> Tracker | None:
    """Return a tracker that never stops a fit.

    Args:
        tracker: None; an object with ``log(values, step=)``; a ``torch.utils.tensorboard.SummaryWriter``; the module
            ``mlflow`` within a run; a function of values and step; or a path, to which JSON lines are added.

    Raises:
        TypeError: none of these. OSError: the path cannot be written to.

    >>> seen = []
    >>> as_tracker(lambda values, step: seen.append((step, values))).log({"loss": 0.5}, step=10)
    >>> seen
    [(10, {'loss': 0.5})]
    """
    if tracker is None or isinstance(tracker, _Once):
        return tracker
    if isinstance(tracker, str | os.PathLike):
        path = Path(tracker).expanduser()
        with path.open("a", encoding="utf-8"):
            pass  # a place that cannot be written to shows before the fit begins
        return _Once(_Adapter(lambda values, step: _append(path, {"step": step, **values})))
    if callable(getattr(tracker, "add_scalar", None)):
        return _Once(
            _Adapter(lambda values, step: [tracker.add_scalar(name, value, step) for name, value in values.items()])
        )
    if callable(getattr(tracker, "log_metrics", None)):
        return _Once(_Adapter(lambda values, step: tracker.log_metrics(dict(values), step=step)))
    if callable(getattr(tracker, "log", None)):
        return _Once(tracker)
    if callable(tracker):
        return _Once(_Adapter(tracker))
    raise TypeError(
        "tracker must have log(values, step=), or be a SummaryWriter, the module mlflow, a function of values and "
        f"step, or a path: got {type(tracker).__name__}"
    )


def _append(path: Path, values: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")
