"""What is measured on choices among judged candidates, from numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pfm.statistics import Bootstrap, Estimate, length_controlled, win_share

__all__ = ["ChoiceTable", "SeedBootstrap", "interquartile_mean"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ChoiceTable:
    """Holds I test items of n candidates each, the first of which is the original, and what one method chose.

    Attributes:
        group: (I,) str, the prompt; items of one prompt are resampled together.
        draw: (I,) which draw of the prompt's candidates.
        scores: (I, n) the judge's scores, higher is better.
        independent: (I,) score of a further draw that no method could choose.
        lengths: (I, n) characters.
        changed: (I, n) whether the text differs from the original.
        weights: (I, n) probability that the method chooses each candidate, rows sum to 1.
    """

    group: NDArray[np.str_]
    draw: NDArray[np.int64]
    scores: Array
    independent: Array
    lengths: Array
    changed: NDArray[np.bool_]
    weights: Array

    def save(self, path: Path) -> None:
        """Write all arrays to one .npz file, and beside them ``index`` (I,): what is chosen, −1 where that is drawn."""
        index = np.where(self.weights.max(1) == 1, self.weights.argmax(1), -1)
        with path.open("wb") as file:
            np.savez_compressed(file, index=index, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: Path) -> ChoiceTable:
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{f.name: arrays[f.name] for f in fields(cls)})

    @classmethod
    def join(cls, tables: Sequence[ChoiceTable]) -> ChoiceTable:
        """Put tables one after the other; groups of different tables stay apart, whatever their names."""
        columns: dict[str, Any] = {
            f.name: np.concatenate([getattr(table, f.name) for table in tables]) for f in fields(cls)
        }
        columns["group"] = np.concatenate(
            [np.char.add(f"{number}/", table.group) for number, table in enumerate(tables)]
        )
        return cls(**columns)

    def same_items(self, other: ChoiceTable) -> bool:
        """Tell whether two methods chose among the same candidates."""
        return all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("group", "draw", "scores", "independent", "lengths")
        )

    def choosing(self, weights: Array) -> ChoiceTable:
        """Return the same items with other choices (I, n)."""
        return replace(self, weights=weights)

    # -- prompts ------------------------------------------------------------------------------------------------

    @cached_property
    def owner(self) -> NDArray[np.int64]:
        """Number the prompt of each item, (I,), prompts in order of appearance."""
        _, first, inverse = np.unique(self.group, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[inverse]

    @property
    def prompts(self) -> int:
        """Count the prompts P."""
        return int(self.owner.max()) + 1

    def by_prompt(self, values: Array) -> Array:
        """Average values (I, n) over what the method chooses, and over each prompt's items: (P,)."""
        expected = (self.weights * values).sum(1)
        return np.bincount(self.owner, expected) / np.bincount(self.owner)

    # -- figures ------------------------------------------------------------------------------------------------

    def score(self) -> Array:
        """Return the judge's mean score of what is chosen, (P,)."""
        return self.by_prompt(self.scores)

    def gap(self) -> tuple[Array, Array]:
        """Give what is chosen above a random candidate, and the gap from random to the judge's own pick: (P,) each."""
        random = self.choosing(np.full_like(self.weights, 1 / self.scores.shape[1])).score()
        best = np.bincount(self.owner, self.scores.max(1)) / np.bincount(self.owner)
        return self.score() - random, best - random

    def measure(self, bootstrap: Bootstrap) -> dict[str, Estimate | None]:
        """Return every figure with its interval.

        ``score``: the judge's mean score. ``gap_closed``: share of the gap from a random candidate to the judge's own
        pick that the score closes; None where there is no gap. ``win``: share won against the original, ties half.
        ``win_independent``: against an independent draw. ``win_controlled``: against the original at equal length;
        None where length and method cannot be told apart. ``changed``: share of texts that differ from the original.
        ``length_ratio``: geometric mean of length / length of the original.
        """
        # A text cannot win against itself, whatever a noisy judge says.
        win = np.where(self.changed, win_share(self.scores, self.scores[:, :1]), 0.5)
        log_ratio = np.log(self.lengths / self.lengths[:, :1])
        weights = self.weights / np.bincount(self.owner)[self.owner][:, None]
        return {
            "score": bootstrap.mean(self.score()),
            "gap_closed": bootstrap.ratio(*self.gap()),
            "win": bootstrap.mean(self.by_prompt(win), (0.0, 1.0)),
            "win_independent": bootstrap.mean(
                self.by_prompt(win_share(self.scores, self.independent[:, None])), (0.0, 1.0)
            ),
            "win_controlled": length_controlled(
                win.ravel(),
                (self.lengths - self.lengths[:, :1]).ravel(),
                bootstrap,
                owner=self.owner.repeat(self.scores.shape[1]),
                weight=weights.ravel(),
                changed=self.changed.ravel(),
            ),
            "changed": bootstrap.mean(self.by_prompt(self.changed.astype(float)), (0.0, 1.0)),
            "length_ratio": _exp(bootstrap.mean(self.by_prompt(log_ratio))),
        }


def _exp(estimate: Estimate) -> Estimate:
    return Estimate(math.exp(estimate.value), math.exp(estimate.low), math.exp(estimate.high))


class SeedBootstrap(Bootstrap):
    """Resamples seeds, each with all of its prompts; where there is one seed only, its prompts.

    What a seed's figure owes to its own prompts is part of its difference from the other seeds' figures. Drawing
    prompts anew within a drawn seed would count that twice. Prompts that several seeds share count as given.

    Args:
        seed_of: (n,) the seed that each prompt's figures come from.
        resamples, seed: as for :class:`pfm.statistics.Bootstrap`.
    """

    def __init__(self, seed_of: NDArray[np.int64], resamples: int = 2000, seed: int = 0) -> None:
        self.n, self.resamples, self.seed = len(seed_of), resamples, seed
        _, self._seed_of = np.unique(seed_of, return_inverse=True)
        seeds = int(self._seed_of.max()) + 1
        if seeds == 1:
            self._seed_of, seeds = np.arange(self.n), self.n
        rng = np.random.default_rng(seed)
        self._drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples).astype(np.float64)

    def sums(self, values: object) -> Array:
        """Sum per-prompt values over each resample: (n,) or (n, K) -> (resamples, K)."""
        columns = np.asarray(values, dtype=np.float64).reshape(self.n, -1)
        of_seed = np.zeros((self._drawn.shape[1], columns.shape[1]))
        np.add.at(of_seed, self._seed_of, columns)
        return self._drawn @ of_seed

    def units(self, used: object) -> NDArray[np.int64]:
        """Count the seeds (of one seed the prompts) in use: (n,) or (n, K) booleans -> (K,)."""
        columns = np.asarray(used, dtype=bool).reshape(self.n, -1)
        return np.array([len(np.unique(self._seed_of[column])) for column in columns.T])


def interquartile_mean(values: Array) -> Any:
    """Return the mean (...) of values (..., n) without the highest and the lowest quarter, rounded down."""
    ordered = np.sort(values)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)
