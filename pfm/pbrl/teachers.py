"""Scripted teachers: who says which of two action segments from one state is the better one.

The six of B-Pref (Lee, Smith, Dragan and Abbeel, "B-Pref: Benchmarking Preference-Based Reinforcement Learning",
arXiv 2111.03026, section 4) are settings of one :class:`Teacher`. What a teacher sees is a segment's return together
with what comes after it; thresholds and rationality are in units of the segments' own differences, so that one
setting means the same in every environment, also where rewards are negative.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pfm._internal.checks import check_number

__all__ = ["TEACHERS", "Teacher", "all_comparisons", "difference_unit"]

TEACHERS: dict[str, dict[str, float]] = {
    "oracle": {},
    "mistake": {"mistake": 0.1},
    "noisy": {"beta": 1.0},
    "skip": {"skip": 0.1},
    "myopic": {"gamma": 0.9},
    "equal": {"equal": 0.1},
}
"""The settings of B-Pref's teachers by their names."""


@dataclass(frozen=True)
class Teacher:
    """Labels comparisons of two segments by their values: 1 first better, 0 second, 0.5 equal, NaN skipped.

    The unit of values is :func:`difference_unit` of the segments that are compared.

    Args:
        beta: rationality of the Bradley-Terry choice P = sigmoid(beta (v - v') / unit); infinity picks the larger
            value always. At beta = 1 about 70% of the labels are right for Gaussian values.
        mistake: probability of a flipped answer, in [0, 1].
        skip: share of the comparisons that get no answer, those whose better segment is worst; in [0, 1).
        equal: differences of at most this many units are answered "equal"; >= 0. Exact ties always are.
        gamma: discount backwards from the segment's end, in (0, 1]: reward k of H counts gamma^(H - 1 - k).

    Raises:
        ValueError: a setting out of its range.
    """

    beta: float = math.inf
    mistake: float = 0.0
    skip: float = 0.0
    equal: float = 0.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_number("beta", self.beta, above=0, also=(math.inf,))
        check_number("mistake", self.mistake, least=0, most=1)
        check_number("skip", self.skip, least=0, below=1)
        check_number("equal", self.equal, least=0)
        check_number("gamma", self.gamma, above=0, most=1)

    @classmethod
    def named(cls, name: str | Teacher, **changes: float) -> Teacher:
        """Make one of B-Pref's teachers by its name, with some settings changed; a teacher is passed through.

        Raises:
            ValueError: no teacher has this name.
        """
        if isinstance(name, Teacher):
            return name
        if name not in TEACHERS:
            near = difflib.get_close_matches(str(name), TEACHERS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TEACHERS)}"
            raise ValueError(f"there is no teacher {name!r}: {hint}")
        return cls(**{**TEACHERS[name], **changes})

    def perceive(self, rewards: Any, after: Any) -> np.ndarray:
        """Return the values (...) that this teacher sees: rewards (..., H) and what comes after a segment (...)."""
        rewards = np.asarray(rewards, dtype=np.float64)
        weights = self.gamma ** np.arange(rewards.shape[-1] - 1, -1, -1)
        return rewards @ weights + np.asarray(after, dtype=np.float64)

    def label(self, values: Any, compared: Any = None, *, seed: int = 0) -> np.ndarray:
        """Label comparisons.

        Args:
            values: (N, M) the values of M segments from each of N states.
            compared: (L, 3) integers, rows (state, first, second); None for :func:`all_comparisons`.
            seed: the same seed gives the same answers.

        Returns:
            (L,) float32 labels: 1, 0, 0.5 or NaN.

        Raises:
            ValueError: ``values`` is not (N, M) with M >= 2, or holds NaN or infinity.
        """
        values = np.asarray(values, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] < 2:
            raise ValueError(f"values must be (N, M), at least two segments a state: got {values.shape}")
        if not np.isfinite(values).all():
            row = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise ValueError(f"values must be finite: row {row} is {values[row].tolist()}")
        compared = all_comparisons(*values.shape) if compared is None else np.asarray(compared)
        first, second = values[compared[:, 0], compared[:, 1]], values[compared[:, 0], compared[:, 2]]
        unit = difference_unit(values)
        random = np.random.default_rng(seed)
        gap = first - second
        # Both draws are made whatever the settings, so that teachers differ by their settings alone.
        chance, slip = random.random(len(gap)), random.random(len(gap))
        if math.isinf(self.beta):
            label = (gap > 0).astype(np.float32)
        else:
            label = (chance < 0.5 * (1 + np.tanh(self.beta * gap / (2 * unit)))).astype(np.float32)
        label = np.where(slip < self.mistake, 1 - label, label)
        label = np.where(np.abs(gap) <= self.equal * unit, 0.5, label)
        if self.skip > 0:
            best = np.maximum(first, second)
            worst = np.argsort(best, kind="stable")[: round(self.skip * len(best))]
            label[worst] = np.nan
        return label.astype(np.float32)


def all_comparisons(states: int, members: int) -> np.ndarray:
    """Return every comparison of two of M members of N states: (N M (M - 1) / 2, 3) rows (state, first, second)."""
    first, second = np.triu_indices(members, 1)
    state = np.repeat(np.arange(states), len(first))
    return np.stack([state, np.tile(first, states), np.tile(second, states)], axis=1)


def difference_unit(values: np.ndarray) -> float:
    """Return the mean absolute difference between members of one state, of values (N, M); 1 if all are equal."""
    compared = all_comparisons(*values.shape)
    gap = values[compared[:, 0], compared[:, 1]] - values[compared[:, 0], compared[:, 2]]
    return float(np.abs(gap).mean()) or 1.0
