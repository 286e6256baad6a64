"""Moves images by a preference flow, in pixels, in the generator's noise or in an autoencoder's latent."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

import pfm
from benchmarks.core.bench import Bench
from benchmarks.images import fields  # noqa: F401  registers the U-Net
from benchmarks.images.config import FlowConfig
from benchmarks.images.data import DIGITS, one_hot
from benchmarks.images.generator import Draws
from benchmarks.images.lesson import Lesson
from benchmarks.images.spaces import Pixels, Space, make_space
from benchmarks.methods.transport import joined_across
from pfm import EncodedPairs
from pfm.flow.preference_win import PreferenceWin

__all__ = ["FlowMover", "make"]

NOTED = ("ridge", "residual_kept", "training", "steps", "steps_error", "seconds", "rounds", "win")
MODES = ("single", "gated", "relabel")


class FlowMover:
    """Fits a flow in the space of the config and moves draws along it."""

    def __init__(self, config: FlowConfig) -> None:
        if config.mode not in MODES:
            raise ValueError(f"method.mode must be one of {', '.join(MODES)}: got {config.mode!r}")
        if config.mode != "relabel" and config.rounds != 1:
            raise ValueError(f"method.rounds={config.rounds} needs mode 'relabel': got {config.mode!r}")
        if config.mode == "relabel" and config.labels != "given":
            raise ValueError("method.mode='relabel' asks the labelling judge in every round: use labels='given'")
        if not config.strengths or not config.win_gradients or not config.keeps:
            raise ValueError("method.strengths, win_gradients and keeps must hold at least one number each")
        self.config = config

    def learn(self, lesson: Lesson, bench: Bench) -> dict[str, Any]:
        """Fit on the lesson's pairs, and further rounds on fresh draws."""
        config = self.config
        self.space: Space = make_space(config.space, lesson, bench.progress)
        y = self.space.encode(lesson.draws)
        pairs = lesson.pairs(y, config.labels, config.target)
        settings = pfm.FlowConfig.from_dict(config.flow)
        if config.across:
            pairs, settings = across(pairs, bench.seed), settings.replace(source="rejected")
        reward = lesson.reward(config.space, y, config.labels)
        # Sets keep the judge's own scores; a reward in `fit` would score them anew.
        given = None if config.target == "sets" else reward
        flow = pfm.PreferenceFlow.fit(pairs, settings, progress=bench.progress, preference=given)
        if given is None:
            flow = flow.with_preference(reward, lesson.pairs(y, config.labels))
        self.image_win = _fit_image_win(lesson, config.labels) if min(config.keeps) < 1 else None
        self.labels = len(y)
        for number in range(1, config.rounds):
            flow = self._another_round(flow, lesson, number, bench)
        self.flow = flow
        found = {name: flow.metadata[name] for name in NOTED if name in flow.metadata}
        return {**found, "reward": reward.found, "labels": self.labels, "evaluations": flow.evaluations}

    def _another_round(self, flow: pfm.PreferenceFlow, lesson: Lesson, number: int, bench: Bench) -> pfm.PreferenceFlow:
        """Label what the rounds so far make of fresh draws, as many as the lesson has, and fit one more flow."""
        digits = torch.arange(len(lesson.draws) // 2) % DIGITS
        seed = 7000 + 100 * lesson.seed + 2 * number
        one, other = (self.space.encode(lesson.generator.draw(digits, seed + part)) for part in range(2))
        self.labels += 2 * len(digits)

        def vote(y: Tensor, others: Tensor, context: Tensor | None) -> Tensor:
            assert context is not None
            own = context.argmax(1)
            first, second = (lesson.score(self.space.decode(part, own), own) for part in (y, others))
            return first > second

        settings = flow.config.replace(best_of=2)
        return flow.relabel(vote, one, other, one_hot(digits), config=settings, check=0, progress=bench.progress)

    @torch.no_grad()
    def _image_win(self, draws: Draws) -> Tensor:
        """Return b (N,) of the draws' images; zero where no threshold asks for it."""
        if self.image_win is None:
            return torch.zeros(len(draws))
        y = Pixels(draws.images.shape[-1]).encode(draws)
        return torch.sigmoid(self.image_win(y.flatten(1), one_hot(draws.digits)))

    def move(self, draws: Draws, seed: int) -> dict[str, tuple[Tensor, int]]:
        """Move draws at every strength with every multiple of the win gradient and every threshold."""
        config, found = self.config, {}
        y, context = self.space.encode(draws), one_hot(draws.digits)
        b = self._image_win(draws)
        for strength, slope in itertools.product(config.strengths, config.win_gradients):
            moved = self.flow.transport(y, context, mode=config.mode, strength=strength, win_gradient=slope, seed=seed)
            if config.permute:
                order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
                moved = y + (moved - y)[order]
            with torch.no_grad():
                images = self.space.decode(moved, draws.digits)
            for keep in config.keeps:
                name = f"x{strength:g}" + f" gradient {slope:g}" * bool(slope) + f" keep {keep:g}" * (keep < 1)
                stays = ((b >= keep) & (keep < 1))[:, None, None, None]
                found[name] = (torch.where(stays, draws.images, images), 1)
        return found


def _fit_image_win(lesson: Lesson, labels: str) -> PreferenceWin:
    """Fit b on images, whatever space the flow moves in: the guard of a refiner sees the output."""
    y = Pixels(lesson.generator.size).encode(lesson.draws)
    pairs = lesson.pairs(y, labels)
    return PreferenceWin.made(lesson.reward("pixels", y, labels), pairs, pairs, lesson.seed)[0]


def across(pairs: EncodedPairs, seed: int) -> EncodedPairs:
    """Join draws to winners of other digits, as :func:`benchmarks.methods.transport.joined_across` says."""
    flat = EncodedPairs(pairs.chosen.flatten(1), pairs.rejected.flatten(1), pairs.context)
    joined = joined_across(flat, torch.Generator().manual_seed(seed))
    shape = pairs.event_shape
    chosen, rejected = (side.unflatten(1, shape) for side in (joined.chosen, joined.rejected))
    return EncodedPairs(chosen, rejected, joined.context, group=torch.arange(len(joined)))


def make(config: FlowConfig) -> FlowMover:
    """Make the method of a config."""
    return FlowMover(config)
