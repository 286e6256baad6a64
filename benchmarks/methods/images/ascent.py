"""Gradient ascent on the fitted reward or on the labelling judge itself: the trap of adversarial images.

The judge that labels is a differentiable network, and its gradient finds images that it likes and nobody else does
(Szegedy et al. 2014). Every step has the same length; no step size has to be chosen for a reward's scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.core.bench import Bench
from benchmarks.images.config import AscentConfig
from benchmarks.images.data import one_hot
from benchmarks.images.generator import Draws
from benchmarks.images.lesson import Lesson, log_odds
from benchmarks.images.spaces import Space, make_space

__all__ = ["Ascent", "make"]


class Ascent:
    """Climbs in the space of the config."""

    def __init__(self, config: AscentConfig) -> None:
        if config.by not in ("reward", "labelling"):
            raise ValueError(f"method.by must be 'reward' or 'labelling': got {config.by!r}")
        if not config.step > 0 or not config.lengths or min(config.lengths) < config.step:
            raise ValueError(f"method.lengths must be at least method.step > 0: got {config.lengths} and {config.step}")
        self.config = config

    def learn(self, lesson: Lesson, bench: Bench) -> dict[str, Any]:
        """Fit the reward, and measure how far apart the outputs of a pair are."""
        self.labelling = lesson.labelling
        self.space: Space = make_space(self.config.space, lesson, bench.progress)
        y = self.space.encode(lesson.draws)
        pairs = lesson.pairs(y, self.config.labels)
        self.unit = float((pairs.chosen - pairs.rejected).flatten(1).norm(dim=1).mean())
        if self.config.by == "labelling":
            return {"unit": self.unit}
        self.reward = lesson.reward(self.config.space, y, self.config.labels)
        return {"unit": self.unit, "reward": self.reward.found}

    def move(self, draws: Draws, seed: int) -> dict[str, tuple[Tensor, int]]:
        """Climb, and give the images after each length."""
        y, context, found = self.space.encode(draws), one_hot(draws.digits), {}
        marks = {round(length / self.config.step): length for length in self.config.lengths}
        for number in range(1, max(marks) + 1):
            y = torch.cat([self._step(*part) for part in zip(*(p.split(1000) for p in (y, context)), strict=True)])
            if number in marks:
                with torch.no_grad():
                    found[f"length {marks[number]:g}"] = (self.space.decode(y, draws.digits), 1)
        return found

    def _step(self, y: Tensor, context: Tensor) -> Tensor:
        y = y.detach().requires_grad_(True)
        with torch.enable_grad():
            if self.config.by == "labelling":
                digits = context.argmax(1)
                rating = log_odds(self.labelling, self.space.decode(y, digits), digits)
            else:
                rating = self.reward.reward(y, context)
            (slope,) = torch.autograd.grad(rating.sum(), y)
        length = slope.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (y.ndim - 1))
        return (y + self.config.step * self.unit * slope / length).detach()


def make(config: AscentConfig) -> Ascent:
    """Make the method of a config."""
    return Ascent(config)
