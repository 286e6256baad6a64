"""Samples with their scores, split by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.core.data import MissingDataError
from benchmarks.same_generator.instructions import score
from benchmarks.same_generator.openings import continuation, liking
from benchmarks.same_generator.samples import Sample, read_samples
from pfm import PreferencePairs

__all__ = ["FOLDS", "PARTS", "SENTIMENT", "Scored", "fold_of", "load_scored", "pairs_of", "plain_samples", "scored"]

PARTS = ("instructions", "sentiment")
SENTIMENT = "sentiment"  # the kind of openings
FOLDS = 3


@dataclass(frozen=True)
class Scored:
    """Holds the answers to one prompt.

    Attributes:
        sample: as it was drawn. texts: n answers as they are judged.
        scores: (n,) what choices are measured by. labels: (n,) what preferences come from; of instructions the same.
    """

    sample: Sample
    texts: list[str]
    scores: NDArray[np.float64]
    labels: NDArray[np.float64]

    @property
    def name(self) -> str:
        """Name the prompt."""
        return self.sample.name


def scored(samples: Sequence[Sample]) -> list[Scored]:
    """Score answers: those to instructions by their checks, continuations by two judges of other data.

    Raises:
        MissingDataError: there are continuations, and the reviews that the judges learn from are absent.
    """
    found, begun = [], [sample for sample in samples if sample.kind == SENTIMENT]
    for sample in samples:
        if sample.kind != SENTIMENT:
            checked = np.array([score(sample.kind, sample.params, text) for text in sample.texts])
            found.append(Scored(sample, list(sample.texts), checked, checked))
    texts = [[continuation(text) or text for text in sample.texts] for sample in begun]
    if begun:
        flat = [text for row in texts for text in row]
        bounds = np.cumsum([len(row) for row in texts])[:-1]
        judged, labels = (np.split(liking(corpus, flat), bounds) for corpus in ("imdb", "rt_polarity"))
        found += [Scored(*row) for row in zip(begun, texts, judged, labels, strict=True)]
    return found


def load_scored(folder: Path, part: str, name: str = "plain") -> list[Scored]:
    """Read and score the samples of a part, "instructions" or "sentiment".

    Raises:
        MissingDataError: they are absent. ValueError: there is no such part, or the file is damaged.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}: got {part!r}")
    return scored([one for one in read_samples(folder / name) if (one.kind == SENTIMENT) == (part == SENTIMENT)])


def plain_samples(folder: Path, part: str) -> list[Scored]:
    """Read the plain samples of a part, enough to be split.

    Raises:
        MissingDataError: there are fewer than one prompt a fold. ValueError: as for :func:`load_scored`.
    """
    rows = load_scored(folder, part)
    if len(rows) < FOLDS:
        raise MissingDataError(
            f"{folder} has samples of {len(rows)} prompts of part {part!r}, and {FOLDS} folds need as many: draw more "
            "with python -m benchmarks.same_generator.sample"
        )
    return rows


def fold_of(name: str, seed: int) -> int:
    """Deal every three prompts of a kind into the three folds, in an order that depends on the seed.

    So every kind is in every fold, and more prompts leave those that are there where they are.
    """
    kind, _, instance = name.rpartition("-")
    block, place = divmod(int(instance), FOLDS)
    order = np.random.default_rng([seed, block, *kind.encode()]).permutation(FOLDS)
    return int(order[place])


def pairs_of(train: Sequence[Scored], most: int | None = None, seed: int = 0) -> PreferencePairs:
    """Pair the answers of each prompt by their labels, at most ``most`` pairs drawn at random.

    Prompts whose answers are all alike teach nothing and are left out.

    Raises:
        ValueError: there is no other.
    """
    useful = [row for row in train if len(set(row.labels.tolist())) > 1 and len(set(row.texts)) > 1]
    if not useful:
        raise ValueError("the answers to every training prompt have equal labels: make more samples")
    return PreferencePairs.from_scores(
        [row.sample.prompt for row in useful], [row.texts for row in useful], [row.labels for row in useful],
        max_pairs_per_prompt=most, seed=seed,
    )  # fmt: skip
