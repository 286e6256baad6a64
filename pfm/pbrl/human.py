"""Human preferences between recorded segments that begin in different states.

A flow carries outputs of one context, and here the two segments of a pair have none in common: the state is part of
what was judged. So a pair is encoded without a context, and an output is the whole state-action segment, pooled over
its steps. Such pairs are for preference models and for b, which say how good a segment is; a flow on them would move
states too, which no policy can. What a model learned from them can then label segments from one state: a
:class:`PeopleReward` scores whatever is known of each step.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfm._internal.checks import check_choice, check_finite, check_number, check_shape
from pfm.data.encoded import EncodedPairs
from pfm.preferences.logistic import pairwise_log_loss
from pfm.preferences.newton import newton_logistic

__all__ = ["PARTS", "POOLINGS", "HumanSegments", "PeopleReward"]

PARTS = ("both", "observations", "actions")
POOLINGS = ("mean", "mean+std")
PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
ARRAYS = ("observations", "actions", "rewards", "episode", "human_i1", "human_i2", "human_label", "segment_len")


@dataclass(frozen=True)
class HumanSegments:
    """Holds recorded transitions and people's preferences between segments of them.

    Args:
        observations: (T, O). actions: (T, A), taken there. rewards: (T,), which the people did not see as numbers.
        episode: (T,) which episode a transition belongs to.
        first, second: (N,) the transitions at which the two segments of a pair begin.
        label: (N,) probability that the first is preferred: 1, 0, or 0.5 for a tie.
        length: H, steps of a segment. It may run over an episode's end into the next one.

    Raises:
        ValueError: shapes disagree, a segment runs over the end of the data, or values are not finite.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    episode: np.ndarray
    first: np.ndarray
    second: np.ndarray
    label: np.ndarray
    length: int

    def __post_init__(self) -> None:
        steps, count = len(self.observations), len(self.first)
        if count == 0:
            raise ValueError("first and second hold no pairs: at least one is needed")
        for name, ndim, rows in (("observations", 2, steps), ("actions", 2, steps), ("rewards", 1, steps),
                                 ("episode", 1, steps), ("second", 1, count), ("label", 1, count)):  # fmt: skip
            value = getattr(self, name)
            if value.ndim != ndim or len(value) != rows:
                raise ValueError(f"{name} must have {ndim} dimensions and {rows} rows: got {value.shape}")
        for name in ("observations", "actions"):
            check_finite(name, getattr(self, name))
        if not ((self.label >= 0) & (self.label <= 1)).all():
            raise ValueError("label must lie in [0, 1]: 0.5 is a tie")
        for name in ("first", "second"):
            begins = getattr(self, name)
            if (begins < 0).any() or (begins + self.length > steps).any():
                raise ValueError(f"{name} must lie in 0..{steps - self.length}, so that {self.length} steps follow")

    @classmethod
    def load(cls, path: str | Path, *, straddling: bool = True) -> HumanSegments:
        """Read the human labels of an .npz file of the D4RL kind, such as ``door_human_prefs.npz``.

        Args:
            path: the file: observations, actions, rewards, episode, human_i1, human_i2, human_label (0 the first, 1
                the second, -1 a tie) and segment_len.
            straddling: keep pairs in which a segment runs over an episode's end.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it holds something else.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}: give the file of recorded segments and human labels")
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in ARRAYS}
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise ValueError(f"{path} must hold {', '.join(ARRAYS)}: {error}") from error
        label = np.select([found["human_label"] == 0, found["human_label"] == 1], [1.0, 0.0], 0.5)
        segments = cls(
            found["observations"], found["actions"], found["rewards"], found["episode"],
            found["human_i1"].astype(np.int64), found["human_i2"].astype(np.int64), label, int(found["segment_len"]),
        )  # fmt: skip
        if straddling:
            return segments
        whole = segments.episodes()
        return segments.select((whole[:, 0] == whole[:, 1]) & (whole[:, 2] == whole[:, 3]))

    def __len__(self) -> int:
        return len(self.first)

    def select(self, index: Any) -> HumanSegments:
        """Take the pairs at ``index`` (integers or a mask); all transitions stay."""
        return replace(self, first=self.first[index], second=self.second[index], label=self.label[index])

    def episodes(self) -> np.ndarray:
        """Return the episodes at the first and last steps of both segments of each pair, (N, 4)."""
        ends = [begin + offset for begin in (self.first, self.second) for offset in (0, self.length - 1)]
        return np.stack([self.episode[end] for end in ends], axis=1)

    def split(self, held_out: float = 0.4, seed: int = 0) -> tuple[HumanSegments, HumanSegments]:
        """Split by episode into (train, held out): no transition is on both sides.

        A pair belongs to a side only if both its segments do, so about ``held_out`` squared of the pairs are held out,
        and those between the sides are in neither.

        Raises:
            ValueError: ``held_out`` is not in (0, 1), or a side would hold no pairs.
        """
        held_out = check_number("held_out", held_out, above=0, below=1)
        names = np.unique(self.episode)
        out = np.random.default_rng(seed).permutation(names)[: max(round(held_out * len(names)), 1)]
        inside = np.isin(self.episodes(), out)
        train, check = ~inside.any(1), inside.all(1)
        if not train.any() or not check.any():
            raise ValueError(
                f"of {len(names)} episodes, held_out={held_out} leaves {int(train.sum())} pairs to train on and "
                f"{int(check.sum())} to judge by: both need some"
            )
        return self.select(train), self.select(check)

    def returns(self) -> np.ndarray:
        """Return the sums of the rewards of both segments of each pair, (N, 2)."""
        total = np.concatenate([[0.0], np.cumsum(self.rewards.astype(np.float64))])
        return np.stack([total[begin + self.length] - total[begin] for begin in (self.first, self.second)], axis=1)

    def differences(self, values: np.ndarray, steps: int | None = None) -> np.ndarray:
        """Return the mean of values (T, F) of single steps over each pair's first segment less that over its second.

        A linear reward of steps orders segments by these differences. ``steps`` counts only so many from a segment's
        beginning; None for all.

        Returns:
            (N, F) float64.

        Raises:
            ValueError: ``values`` has not one row a transition, or ``steps`` is not in 1..length.
        """
        count = self.length if steps is None else steps
        check_shape("values", values, (len(self.observations), "F"), "one row a step")
        if not 1 <= count <= self.length:
            raise ValueError(f"steps must lie in 1..{self.length}, the segments' length: got {steps}")
        total = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0, dtype=np.float64)])
        one, other = (total[begin + count] - total[begin] for begin in (self.first, self.second))
        return (one - other) / count

    def outputs(self, part: str = "both", pooling: str = "mean") -> tuple[Tensor, Tensor]:
        """Return both segments of each pair as vectors (N, D), pooled over their steps.

        Args:
            part: ``"both"`` observations and actions, or one of them.
            pooling: ``"mean"``, on which a linear reward is a reward a step; ``"mean+std"`` appends the spread.
        """
        check_choice("part", part, PARTS)
        check_choice("pooling", pooling, POOLINGS)
        kept = {"observations": [self.observations], "actions": [self.actions]}.get(
            part, [self.observations, self.actions]
        )
        values = np.concatenate(kept, axis=1)
        pooled = []
        for begins in (self.first, self.second):
            steps = values[begins[:, None] + np.arange(self.length)]
            vectors = [steps.mean(1)] + ([steps.std(1)] if pooling == "mean+std" else [])
            pooled.append(torch.from_numpy(np.concatenate(vectors, axis=1).astype(np.float32)))
        return pooled[0], pooled[1]

    def encode(self, part: str = "both", pooling: str = "mean") -> EncodedPairs:
        """Turn the pairs into outputs without a context; a tie is half a label each way.

        Raises:
            ValueError: all pairs are ties.
        """
        if (self.label == 0.5).all():
            raise ValueError(f"all {len(self)} pairs are ties: nothing can be learned from them")
        one, other = self.outputs(part, pooling)
        forward = torch.from_numpy(self.label >= 0.5)[:, None]
        certain = np.maximum(self.label, 1 - self.label)
        return EncodedPairs(
            torch.where(forward, one, other), torch.where(forward, other, one),
            probability=None if (certain == 1).all() else torch.from_numpy(certain.astype(np.float32)),
            encoder={"kind": "state-action segments", "part": part, "pooling": pooling, "length": self.length},
        )  # fmt: skip

    def accuracy(self, score: Callable[[Tensor], Tensor], part: str = "both", pooling: str = "mean") -> float:
        """Return the share of the decided pairs that a score orders as people did, equal scores counting half.

        Args:
            score: outputs (N, D) to scores (N,), higher is better, such as a flow's ``win_probability``.

        Raises:
            ValueError: all pairs are ties.
        """
        decided = self.label != 0.5
        if not decided.any():
            raise ValueError(f"all {len(self)} pairs are ties: there is no order to agree with")
        one, other = self.outputs(part, pooling)
        with torch.no_grad():
            gap = np.sign((score(one) - score(other)).numpy())[decided]
        return float((0.5 + 0.5 * gap * np.sign(self.label[decided] - 0.5)).mean())


@dataclass(frozen=True)
class PeopleReward:
    """Scores steps, or means over steps, by a linear Bradley–Terry reward that people's choices were fitted with.

    P(first preferred) = sigmoid(mean reward of its steps - mean reward of the other's): a reward is in log-odds of a
    segment all of whose steps have it. The reward a step is B-Pref's (arXiv 2111.03026, section 3), here linear.

    Args:
        weights: (F,) of the values that a step is described by.
        penalty: on the squared weights of standardised values, as it was chosen.
    """

    weights: np.ndarray
    penalty: float

    @classmethod
    def fit(
        cls,
        segments: HumanSegments,
        differences: np.ndarray,
        *,
        penalties: tuple[float, ...] = PENALTIES,
        folds: int = 4,
        seed: int = 0,
    ) -> PeopleReward:
        """Fit on people's labels, a tie counting half each way.

        Args:
            segments: N labelled pairs.
            differences: (N, F) between their segments, from :meth:`HumanSegments.differences`.
            penalties: to choose from, by the loss on pairs with a segment in episodes of which no pair was fitted.
            folds: into how many parts the episodes fall for that. seed: of the parts.

        Raises:
            ValueError: shapes disagree, values are not finite, or all pairs are ties.
        """
        check_shape("differences", differences, (len(segments), "F"), "one row a pair")
        check_finite("differences", differences)
        if (segments.label == 0.5).all():
            raise ValueError(f"all {len(segments)} pairs are ties: nothing can be learned from them")
        scale = np.sqrt(np.square(differences).mean(0))
        scale = np.where(scale > 1e-12, scale, np.inf)  # what never differs has no weight
        x, label = torch.from_numpy(differences / scale), torch.from_numpy(segments.label.astype(np.float64))

        def solve(rows: Tensor, each: float, start: Tensor | None = None) -> Tensor:
            # The penalty is on the mean loss, Newton's precision on half of the sum.
            share = torch.full((int(rows.sum()),), 1 / int(rows.sum()), dtype=torch.float64)
            return newton_logistic(x[rows], label[rows], share, 2 * each, start=start)[0]

        path = sorted(penalties, reverse=True)
        loss = np.zeros(len(path))
        names = np.random.default_rng(seed).permutation(np.unique(segments.episodes()))
        for part in np.array_split(names, folds) if len(path) > 1 else ():
            out = torch.from_numpy(np.isin(segments.episodes(), part).any(1))
            if out.any() and not out.all():
                weights = None
                for place, each in enumerate(path):
                    weights = solve(~out, each, weights)
                    loss[place] += pairwise_log_loss(x[out] @ weights, probability=label[out]) * int(out.sum())
        penalty = path[int(loss.argmin())]
        return cls(solve(torch.ones(len(x), dtype=torch.bool), penalty).numpy() / scale, penalty)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return rewards (...) of values (..., F), or what differences (N, F) are worth."""
        return np.asarray(values, dtype=np.float64) @ self.weights
