"""The settings of ``task=mnist`` and ``task=digits``, and of the methods that move images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pfm
from benchmarks.core.config import MethodConfig, TaskConfig

__all__ = [
    "METHODS",
    "TASKS",
    "AscentConfig",
    "BestOfConfig",
    "FlowConfig",
    "GeneratorConfig",
    "ImagesConfig",
    "PolicyConfig",
    "RegressionConfig",
    "ShiftConfig",
]


@dataclass
class GeneratorConfig:
    """Sets the generator, see :class:`benchmarks.images.generator.GeneratorSettings`."""

    widths: list[int] = field(default_factory=lambda: [256, 512, 1024])
    noise: int = 100
    batch: int = 128
    every: int = 234
    looks: int = 40
    steady: int = 10
    quality: float = 0.82
    judged: int = 1000
    learning_rate: float = 5e-4
    seed: int = 0


@dataclass
class ImagesConfig(TaskConfig):
    """Move a generator's images of digits by one classifier's preferences, measured by others.

    sets: of ``candidates`` draws of one digit, from which preferences are made. validation, tested: draws of each digit
    on which a method's setting is chosen, and on which it is measured. real: real images that outputs are compared
    with. judge_epochs: of the judges' training. neighbours: k of precision and recall.
    """

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    sets: int = 1500
    candidates: int = 10
    validation: int = 40
    tested: int = 100
    real: int = 2000
    judge_epochs: int = 4
    neighbours: int = 3


@dataclass
class SpaceConfig(MethodConfig):
    """Names the space of a method: "pixels", the generator's "noise", or the "latent" of an autoencoder.

    ``labels`` are "given", or for the controls "shuffled" or "swapped".
    """

    space: str = "noise"
    labels: str = "given"


@dataclass
class FlowConfig(SpaceConfig):
    """Move by a preference flow.

    How it is fitted
        target: "pairs" of two draws; "sets", whose best of ``flow.best_of`` is the target; "extremes", the best and
        the worst draw of a set, as the paper's code makes its pairs. across: join pairs by optimal transport which
        ignores the digit. rounds: with ``mode`` "relabel", that many, each on fresh labels.
        flow: the settings of :class:`pfm.FlowConfig`.

    How it is applied
        Every strength with every multiple in ``win_gradients`` and every threshold in ``keeps`` is one setting: draws
        whose b, fitted on images, is at least the threshold stay as they are, none at 1. permute: the control in which
        every draw gets another one's displacement.
    """

    target: str = "pairs"
    across: bool = False
    mode: str = "single"
    rounds: int = 1
    strengths: list[float] = field(default_factory=lambda: [0.5, 1.0, 1.5, 2.0])
    win_gradients: list[float] = field(default_factory=lambda: [0.0])
    keeps: list[float] = field(default_factory=lambda: [1.0])
    permute: bool = False
    flow: dict[str, Any] = field(default_factory=lambda: pfm.FlowConfig().to_dict())


@dataclass
class BestOfConfig(SpaceConfig):
    """Choose among ``candidates`` draws, by the fitted "reward" or by the "labelling" judge itself."""

    by: str = "reward"
    candidates: list[int] = field(default_factory=lambda: [2, 4, 8, 16])


@dataclass
class ShiftConfig(SpaceConfig):
    """Add the digit's mean displacement from a draw to the preferred one, times each of ``strengths``."""

    strengths: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0, 8.0])


@dataclass
class RegressionConfig(SpaceConfig):
    """Put the estimate of E[chosen | rejected, digit] in the draw's place."""


@dataclass
class AscentConfig(SpaceConfig):
    """Climb log b of the fitted "reward", or the log-odds of the "labelling" judge.

    Places after each of ``lengths`` of path are settings, in units of the mean distance of a pair; ``step`` likewise.
    """

    by: str = "reward"
    step: float = 0.05
    lengths: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.5, 1.0])


@dataclass
class PolicyConfig(SpaceConfig):
    """Train a normal policy over the noise by "dpo" or "rlhf", once for each ``betas``."""

    loss: str = "dpo"
    betas: list[float] = field(default_factory=lambda: [1.0, 0.3, 0.1, 0.03])


TASKS = {"images": ImagesConfig}
METHODS = {
    "images_plain": SpaceConfig,
    "images_flow": FlowConfig,
    "images_best_of": BestOfConfig,
    "images_shift": ShiftConfig,
    "images_regression": RegressionConfig,
    "images_ascent": AscentConfig,
    "images_policy": PolicyConfig,
}
