"""Tasks on laws: a method learns from pairs, moves fresh reference draws, and is held against exact draws."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.core.bench import Bench, Outcome
from benchmarks.core.config import LawConfig
from benchmarks.core.errors import UnsuitableMethodError
from benchmarks.laws.laws import Flowing, Law, Mover, Staged
from benchmarks.laws.measures import Drawn, measure
from benchmarks.laws.quadrature import Quadrature, grid
from pfm import EncodedPairs
from pfm.statistics import Bootstrap, Estimate

__all__ = ["LawTask"]

# Parts of a seed's randomness: all methods of a seed learn from the same pairs and are measured on the same draws.
_PAIRS, _SOURCES, _TARGETS, _FLOOR, _MOVES, _FIGURES = range(6)
_SHOWN = {"draws": 1500, "lines": 150, "times": 17, "cells": {1: 200, 2: 64}, "arrows": {1: 41, 2: 17}}


@dataclass(frozen=True)
class LawTask:
    """A law with the pairs of a seed.

    The score is minus the sliced Wasserstein distance to the distribution that the method aims at, in units of its
    floor: −1 is exact, and nothing can be above it but by chance. It is not the win rate, which a method raises best by
    giving one output always: what a refinement claims is a distribution, and a distribution is a mixture of good
    outputs in the right shares. Win rate, reward, diversity and support stand beside it.
    """

    law: Law
    config: LawConfig
    seed: int

    def pairs(self) -> EncodedPairs:
        """Draw the labelled pairs of this seed."""
        count = self.config.pairs if self.config.limit is None else min(self.config.limit, self.config.pairs)
        return self.law.pairs(count, self.generator(_PAIRS))

    def run(self, method: object, bench: Bench) -> Outcome:
        """Let a method learn and move, and measure where its outputs come to lie.

        Raises:
            TypeError: the method does not move outputs. ValueError: what it gives is not finite, or of another shape.
        """
        if not isinstance(method, Mover):
            raise UnsuitableMethodError(f"{type(method).__name__} does not move outputs, which this task needs")
        train = self.pairs()
        marks = [time.perf_counter()]
        notes = method.learn(self.law, train, bench)
        marks.append(time.perf_counter())
        sources = [self._sources(number) for number in range(self.config.draws)]
        moved = [self._moved(method, number, *source) for number, source in enumerate(sources)]
        marks.append(time.perf_counter())
        rounds = sorted(moved[0])
        exact = self._exact(rounds[-1])
        bootstrap = Bootstrap(self.config.draws)
        start = [self._drawn(_SOURCES, number, 0, *source) for number, source in enumerate(sources)]
        stages = {}
        for stage in rounds:
            ours = [
                self._drawn(_MOVES, number, stage, outputs[stage], source[1])
                for number, (outputs, source) in enumerate(zip(moved, sources, strict=True))
            ]
            target, floor = (
                [self._exact_draws(part, number, stage) for number in range(self.config.draws)]
                for part in (_TARGETS, _FLOOR)
            )
            stages[stage] = measure(ours, target, floor, start, bootstrap, best_of_two=exact["reward"])
        figures = dict(stages[rounds[-1]])
        if rounds != [1]:
            figures |= {f"round_{stage}.{name}": value for stage in rounds for name, value in stages[stage].items()}
        figures |= {
            name: None if value is None else Estimate(value, value, value)
            for name, value in {
                "labels": float(getattr(method, "labels", len(train))),
                "draws": float(method.draws),
                "evaluations": None if method.evaluations is None else float(method.evaluations),
            }.items()
        }
        marks.append(time.perf_counter())
        ratio = figures["sliced_wasserstein_ratio"]
        assert ratio is not None
        return Outcome(
            kind="law",
            score=-ratio.value,
            figures=figures,
            seconds=dict(zip(("learn", "move", "measure"), np.diff(marks).round(3).tolist(), strict=True)),
            about={
                "law": self.law.name,
                "rounds": rounds,
                "exact": exact,
                "pairs": len(train),
                "samples": self.config.samples,
                "draws": self.config.draws,
                "box": list(self.law.box),
            },
            notes=notes,
            save=lambda path: _save(path, self._arrays(method, rounds)),
        )

    def generator(self, *path: int) -> torch.Generator:
        """Return the randomness of one part of this seed, independent of that of every other part."""
        state = np.random.SeedSequence([self.seed, *path]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))

    # -- draws ------------------------------------------------------------------------------------------------------

    def _contexts(self, generator: torch.Generator) -> Tensor | None:
        """Draw contexts (N, C), two rows each: neighbours are independent draws under one context."""
        context = self.law.contexts(-(-self.config.samples // 2), generator)
        return None if context is None else context.repeat_interleave(2, 0)[: self.config.samples]

    def _sources(self, number: int) -> tuple[Tensor, Tensor | None]:
        generator = self.generator(_SOURCES, number)
        context = self._contexts(generator)
        return self.law.reference(context, self.config.samples, generator), context

    def _exact_draws(self, part: int, number: int, stage: int) -> Drawn:
        generator = self.generator(part, number, stage)
        context = self._contexts(generator)
        return self._drawn(part, number, stage, self.law.round(stage, context, self.config.samples, generator), context)

    def _drawn(self, part: int, number: int, stage: int, y: Tensor, context: Tensor | None) -> Drawn:
        return Drawn.of(self.law, y, context, stage, self.config, self.generator(part, number, stage, 1))

    def _moved(self, method: Mover, number: int, y: Tensor, context: Tensor | None) -> dict[int, Tensor]:
        return _checked_stages(method, y, context, self.generator(_MOVES, number))

    def _exact(self, rounds: int) -> dict[str, list[float] | None]:
        """Return the exact means of rounds 0 to ``rounds``; one context stands for all, which differ by a rotation."""
        shown = self.law.shown()
        quadrature = Quadrature.of(self.law, None if shown is None else shown[0], rounds=max(1, rounds))
        return {"reward": quadrature.rewards(), "win": quadrature.wins()}

    # -- what figures are drawn from --------------------------------------------------------------------------------

    def _arrays(self, method: Mover, rounds: list[int]) -> dict[str, NDArray[Any]]:
        """Return what plots need; where there are contexts, of each of G shown ones, else G = 1.

        ``reference``, ``exact`` (G, n, D) draws, ``moved`` (K, G, n, D) the outputs of K stages, ``density``
        (2, G, cells^D) of the reference and of the target distribution, ``context`` (G, C). Of a method with a field
        also ``path`` (T, G, m, D) at ``times`` (T,), ``states`` (3, G, n, D) at t = 0, 1/2, 1 of the ``reference``
        draws, and ``velocity`` (3, G, Q, D) there at the points ``places`` (Q, D).
        """
        generator, dimension = self.generator(_FIGURES), self.law.dimension
        shown = self.law.shown()
        groups: list[Tensor | None] = [None] if shown is None else list(shown)
        count = _SHOWN["draws"] // len(groups)
        arrays: dict[str, list[Any]] = {}

        def add(**parts: Tensor) -> None:
            for name, part in parts.items():
                arrays.setdefault(name, []).append(part.numpy())

        for context in groups:
            rows = None if context is None else context.expand(count, -1)
            y = self.law.reference(rows, count, generator)
            stages = _checked_stages(method, y, rows, generator)
            law = Quadrature.of(self.law, context, rounds=rounds[-1])
            density = law.density(grid(self.law, _SHOWN["cells"][dimension]))[[0, rounds[-1]]]
            add(
                reference=y,
                exact=self.law.round(rounds[-1], rows, count, generator),
                moved=torch.stack([stages[number] for number in rounds]),
                density=density,
            )
            if isinstance(method, Flowing):
                lines, places = _SHOWN["lines"], grid(self.law, _SHOWN["arrows"][dimension]).float()
                times = torch.linspace(0, 1, _SHOWN["times"])
                spread = None if context is None else context.expand(len(places), -1)
                add(
                    path=method.trajectory(y[:lines], None if rows is None else rows[:lines], times),
                    states=method.trajectory(y, rows, torch.tensor([0.0, 0.5, 1.0])),
                    velocity=torch.stack([method.velocity(t, places, spread) for t in (0.0, 0.5, 1.0)]),
                )
        axis = {"reference": 0, "exact": 0, "moved": 1, "density": 1, "path": 1, "states": 1, "velocity": 1}
        stacked: dict[str, NDArray[Any]] = {
            name: np.stack(parts, axis[name]).astype(np.float32) for name, parts in arrays.items()
        }
        stacked["density"] = stacked["density"].astype(np.float16)
        if shown is not None:
            stacked["context"] = shown.numpy()
        if "path" in stacked:
            stacked["times"] = np.linspace(0, 1, _SHOWN["times"], dtype=np.float32)
            stacked["places"] = grid(self.law, _SHOWN["arrows"][dimension]).numpy().astype(np.float32)
        return stacked


def _checked_stages(method: Mover, y: Tensor, context: Tensor | None, generator: torch.Generator) -> dict[int, Tensor]:
    if isinstance(method, Staged):
        stages = method.stages(y, context, generator)
    else:
        stages = {1: method.move(y, context, generator)}
    for number, outputs in stages.items():
        if outputs.shape != y.shape or not bool(torch.isfinite(outputs).all()):
            raise ValueError(
                f"{type(method).__name__} must give finite outputs {tuple(y.shape)} in round {number}: got "
                f"{tuple(outputs.shape)}, {int((~torch.isfinite(outputs)).sum())} values not finite"
            )
    return {number: outputs.detach().float().cpu() for number, outputs in stages.items()}


def _save(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
