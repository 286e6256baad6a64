"""The settings of the task and of the methods that choose which pair to label next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.core.config import MethodConfig, TaskConfig

__all__ = ["METHODS", "TASKS", "AcquisitionConfig", "AcquisitionMethodConfig"]


@dataclass
class AcquisitionConfig(TaskConfig):
    """Learn from as few labels as possible.

    ``data``: the task whose pairs are the pool and whose candidates are chosen from: "alpaca", "arguments" or
    "captions", with ``options`` of its config. ``pool``: pairs to choose from, drawn at random; their labels are
    hidden. ``labels``: numbers of labels at which the choices are measured. A round requests at most ``batch`` labels,
    or for a quarter of those there are, if that is more.
    """

    data: str = "arguments"
    options: dict[str, Any] = field(default_factory=lambda: {"draws": 16})
    pool: int = 1000
    labels: list[int] = field(default_factory=lambda: [20, 50, 100, 200, 400])
    batch: int = 20


@dataclass
class AcquisitionMethodConfig(MethodConfig):
    """Ask for the labels that :func:`pfm.acquisition.choose_pairs` names ``by`` a criterion.

    ``members``: 0 takes the posterior of one linear model; more, that many linear models of resampled prompts.
    ``shuffled``: the control, whose labels are noise.
    """

    by: str = "information"
    members: int = 0
    shuffled: bool = False


TASKS = {"acquisition": AcquisitionConfig}
METHODS = {"acquisition": AcquisitionMethodConfig}
