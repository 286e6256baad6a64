"""Tasks of one kind: a method chooses among candidates of unseen prompts, and a judge it cannot see has scored them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.core.bench import Bench, Outcome
from benchmarks.core.errors import UnsuitableMethodError
from benchmarks.core.measures import ChoiceTable
from pfm import EncodedPairs, PreferencePairs
from pfm.encoders import Encoder
from pfm.statistics import Bootstrap

__all__ = [
    "Chooser",
    "Item",
    "Selection",
    "candidate_vectors",
    "draw_candidates",
    "limited",
    "one_hot",
    "split_prompts",
]


@dataclass(frozen=True)
class Item:
    """Holds what a method may choose from, once.

    Attributes:
        group: name of the prompt.
        draw: number of this draw of the prompt's candidates.
        prompt: its text; None where there is none to read.
        candidates: n texts, the original first.
        scores: (n,) the judge's scores, higher is better. No method but the oracle may read them.
        independent: the judge's score of one more draw.
    """

    group: str
    draw: int
    prompt: str | None
    candidates: list[str]
    scores: NDArray[np.float64]
    independent: float


@runtime_checkable
class Chooser(Protocol):
    """Is what a method must be for these tasks; ``reads_vectors`` says whether it is fitted at all."""

    reads_vectors: bool

    def fit(self, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        """Learn from the training pairs; return what is worth noting, as JSON values."""
        ...

    def choose(self, items: Sequence[Item], encoder: Encoder) -> NDArray[np.float64]:
        """Return the probability (I, n) with which each candidate of each item is chosen."""
        ...


@dataclass(frozen=True)
class Selection:
    """A loaded task: labelled pairs of some prompts, and items of others.

    Attributes:
        train: labelled pairs; no prompt of ``items`` is among theirs.
        items: what is tested, all with the same number of candidates.
        judge: who has scored the items.
        unit: what the score counts, as an axis label.
        percent: whether scores are shares, shown in percent.
    """

    train: PreferencePairs
    items: list[Item]
    judge: str
    unit: str
    percent: bool

    def run(self, method: object, bench: Bench) -> Outcome:
        """Fit a method, let it choose, and measure its choices.

        Raises:
            TypeError: the method does not choose among candidates.
        """
        if not isinstance(method, Chooser):
            raise UnsuitableMethodError(
                f"{type(method).__name__} does not choose among candidates, which this task needs"
            )
        marks, notes = [time.perf_counter()], {}
        if method.reads_vectors:
            train = self.train.encode(bench.encoder, progress=bench.progress)
            candidate_vectors(self.items, bench.encoder, progress=bench.progress)  # into the cache, and timed
            marks.append(time.perf_counter())
            if bench.flips:
                train = train.flip_labels(bench.flips, bench.seed)
            notes = method.fit(train, bench)
        else:
            marks.append(marks[0])
        marks.append(time.perf_counter())
        table = self.table(method.choose(self.items, bench.encoder))
        marks.append(time.perf_counter())
        figures = table.measure(Bootstrap(table.prompts))
        score = figures["score"]
        assert score is not None
        return Outcome(
            kind="selection",
            score=score.value,
            figures=figures,
            seconds=dict(zip(("encode", "fit", "choose"), np.diff(marks).round(3).tolist(), strict=True)),
            about={
                "judge": self.judge,
                "unit": self.unit,
                "percent": self.percent,
                "training_pairs": len(self.train),
                "test_prompts": table.prompts,
                "test_items": len(self.items),
                "candidates": int(table.scores.shape[1]),
            },
            notes=notes,
            save=table.save,
        )

    def table(self, weights: NDArray[np.float64]) -> ChoiceTable:
        """Join items and choices (I, n), without the texts."""
        texts = [item.candidates for item in self.items]
        return ChoiceTable(
            group=np.array([item.group for item in self.items]),
            draw=np.array([item.draw for item in self.items]),
            scores=np.stack([item.scores for item in self.items]),
            independent=np.array([item.independent for item in self.items]),
            lengths=np.array([[len(text) for text in row] for row in texts], dtype=np.float64),
            changed=np.array([[text != row[0] for text in row] for row in texts]),
            weights=weights,
        )


def candidate_vectors(items: Sequence[Item], encoder: Encoder, *, progress: bool = False) -> Tensor:
    """Encode the candidates of all items, each text once: (I, n, D)."""
    rows: dict[str, int] = {}
    places = [[rows.setdefault(text, len(rows)) for text in item.candidates] for item in items]
    return encoder.encode(list(rows), progress=progress)[torch.tensor(places)]


def one_hot(index: Sequence[int], count: int) -> NDArray[np.float64]:
    """Turn chosen places (I,) into certain choices (I, count)."""
    return np.eye(count)[np.asarray(index)]


# -- what the loaders of such tasks share -----------------------------------------------------------------------


def limited(names: Iterable[str], limit: int | None) -> list[str]:
    """Keep ``limit`` names, the same whatever the seed of the run."""
    ordered = sorted(names)
    if limit is None or limit >= len(ordered):
        return ordered
    return sorted(np.random.default_rng(0).permutation(ordered)[:limit].tolist())


def split_prompts(names: Iterable[str], test_share: float, seed: int) -> tuple[list[str], list[str]]:
    """Split distinct names at random into (train, test), at least one on each side.

    Raises:
        ValueError: there are fewer than two names.
    """
    ordered = sorted(set(names))
    if len(ordered) < 2:
        raise ValueError(f"{len(ordered)} prompt cannot be split: raise task.limit")
    count = min(max(round(test_share * len(ordered)), 1), len(ordered) - 1)
    shuffled = np.random.default_rng(seed).permutation(ordered).tolist()
    return sorted(shuffled[count:]), sorted(shuffled[:count])


def draw_candidates(
    group: str,
    prompt: str | None,
    texts: Sequence[str],
    scores: Sequence[float],
    *,
    candidates: int,
    draws: int,
    seed: Sequence[int],
) -> list[Item]:
    """Draw items of one prompt: each time ``candidates`` texts in random order and one more, without replacement.

    A prompt with too few texts gives no items.
    """
    if len(texts) <= candidates:
        return []
    judged = np.asarray(scores, dtype=np.float64)
    items: list[Item] = []
    for draw in range(draws):
        order = np.random.default_rng([*seed, draw]).permutation(len(texts))[: candidates + 1]
        chosen: list[int] = order[:-1].tolist()
        items.append(Item(group, draw, prompt, [texts[i] for i in chosen], judged[chosen], float(judged[order[-1]])))
    return items
