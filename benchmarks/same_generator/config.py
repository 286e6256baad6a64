"""The settings of tasks on samples of one generator, as plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.core.config import ChoiceConfig

__all__ = ["METHODS", "TASKS", "SameGeneratorConfig"]


@dataclass
class SameGeneratorConfig(ChoiceConfig):
    """Choose among samples of one small model.

    ``part``: "instructions", scored by checks, or "sentiment", continuations of reviews scored by a classifier of other
    data. ``samples``: the folder that ``python -m benchmarks.same_generator.sample`` wrote. A third of the prompts of
    each kind is tested on, another third for each of three seeds; ``test_share`` is not read.
    """

    part: str = "instructions"
    samples: str = "runs/same_generator/samples"


TASKS: dict[str, Any] = {"same_generator": SameGeneratorConfig}
METHODS: dict[str, Any] = {}
