"""``task=mnist`` and ``task=digits``: a method moves draws of a frozen generator, and independent judges measure."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.core.bench import Bench, Outcome
from benchmarks.core.errors import UnsuitableMethodError
from benchmarks.images.config import ImagesConfig
from benchmarks.images.data import DIGITS, Part, Split, load_images
from benchmarks.images.generator import Draws, Generator, GeneratorSettings, load_generator
from benchmarks.images.judges import Judges, load_judges
from benchmarks.images.lesson import Lesson
from benchmarks.images.measures import Measures, Reference
from pfm.statistics import Estimate

__all__ = ["Images", "Mover", "Prepared"]

SHOWN = 4  # images of each digit that are kept for the report
MIN_DIVERSITY = 0.8  # of the generator's, which a chosen setting must have
MAX_PRECISION_LOSS = 0.02  # of the generator's precision that a chosen setting may lose


@runtime_checkable
class Mover(Protocol):
    """Is what a method must be for these tasks."""

    def learn(self, lesson: Lesson, bench: Bench) -> dict[str, Any]:
        """Learn from the lesson; return what is worth noting, as JSON values."""
        ...

    def move(self, draws: Draws, seed: int) -> dict[str, tuple[Tensor, int]]:
        """Return, by setting, images (N, 1, S, S) in [0, 1] made of N draws, and the generator calls a draw."""
        ...


@dataclass(frozen=True)
class Images:
    """Moves draws of a generator; the score is the independent judge's mean probability of the right digit.

    Of a method's settings one is chosen on validation draws: the one that the labelling judge likes best among those
    that keep at least 80% of the generator's diversity within a digit and lose at most .02 of its precision; where
    none does, the one of the largest diversity. The independent judge has no part in it.
    """

    name: str
    config: ImagesConfig
    seed: int

    def run(self, method: object, bench: Bench) -> Outcome:
        """Let a method learn and move, and measure all of its settings.

        Raises:
            TypeError: the method does not move images. ValueError: its images are of another shape or range.
        """
        if not isinstance(method, Mover):
            raise UnsuitableMethodError(f"{type(method).__name__} does not move images, which this task needs")
        for name in ("sets", "candidates", "validation", "tested", "real"):
            if getattr(self.config, name) < 2:
                raise ValueError(f"task.{name} must be at least 2: got {getattr(self.config, name)}")
        marks = [time.perf_counter()]
        ready = self.prepared(bench.progress)
        split, judges, generator, lesson = ready.split, ready.judges, ready.generator, ready.lesson
        marks.append(time.perf_counter())
        notes = method.learn(lesson, bench)
        marks.append(time.perf_counter())
        real = Part(split.test.images[: self.config.real], split.test.digits[: self.config.real])
        held, tested = (
            Measures(judges, Reference(self._draws(generator, count, part), real), self.config.neighbours)
            for part, count in ((1, self.config.validation), (2, self.config.tested))
        )
        before = held.choice(held.reference.draws.images)
        choices = {
            name: held.choice(judges.check(name, images))
            for name, (images, _) in method.move(held.reference.draws, self.seed + 1).items()
        }
        chosen = _choose(choices, before["precision"])
        began = time.process_time()
        moved = method.move(tested.reference.draws, self.seed + 2)
        took = time.process_time() - began
        marks.append(time.perf_counter())
        figures: dict[str, Estimate | None] = {}
        for name, (images, calls) in moved.items():
            figures |= {f"{name}.{figure}": value for figure, value in tested(images).items()}
            figures[f"{name}.calls"] = Estimate(calls, calls, calls)
        # Names of settings hold points, as in "x1.5", and one may begin another.
        of_chosen = {figure: v for figure, v in figures.items() if figure.rpartition(".")[0] == chosen}
        figures |= {figure.rpartition(".")[2]: value for figure, value in of_chosen.items()}
        marks.append(time.perf_counter())
        right = figures["right"]
        assert right is not None
        return Outcome(
            kind="images",
            score=right.value,
            figures=figures,
            seconds=dict(zip(("load", "learn", "move", "measure"), np.diff(marks).round(3).tolist(), strict=True)),
            about={
                "data": split.name,
                "size": split.size,
                "tested": len(tested.reference.draws),
                "sets": self.config.sets,
                "candidates": self.config.candidates,
                "generator": ready.quality,
                "accuracies": judges.accuracies,
                "chosen": chosen,
                "validation": choices,
                "milliseconds": round(1000 * took / (len(moved) * len(tested.reference.draws)), 4),
            },
            notes=notes,
            save=lambda path: _save(path, tested.reference.draws, moved[chosen][0]),
        )

    def prepared(self, progress: bool) -> Prepared:
        """Load or train the judges and the generator, and draw the lesson of the seed."""
        return _prepared(self.name, json.dumps(asdict(self.config)), self.seed, progress)

    def _draws(self, generator: Generator, count: int, part: int) -> Draws:
        return generator.draw(torch.arange(DIGITS).repeat_interleave(count), 1_000_003 * part + self.seed)


@dataclass(frozen=True)
class Prepared:
    """Holds what all methods of one seed share."""

    split: Split
    judges: Judges
    generator: Generator
    quality: dict[str, Any]
    lesson: Lesson


@lru_cache(maxsize=1)
def _prepared(name: str, settings: str, seed: int, progress: bool) -> Prepared:
    """Load or train all that methods of one seed share; a sweep over methods does it once a seed."""
    config = json.loads(settings)
    split = load_images(name)
    judges = load_judges(split, epochs=config["judge_epochs"], progress=progress)
    given = config["generator"]
    sizes = GeneratorSettings(**{**given, "widths": tuple(given["widths"])})
    generator, quality = load_generator(split, sizes, judges.labelling.right, progress)
    sets = config["sets"] if config["limit"] is None else min(config["limit"], config["sets"])
    described = {"data": name, **given, "sets": sets, "candidates": config["candidates"]}
    lesson = Lesson.drawn(generator, judges.labelling, sets, config["candidates"], seed, described)
    return Prepared(split, judges, generator, quality, lesson)


def _choose(choices: dict[str, dict[str, float]], precision: float) -> str:
    """Choose a setting on validation draws, as :class:`Images` says."""
    allowed = [
        name
        for name, found in choices.items()
        if found["diversity"] >= MIN_DIVERSITY and found["precision"] >= precision - MAX_PRECISION_LOSS
    ]
    if not allowed:
        return max(choices, key=lambda name: choices[name]["diversity"])
    return max(allowed, key=lambda name: choices[name]["labelled"])


def _save(path: Path, draws: Draws, images: Tensor) -> None:
    count = len(draws) // DIGITS
    rows = (torch.arange(DIGITS)[:, None] * count + torch.arange(min(SHOWN, count))).flatten()
    shown: dict[str, NDArray[np.uint8]] = {
        name: (255 * part[rows, 0]).round().byte().numpy()
        for name, part in (("before", draws.images), ("after", images))
    }
    np.savez_compressed(path, **shown)  # pyright: ignore[reportArgumentType]
