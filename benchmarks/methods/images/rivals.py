"""Rivals that need no field: draws as they are, encode and decode, best of n, mean shift, regression."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.networks import Network, fit_early_stopped
from benchmarks.core.bench import Bench
from benchmarks.images.config import BestOfConfig, RegressionConfig, ShiftConfig, SpaceConfig
from benchmarks.images.data import DIGITS, one_hot
from benchmarks.images.generator import Draws
from benchmarks.images.lesson import Lesson
from benchmarks.images.spaces import Space, make_space

__all__ = ["BestOf", "Plain", "Regression", "Shift", "make"]

Moved = dict[str, tuple[Tensor, int]]


class Plain:
    """Leaves draws as they are; in another space than pixels it encodes and decodes them."""

    def __init__(self, config: SpaceConfig) -> None:
        self.config = config

    def learn(self, lesson: Lesson, bench: Bench) -> dict[str, Any]:
        """Make the space."""
        self.space: Space = make_space(self.config.space, lesson, bench.progress)
        return {}

    @torch.no_grad()
    def move(self, draws: Draws, seed: int) -> Moved:
        """Encode and decode."""
        return {"x0": (self.space.decode(self.space.encode(draws), draws.digits), 1)}


class BestOf:
    """Draws n - 1 more images of the generator, and takes the best by the fitted reward or the labelling judge."""

    def __init__(self, config: BestOfConfig) -> None:
        if config.by not in ("reward", "labelling"):
            raise ValueError(f"method.by must be 'reward' or 'labelling': got {config.by!r}")
        if not config.candidates or min(config.candidates) < 2:
            raise ValueError(f"method.candidates must hold numbers of at least 2: got {config.candidates}")
        self.config = config

    def learn(self, lesson: Lesson, bench: Bench) -> dict[str, Any]:
        """Fit the reward in the space of the config."""
        self.lesson = lesson
        self.space: Space = make_space(self.config.space, lesson, bench.progress)
        if self.config.by == "labelling":
            return {}
        self.reward = lesson.reward(self.config.space, self.space.encode(lesson.draws), self.config.labels)
        return {"reward": self.reward.found}

    @torch.no_grad()
    def move(self, draws: Draws, seed: int) -> Moved:
        """Choose among the draw and fresh ones."""
        found: Moved = {}
        best, images = self._rate(draws), draws.images
        for number in range(2, max(self.config.candidates) + 1):
            more = self.lesson.generator.draw(draws.digits, 50_021 * seed + number)
            rating = self._rate(more)
            images = torch.where((rating > best)[:, None, None, None], more.images, images)
            best = torch.maximum(best, rating)
            if number in self.config.candidates:
                found[f"n={number}"] = (images, number)
        return found

    def _rate(self, draws: Draws) -> Tensor:
        if self.config.by == "labelling":
            return self.lesson.score(draws.images, draws.digits)
        return self.reward.reward(self.space.encode(draws), one_hot(draws.digits))


class Shift:
    """Adds the digit's mean displacement E[y1 - y0 | digit], y0 a member of a pair by a fair coin, y1 the winner."""

    def __init__(self, config: ShiftConfig) -> None:
        self.config = config

    def learn(self, lesson: Lesson, bench: Bench) -> dict[str, Any]:
        """Average the differences of each digit's pairs."""
        self.space: Space = make_space(self.config.space, lesson, bench.progress)
        pairs = lesson.pairs(self.space.encode(lesson.draws), self.config.labels)
        assert pairs.context is not None
        digit = pairs.context.argmax(1)
        difference = (pairs.chosen - pairs.rejected) / 2
        self.direction = torch.stack([difference[digit == d].mean(0) for d in range(DIGITS)])
        return {}

    @torch.no_grad()
    def move(self, draws: Draws, seed: int) -> Moved:
        """Add it at every strength."""
        y = self.space.encode(draws)
        return {
            f"x{s:g}": (self.space.decode(y + s * self.direction[draws.digits], draws.digits), 1)
            for s in self.config.strengths
        }


class Regression:
    """Predicts the chosen output from the rejected one and the digit, by a perceptron of 256 x 2 units."""

    def __init__(self, config: RegressionConfig) -> None:
        self.config = config

    def learn(self, lesson: Lesson, bench: Bench) -> dict[str, Any]:
        """Fit by least squares with early stopping on held-out pairs."""
        self.space: Space = make_space(self.config.space, lesson, bench.progress)
        y = self.space.encode(lesson.draws).flatten(1)
        pairs = lesson.pairs(y, self.config.labels)
        network = Network(y.shape[1], DIGITS, y.shape[1], hidden=256, seed=bench.seed).standardise(pairs)
        self.mean = pairs.chosen.mean(0)

        def loss(index: Tensor) -> Tensor:
            batch = pairs.gather(index)
            return (self.mean + network(batch.rejected, batch.context) - batch.chosen).square().mean(1)

        fitted = fit_early_stopped(network, loss, pairs, seed=bench.seed, updates=1000)
        self.network = network
        return fitted.notes()

    @torch.no_grad()
    def move(self, draws: Draws, seed: int) -> Moved:
        """Predict."""
        y = self.space.encode(draws)
        found = self.mean + self.network(y.flatten(1), one_hot(draws.digits))
        return {"x1": (self.space.decode(found.view_as(y), draws.digits), 1)}


def make(config: SpaceConfig) -> Plain | BestOf | Shift | Regression:
    """Make the method of a config's class."""
    kinds = {BestOfConfig: BestOf, ShiftConfig: Shift, RegressionConfig: Regression}
    return kinds.get(type(config), Plain)(config)
