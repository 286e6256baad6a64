"""Sets of judged candidates as flat arrays, and the picks of a method among them as weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pfm.statistics import Array, Bootstrap, Estimate, length_controlled, win_share, win_share_among

__all__ = ["Choices"]

ALL_PAIRS = 2_000_000  # comparisons of picks with other candidates, beyond which length control is left out
SHUFFLES = 20
_STREAM = 0x5F  # apart from other draws by the same seed


@dataclass
class Choices:
    """I sets of candidates as flat arrays (M,); a method is a weight on each candidate, 1 in all a set.

    Attributes:
        prompt: (I,) the number of each set's prompt, 0 to P - 1; sets of one prompt are resampled together.
        size: (I,) candidates a set, at least 1.
        score: (M,) the judge's scores, finite, higher is better.
        length: (M,) lengths, or None where no text and no number of tokens is known.
        text: M texts, or None.
        costs: by column, (M,) what each candidate cost; less is better.
        selectors: by name, (M,) weights; equal best scores share the weight.
        undecided: by selector, at how many sets of several candidates its scores are all equal.
    """

    prompt: NDArray[np.int64]
    size: NDArray[np.int64]
    score: Array
    length: Array | None = None
    text: list[str] | None = None
    costs: dict[str, Array] = field(default_factory=dict)
    selectors: dict[str, Array] = field(default_factory=dict)
    undecided: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = np.cumsum(self.size) - self.size
        self.owner = np.repeat(np.arange(len(self.size)), self.size)
        self._sets = np.bincount(self.prompt)

    @property
    def prompts(self) -> int:
        """Count the prompts P."""
        return len(self._sets)

    def best(self, values: Array) -> Array:
        """Return the weights (M,) of choosing the highest of values (M,); equal ones share the weight."""
        is_best = values == np.maximum.reduceat(values, self.start)[self.owner]
        return is_best / np.add.reduceat(is_best.astype(np.float64), self.start)[self.owner]

    def at(self, place: NDArray[np.int64]) -> Array:
        """Return the weights (M,) of picking the candidate at a place (I,) of each set, counted from 0."""
        weights = np.zeros(self.owner.size)
        weights[self.start + place] = 1.0
        return weights

    def random(self) -> Array:
        """Return the weights (M,) of a random candidate."""
        return (1.0 / self.size)[self.owner]

    def shuffled(self, weights: Array, seed: int) -> Array:
        """Permute weights (M,) within each set, and average over :data:`SHUFFLES` permutations."""
        rng = np.random.default_rng([seed, _STREAM])
        orders = (np.lexsort((rng.random(weights.size), self.owner)) for _ in range(SHUFFLES))
        return sum((weights[order] for order in orders), np.zeros(weights.size)) / SHUFFLES

    def by_prompt(self, weights: Array, values: Array) -> Array:
        """Return the expected value (M,) of a pick, averaged over each prompt's sets: (P,)."""
        return np.bincount(self.prompt, np.add.reduceat(weights * values, self.start)) / self._sets

    def score_of(self, weights: Array) -> Array:
        """Return the mean judge score (P,) of a method's picks."""
        return self.by_prompt(weights, self.score)

    # -- picks against the other candidates of their set --------------------------------------------------------------

    def win(self, weights: Array, bootstrap: Bootstrap) -> Estimate | None:
        """Estimate the share of the other candidates of its set that a pick beats, ties half."""
        several = self.size > 1
        share = np.concatenate(
            [win_share_among(part) if len(part) > 1 else np.zeros(1) for part in np.split(self.score, self.start[1:])]
        )
        top = np.bincount(self.prompt, np.add.reduceat(weights * share, self.start), minlength=self.prompts)
        counted = np.bincount(self.prompt, several.astype(np.float64), minlength=self.prompts)
        return bootstrap.share(top / self._sets, counted / self._sets)

    def win_at_equal_length(self, weights: Array, bootstrap: Bootstrap) -> Estimate | None:
        """Estimate :meth:`win` between candidates of equal length (:func:`pfm.statistics.length_controlled`)."""
        several = self.size > 1
        picked = np.flatnonzero((weights > 0) & several[self.owner])
        others = self.size[self.owner[picked]] - 1
        if self.length is None or not picked.size or others.sum() > ALL_PAIRS:
            return None
        first = np.repeat(picked, others)
        within = np.arange(others.sum()) - np.repeat(np.cumsum(others) - others, others)
        second = self.start[self.owner[first]] + within
        second += second >= first  # the candidate itself is no opponent
        of_set = self.owner[first]
        share = weights[first] / (self.size[of_set] - 1) / self._sets[self.prompt[of_set]]
        used = np.bincount(self.prompt[of_set], minlength=self.prompts) > 0
        if not used.all():  # prompts without an opponent have no comparison to resample
            bootstrap = Bootstrap(int(used.sum()), bootstrap.resamples, bootstrap.seed)
        place = np.cumsum(used) - 1
        return length_controlled(
            win_share(self.score[first], self.score[second]),
            self.length[first] - self.length[second],
            bootstrap,
            owner=place[self.prompt[of_set]],
            weight=share,
        )

    def length_ratio(self, weights: Array, bootstrap: Bootstrap) -> Estimate | None:
        """Estimate the length of a pick over the mean length of its set's candidates."""
        if self.length is None:
            return None
        mean = np.add.reduceat(self.length, self.start) / self.size
        return bootstrap.mean(self.by_prompt(weights, self.length / np.maximum(mean, 1e-9)[self.owner]))
