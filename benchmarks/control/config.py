"""The settings of control tasks and methods, as plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from benchmarks.core.config import MethodConfig, TaskConfig

__all__ = [
    "METHODS",
    "TASKS",
    "ControlAscentConfig",
    "ControlBestOfConfig",
    "ControlCloneConfig",
    "ControlConfig",
    "ControlFlowConfig",
    "ControlLikelihoodConfig",
    "ControlMethodConfig",
    "ControlRegressionConfig",
    "ControlShiftConfig",
]


@dataclass
class ControlConfig(TaskConfig):
    """Refine a frozen policy in a simulator, from labelled pairs of segments that start in the same exact state.

    What is refined
        environment: a gymnasium id. reference: a file of the pretrained actors, or the name of a recipe of
        :mod:`benchmarks.control.references`. best: another file, a policy that shows what is to be gained.

    What is learned from, see :func:`pfm.pbrl.collect`
        pairs: comparisons asked for (``limit`` keeps so many). length, continuation, noise, correlation, explore,
        members. teacher: one of :data:`pfm.pbrl.TEACHERS`; or "coin", whose answers say nothing, the control for any
        method: what it gains from them is what choosing among settings by episodes gains. held_out: share of the
        trajectories on which nothing is fitted. value: the discount of a fitted value of the reference that stands for
        the continuation in labels, such as 0.97; None for none.

    How it is measured
        episodes: of the test, their starts the same for every method of a seed. validation: episodes, of other starts,
        by which a method chooses among its settings. states: held-out ones from which segments are run.

    Methods with ``label_rounds`` k above 1 ask for 1/k of the pairs, choose, and collect the next part of them around
    the policy that they chose, which then is their reference: as many labels, no two rounds from one policy.

    Where it is kept
        folder: of the pairs, collected once for all methods, and of trained references.
    """

    environment: str = MISSING
    reference: str = MISSING
    best: str | None = None
    d4rl: str | None = None

    pairs: int = 5000
    length: int = 5
    continuation: int = 40
    value: float | None = None
    noise: float | None = 0.3
    correlation: float = 1.0
    explore: float | None = 0.1
    members: int = 2
    teacher: str = "oracle"
    held_out: float = 0.1

    episodes: int = 64
    validation: int = 16
    states: int = 200

    folder: str = "runs/pbrl"


@dataclass
class ControlMethodConfig(MethodConfig):
    """Act as the reference does. ``kind``: "deterministic", or "stochastic" with the noise of the segments."""

    kind: str = "deterministic"


@dataclass
class ControlCloneConfig(MethodConfig):
    """Clone behaviour.

    ``rows``: "all" segments, or "winners" of the comparisons. ``form``: "actions" clones what was done; "residual" what
    was done beyond the reference, which goes on acting below. ``strengths``: multiples of a residual to choose from.
    """

    rows: str = "winners"
    form: str = "actions"
    strengths: list[float] = field(default_factory=lambda: [1.0])


@dataclass
class ControlShiftConfig(MethodConfig):
    """Add a mean displacement from rejected to chosen segments: ``model`` "constant", or "network" of what is seen."""

    model: str = "constant"
    strengths: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0, 8.0])
    label_rounds: int = 1


@dataclass
class ControlRegressionConfig(MethodConfig):
    """Predict the chosen from the rejected segment; ``rounds``: how often, to choose from."""

    rounds: list[int] = field(default_factory=lambda: [1, 2, 4, 8])


@dataclass
class ControlBestOfConfig(MethodConfig):
    """Choose among draws of the reference's segments.

    ``by`` "reward", a Bradley–Terry network, or "oracle", the simulator. ``candidates``: how many, to choose from.
    ``execute``: steps between two choices. ``episodes``: at most so many, as an oracle is slow.
    """

    by: str = "reward"
    candidates: list[int] = field(default_factory=lambda: [8])
    execute: int = 1
    episodes: int | None = None


@dataclass
class ControlAscentConfig(MethodConfig):
    """Climb Bradley–Terry networks from the reference.

    ``lengths`` of the way, in units of the noise's length; in so many ``steps``. ``members``: networks, averaged.
    ``candidates``, to choose from: starts, the reference's segment and draws of the noise, of whose ends the best is
    executed.
    """

    lengths: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0])
    steps: int = 8
    members: int = 1
    candidates: list[int] = field(default_factory=lambda: [1])
    label_rounds: int = 1


@dataclass
class ControlLikelihoodConfig(MethodConfig):
    """Fine-tune a Gaussian policy of segments on preferences: ``loss`` "dpo" or "cpl".

    ``betas``: the temperatures to choose from. ``bias``: lambda of CPL, by which the rejected segment counts less.
    """

    loss: str = "dpo"
    betas: list[float] = field(default_factory=lambda: [0.1, 0.3, 1.0, 3.0])
    bias: float = 0.5
    label_rounds: int = 1


@dataclass
class ControlFlowConfig(MethodConfig):
    """Refine by a preference flow, see :class:`pfm.pbrl.FlowPolicy`.

    How it is fitted
        labels: "given", or for the controls "shuffled" or "swapped". form: of the segments, "residual", "directions" or
        "actions".
        draws: 0 learns from the labelled segments alone; otherwise from so many fresh draws of the noise for every
        state, labelled by a preference model of the same pairs. flow: the settings of :class:`pfm.FlowConfig`.

    How it is applied
        mode, guard, win_guard, execute, proposal: "deterministic", "stochastic", or "clone" (of form "actions"; without
        a simulator). candidates, rounds, strengths, guidances (None: 1, the state as it is), win_gradients (None: 0,
        the field alone): to choose from. choose: whether standing still is one of the choices.
    """

    labels: str = "given"
    form: str = "residual"
    flow: dict[str, Any] = field(default_factory=dict)
    mode: str = "reapply"
    guard: str = "off"
    win_guard: bool = False
    execute: int = 1
    candidates: list[int] = field(default_factory=lambda: [1])
    proposal: str = "deterministic"
    draws: int = 0
    rounds: list[int] = field(default_factory=lambda: [1])
    strengths: list[float] = field(default_factory=lambda: [1.0])
    guidances: list[float] | None = None
    win_gradients: list[float] | None = None
    choose: bool = True
    label_rounds: int = 1


TASKS = {"control": ControlConfig}
METHODS = {
    "control_reference": ControlMethodConfig,
    "control_clone": ControlCloneConfig,
    "control_shift": ControlShiftConfig,
    "control_regression": ControlRegressionConfig,
    "control_best_of": ControlBestOfConfig,
    "control_ascent": ControlAscentConfig,
    "control_likelihood": ControlLikelihoodConfig,
    "control_flow": ControlFlowConfig,
}
