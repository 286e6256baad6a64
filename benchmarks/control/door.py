"""Offline control from people's own labels: python -m benchmarks.control.door --out runs/door (needs PFM_DATA).

People chose between recorded segments of a hand that opens a door (``adroit_door_prefs``); there is no simulator.
Episodes are split in two halves. On one a policy is cloned, what people chose is read, and segments that the cloned
policy and its own residuals propose are labelled by that reading; methods learn from these pairs as they do online. On
the other half everything is judged by a reading of the labels there, which shares no transition with the first.

A reading says what added actions are worth in a state, and there are three:

- "segments": a Bradley-Terry reward of steps, of state and action together, as in B-Pref;
- "residuals": the same, of the state and of what the action adds to the cloned one;
- "ahead": a reward of states alone, and a regression of what it came to over the next steps on what was added.

Measured, for several splits: what people's labels say of actions once states are known; what each reading foretells of
held-out episodes; what the methods gain by the held-out judge, how far they go, and how far from what people did.

    python -m benchmarks.control.door --out runs/door --seeds 5
    python -m benchmarks.control.door --out runs/door --report     # tables and plot of the splits that are there

A split takes some minutes; those that are in the folder are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from torch.nn.functional import softplus

from benchmarks.baselines.networks import Network, fit_early_stopped, pair_loss
from benchmarks.control.config import (
    ControlAscentConfig,
    ControlBestOfConfig,
    ControlCloneConfig,
    ControlFlowConfig,
    ControlMethodConfig,
    ControlShiftConfig,
)
from benchmarks.control.door_report import write_report
from benchmarks.control.learning import ControlData, ControlMethod
from benchmarks.core.bench import Bench
from benchmarks.core.data import MissingDataError, data_folder
from benchmarks.methods.control.ascent import SegmentAscent
from benchmarks.methods.control.best_of import SegmentBestOf
from benchmarks.methods.control.clone import Clone
from benchmarks.methods.control.flow import FlowRefinement
from benchmarks.methods.control.reference import Reference
from benchmarks.methods.control.shift import Shift
from pfm import EncodedPairs
from pfm._internal.files import replace_json
from pfm.pbrl import ClonedPolicy, HumanSegments, PeopleReward, SegmentPairs

__all__ = ["READINGS", "Measured", "Reading", "Split", "load_segments", "main", "measure", "pairs_of", "read"]

Array = NDArray[np.float64]

READINGS = ("segments", "residuals", "ahead")
HELD_OUT = 0.5  # of the episodes: judge and judged read about as many labels
LENGTH = 5  # steps of the segments that methods learn from
AHEAD = 25  # steps over which a reward of states is averaged
HORIZONS = (10, 25, 50)  # the last is what people saw of a segment
LEADING = 3  # coordinates of the state with which the worth of an action may turn
SHARE = 0.5  # of a product of action and coordinate in a regression, so that the plain action comes first
RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0)
FOLDS = 4
EVERY = 2  # transitions between two states that segments are proposed in
STRENGTHS = [0.5, 1.0, 2.0, 4.0]
SUPPORT = 0.99  # quantile of people's own distances from the cloned policy
SHUFFLES = 10


def load_segments() -> HumanSegments:
    """Read the recorded doors and people's labels, actions cut at the bounds as the hand does.

    Raises:
        MissingDataError: the data are absent.
    """
    segments = HumanSegments.load(data_folder("adroit_door_prefs") / "door_human_prefs.npz")
    return replace(segments, actions=np.clip(segments.actions, -1.0, 1.0))


# -- one split ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Holds two halves of the episodes, and the policy that was cloned on the first.

    ``added`` (T, A) is what people's actions add to the cloned ones, in standard deviations over the training episodes;
    there the policy was cloned on other episodes. ``state`` (T, O) is standardised, ``leading`` (T, L) its leading
    coordinates. A transition's side is 0 for training, 1 for held out.
    """

    train: HumanSegments
    held: HumanSegments
    side: NDArray[np.int64]
    policy: ClonedPolicy
    base: Array
    added: Array
    unit: Array
    state: Array
    leading: Array
    seed: int

    @classmethod
    def of(cls, segments: HumanSegments, seed: int, *, epochs: int = 30) -> Split:
        """Split by episode, and clone."""
        train, held = segments.split(HELD_OUT, seed)
        inside = _episodes(train, held)
        seen, acted, episode = segments.observations, segments.actions, segments.episode
        bound = np.abs(acted).max()
        space = Box(-bound, bound, acted.shape[1:], np.float32)

        def cloned(rows: NDArray[np.bool_]) -> ClonedPolicy:
            return ClonedPolicy.fit(seen[rows], acted[rows], action_space=space, epochs=epochs, seed=seed)

        rows = np.isin(episode, inside[0])
        policy = cloned(rows)
        base = policy.propose(seen, True)[:, 0].astype(np.float64)
        left = acted - base
        for part in _folds(inside[0], seed):
            out = np.isin(episode, part)
            left[out] = acted[out] - cloned(rows & ~out).propose(seen[out], True)[:, 0]
        unit = np.sqrt(np.square(left[rows]).mean(0))
        with torch.no_grad():  # residuals of episodes that were left out, in place of rows
            policy.log_std.copy_(torch.from_numpy(unit / bound).log()[None])
        spread = seen[rows].std(0)
        state = ((seen - seen[rows].mean(0)) / np.where(spread > 1e-6, spread, 1.0)).astype(np.float64)
        axes = np.linalg.svd(state[rows], full_matrices=False)[2][:LEADING].T
        leading = state @ axes
        side = np.where(rows, 0, np.where(np.isin(episode, inside[1]), 1, -1))
        return cls(train, held, side, policy, base, left / unit, unit, state, leading / leading[rows].std(0), seed)

    @property
    def episode(self) -> NDArray[Any]:
        """Return the episode of each transition, (T,)."""
        return self.train.episode

    @cached_property
    def following(self) -> NDArray[np.int64]:
        """Count the transitions of the same episode from each on, itself included: (T,)."""
        last = np.append(np.flatnonzero(np.diff(self.episode)), len(self.episode) - 1)
        return last[np.searchsorted(last, np.arange(len(self.episode)))] + 1 - np.arange(len(self.episode))

    def labelled(self, side: int) -> HumanSegments:
        """Return the labelled pairs of one side."""
        return self.held if side else self.train

    def rows(self, side: int, following: int = 1) -> NDArray[np.int64]:
        """Return the transitions of one side that so many transitions of their episode begin with."""
        return np.flatnonzero((self.side == side) & (self.following >= following))

    def chunks(self, rows: NDArray[np.int64], values: Array, length: int = LENGTH) -> Array:
        """Return the values (B, H, ...) of the steps that begin at rows (B,)."""
        return values[rows[:, None] + np.arange(length)]


def _episodes(*sides: HumanSegments) -> list[NDArray[Any]]:
    """Return the episodes of which each side has pairs."""
    return [np.unique(side.episodes()) for side in sides]


def _folds(episodes: NDArray[Any], seed: int) -> list[NDArray[Any]]:
    return np.array_split(np.random.default_rng(seed).permutation(episodes), FOLDS)


# -- what labels say of actions -------------------------------------------------------------------------------------


def features(leading: Array, added: Array) -> Array:
    """Return added actions (B, A) and their products with the state's leading coordinates (B, L): (B, A (1 + L))."""
    return np.concatenate([added, *(SHARE * each[:, None] * added for each in leading.T)], axis=1)


@dataclass(frozen=True)
class Reading:
    """Says what added actions are worth: linear in them, with weights (A (1 + L),) that turn with the state."""

    weights: Array

    def score(self, leading: Array, added: Array) -> Array:
        """Return the worth (B,), 0 for nothing added, of added actions (B, A) in units of people's own."""
        return features(leading, added) @ self.weights

    def slope(self, leading: Array) -> Array:
        """Return the gradient (B, A) of the worth."""
        own, *turned = np.split(self.weights, 1 + leading.shape[1])
        return own + SHARE * leading @ np.stack(turned)


def read(split: Split, kind: str, side: int, *, without: NDArray[Any] | None = None, ahead: int = AHEAD) -> Reading:
    """Read the labels of one side; ``without`` leaves episodes out, ``ahead`` is how many steps the kind "ahead" sees.

    Raises:
        ValueError: there is no such reading.
    """
    if kind not in READINGS:
        raise ValueError(f"kind must be one of {', '.join(READINGS)}: got {kind!r}")
    labelled = _without(split.labelled(side), without)
    if kind == "ahead":
        rows, came = came_after(split, labelled, side, without, ahead=ahead)
        x = features(split.leading[rows], split.chunks(rows, split.added).mean(1))
        return Reading(_ridge_by_episode(x, came, split.episode[rows], split.seed))
    described = features(split.leading, split.added if kind == "residuals" else _whole(split))
    both = labelled.differences(np.concatenate([split.state, described], axis=1))
    return Reading(PeopleReward.fit(labelled, both, seed=split.seed).weights[split.state.shape[1] :])


def came_after(
    split: Split,
    labelled: HumanSegments,
    side: int,
    without: NDArray[Any] | None = None,
    *,
    motion: bool = False,
    ahead: int = AHEAD,
) -> tuple[NDArray[np.int64], Array]:
    """Return transitions (B,) of one side, and how far the next states were above what was to be expected there (B,).

    How good states are, the people of ``labelled`` say; what is to be expected after a state, a regression on other
    episodes of the side. With ``motion`` it is also told how the state changed over the last step and the last five:
    what is seen holds no velocities, and where an action leads is partly where the hand was moving anyway.
    """
    reward = PeopleReward.fit(labelled, labelled.differences(split.state), seed=split.seed)(split.state)
    rows = split.rows(side, max(ahead + 1, LENGTH))
    if without is not None:
        rows = rows[~np.isin(split.episode[rows], without)]
    came = split.chunks(rows + 1, reward, ahead).mean(1)
    state = split.state[rows]
    if motion:
        moved = []
        for back, scale in ((1, 10.0), (5, 3.0)):
            before = np.maximum(rows - back, 0)
            before = np.where(split.episode[before] == split.episode[rows], before, rows)
            moved.append((state - split.state[before]) * scale)
        state = np.concatenate([state, *moved], axis=1)
    x = np.concatenate([state, np.tanh(state), 0.3 * state**2, np.ones((len(rows), 1))], axis=1)
    left, episode = came.copy(), split.episode[rows]
    for part in _folds(np.unique(episode), split.seed):
        out = np.isin(episode, part)
        left[out] -= x[out] @ _ridge(x[~out], came[~out], 0.1)
    return rows, left


def _whole(split: Split) -> Array:
    """Return people's actions in the unit of what they add to the cloned ones, about their mean in training."""
    acted = split.train.actions / split.unit
    return acted - acted[split.side == 0].mean(0)


def _without(labelled: HumanSegments, episodes: NDArray[Any] | None) -> HumanSegments:
    return labelled if episodes is None else labelled.select(~np.isin(labelled.episodes(), episodes).any(1))


def _ridge(x: Array, y: Array, penalty: float) -> Array:
    system: Array = x.T @ x / len(y) + penalty * np.eye(x.shape[1])
    return np.asarray(np.linalg.solve(system, x.T @ y / len(y)), dtype=np.float64)


def _ridge_by_episode(x: Array, y: Array, episode: NDArray[Any], seed: int) -> Array:
    """Regress with the penalty that does best on episodes that were left out."""
    lost = np.zeros(len(RIDGES))
    for part in _folds(np.unique(episode), seed):
        out = np.isin(episode, part)
        lost += [np.square(y[out] - x[out] @ _ridge(x[~out], y[~out], each)).sum() for each in RIDGES]
    return _ridge(x, y, RIDGES[int(lost.argmin())])


def what_labels_say(split: Split, *, network: bool = True) -> dict[str, Any]:
    """Return which held-out pairs are ordered as people did, from more and more of what there is to know.

    Of each description: 1, 0 or one half for each decided pair, and its log loss. "acted elsewhere" is the control:
    actions of other transitions. A network is B-Pref's reward, of single steps.
    """
    acted, added = split.train.actions.astype(np.float64), split.added
    elsewhere = np.roll(acted, len(acted) // 2, axis=0)
    progress = (split.following[:, None] / -100.0).astype(np.float64)

    def opening(side: HumanSegments) -> Array:
        return side.differences(split.state, steps=1)

    described: dict[str, Callable[[HumanSegments], Array]] = {
        "steps left": lambda side: side.differences(progress),
        "states": lambda side: side.differences(split.state),
        "states, actions": lambda side: side.differences(np.concatenate([split.state, acted], 1)),
        "states, residuals": lambda side: side.differences(np.concatenate([split.state, added], 1)),
        "states, acted elsewhere": lambda side: side.differences(np.concatenate([split.state, elsewhere], 1)),
        "actions": lambda side: side.differences(acted),
        "residuals": lambda side: side.differences(added),
        "first state": opening,
        "first state, actions": lambda side: np.concatenate([opening(side), side.differences(acted)], 1),
        "first state, residuals": lambda side: np.concatenate([opening(side), side.differences(added)], 1),
    }
    margins = {}
    for name, differences in described.items():
        reward = PeopleReward.fit(split.train, differences(split.train), seed=split.seed)
        margins[name] = reward(differences(split.held))
    if network:
        for name, values in (("states", split.state), ("states, actions", np.concatenate([split.state, acted], 1))):
            margins[f"network: {name}"] = _network_margins(split, values)
    decided = split.held.label != 0.5
    label = split.held.label[decided]
    return {
        "cluster": split.held.episodes()[decided, 0].tolist(),
        "right": {name: _agrees(margin[decided], label).tolist() for name, margin in margins.items()},
        "loss": {
            name: (np.logaddexp(0, margin[decided]) - label * margin[decided]).tolist()
            for name, margin in margins.items()
        },
    }


def _agrees(margin: Array, label: Array) -> Array:
    return 0.5 + 0.5 * np.sign(margin) * np.sign(label - 0.5)


def _network_margins(split: Split, values: Array, every: int = 5) -> Array:
    """Fit a network's reward of single steps on the training pairs; give its margins (N,) on the held-out ones."""
    table = torch.from_numpy(values.astype(np.float32))
    network = Network(values.shape[1], 0, seed=split.seed)
    network.mean.copy_(table[split.side == 0].mean(0))
    network.spread.copy_(table[split.side == 0].std(0).clamp_min(1e-6))

    def margin(side: HumanSegments, index: torch.Tensor) -> torch.Tensor:
        begins = torch.from_numpy(np.stack([side.first, side.second], 1))[index]  # (B, 2)
        steps = table[begins[..., None] + torch.arange(0, side.length, every)]
        reward = network(steps.flatten(0, 2), None).view(steps.shape[:3]).mean(2)
        return reward[:, 0] - reward[:, 1]

    probability = torch.from_numpy(split.train.label.astype(np.float32))
    one, other = split.train.outputs()
    fit_early_stopped(
        network,
        lambda index: pair_loss(lambda m: softplus(-m), margin(split.train, index), probability[index]),
        EncodedPairs(one, other),
        seed=split.seed,
        rows=128,
        learning_rate=1e-3,
    )
    with torch.no_grad():
        return margin(split.held, torch.arange(len(split.held))).double().numpy()


# -- proposals and methods ------------------------------------------------------------------------------------------


def pairs_of(split: Split, reading: Reading, *, every: int = EVERY) -> SegmentPairs:
    """Propose two segments in training states, and have them labelled by a reading.

    A proposal is what the cloned policy does along the recorded states, with the residuals added that it had somewhere
    else in training.
    """
    random = np.random.default_rng([split.seed, 1])
    possible = split.rows(0, LENGTH)
    rows = possible[::every]
    drawn = possible[random.integers(len(possible), size=(len(rows), 2))]
    plan = split.chunks(rows, split.base)
    bound = split.policy.action_space.high.astype(np.float64)
    reference = np.repeat(plan[:, None], 2, axis=1)
    residual = np.stack([split.chunks(drawn[:, each], split.added) for each in (0, 1)], axis=1) * split.unit
    actions = np.clip(reference + residual, -bound, bound)
    worth = [
        reading.score(split.leading[rows], ((actions - reference)[:, each] / split.unit).mean(1)) for each in (0, 1)
    ]
    count = (len(rows), 2)
    return SegmentPairs(
        observation=split.train.observations[rows], actions=actions.astype(np.float32),
        rewards=np.zeros((*count, LENGTH), np.float32), after=np.stack(worth, axis=1),
        steps=np.full(count, LENGTH, np.int32), trajectory=split.episode[rows].astype(np.int64),
        low=-bound.astype(np.float32), high=bound.astype(np.float32), reference_actions=reference.astype(np.float32),
        plan=plan.astype(np.float32), meta={"environment": "adroit_door", "correlation": 0.0},
    ).relabel("oracle")  # fmt: skip


def _named(config: Any, **settings: Any) -> Any:
    return config(name="door", family="", label="", **settings)


def _flow(**settings: Any) -> Callable[[], ControlMethod]:
    chosen = {"mode": "single", "choose": False, "strengths": STRENGTHS, "candidates": [1]} | settings
    return lambda: FlowRefinement(_named(ControlFlowConfig, **chosen))


METHODS: dict[str, Callable[[], ControlMethod]] = {
    "clone": lambda: Reference(_named(ControlMethodConfig)),
    "noise": lambda: Reference(_named(ControlMethodConfig, kind="stochastic")),
    "best of 8": lambda: SegmentBestOf(_named(ControlBestOfConfig)),
    "mean shift": lambda: Shift(_named(ControlShiftConfig, strengths=STRENGTHS)),
    "mean shift by a network": lambda: Shift(_named(ControlShiftConfig, model="network", strengths=STRENGTHS)),
    "ascent": lambda: SegmentAscent(_named(ControlAscentConfig, members=3, lengths=[0.25, 0.5, 1.0, 2.0])),
    "BC of winners": lambda: Clone(_named(ControlCloneConfig, form="residual", strengths=STRENGTHS)),
    "flow": _flow(),
    "flow, choosing among 8": _flow(candidates=[8], strengths=[1.0, 2.0]),
    "flow, best of 8": _flow(draws=8, flow={"best_of": 8}),
    "labels shuffled": _flow(labels="shuffled", strengths=[1.0]),
    "labels swapped": _flow(labels="swapped", strengths=[1.0]),
}
"""Every one learns from the same pairs; the flow that chooses is fitted as the flow is."""

FEW = ("mean shift by a network", "flow")
"""What learns from the readings that are there for comparison."""


@dataclass(frozen=True)
class Measured:
    """Judges policies on the held-out side."""

    split: Split
    judges: dict[str, Reading]

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        return self.split.rows(1)

    @cached_property
    def came(self) -> tuple[NDArray[np.int64], Array]:
        """Return transitions of the held-out side, and what came after them above what was to be expected."""
        return came_after(self.split, self.split.held, 1)

    @cached_property
    def radius(self) -> float:
        """Return how far from the cloned policy 99% of what people did there lies, in root mean square units."""
        return float(np.quantile(self.far(self.split.added[self.rows]), SUPPORT))

    @staticmethod
    def far(added: Array) -> Array:
        """Return the root mean square (B,) of added actions (B, A)."""
        return np.sqrt(np.square(added).mean(1))

    def of(self, policy: Any) -> dict[str, list[float]]:
        """Return sums over the steps of each held-out episode: gains by each judge, and distances.

        A gain is in standard deviations of the judge's score over what people did there. "bound" is the gain of steps
        as long straight along the judge's own slope. "came" needs no judge of actions: products of how far people went
        the policy's way, and of what came after that, standardised.
        """
        split, rows = self.split, self.rows
        acted = np.asarray(policy.predict(split.train.observations[rows], None, None, True)[0], dtype=np.float64)
        added = (acted - split.base[rows]) / split.unit
        leading, far = split.leading[rows], self.far(added)
        values: dict[str, Array] = {
            "steps": np.ones(len(rows)),
            "moved": far,
            "off support": (far > self.radius).astype(np.float64),
            "from people": self.far((acted - split.train.actions[rows]) / split.unit),
        }
        for kind, judge in self.judges.items():
            spread = judge.score(leading, split.added[rows]).std()
            score = judge.score(leading, added)
            longest = np.linalg.norm(judge.slope(leading), axis=1) * far * np.sqrt(added.shape[1])
            values[f"gain: {kind}"] = score / spread
            values[f"bound: {kind}"] = longest / spread
            values[f"better: {kind}"] = (score > 0) + 0.5 * (score == 0)
        after, came = self.came
        place = np.searchsorted(rows, after)
        alike = (split.chunks(after, split.added).mean(1) * added[place]).sum(1)
        sums = {name: self._by_episode(value) for name, value in values.items()}
        episode = split.episode[after]
        return sums | {
            "came": _products(alike, came, episode),
            "came steps": [int((episode == name).sum()) for name in np.unique(episode)],
        }

    def _by_episode(self, value: Array) -> list[float]:
        names, member = np.unique(self.split.episode[self.rows], return_inverse=True)
        return np.bincount(member, value, minlength=len(names)).tolist()


def foretold(split: Split, readings: dict[str, Reading], judges: dict[str, Reading]) -> dict[str, Any]:
    """Return what the readings of one side say of the other: agreement, and what really came after people's actions.

    "came" are sums over each held-out episode of products of standardised scores and outcomes, whose mean is a
    correlation; how good an outcome is, the people of the held-out side say. "judge" is the same for the judges, on
    episodes of their own side that they had not read.
    """
    rows, came = came_after(split, split.held, 1)
    episode, names = split.episode[rows], np.unique(split.episode[rows])
    leading, added = split.leading[rows], split.chunks(rows, split.added).mean(1)

    def products(score: Array, outcome: Array = came) -> list[float]:
        return _products(score, outcome, episode)

    random = np.random.default_rng([split.seed, 2])
    anywhere = added[random.permutation(len(added))]
    steps = [int((episode == name).sum()) for name in names]
    found: dict[str, Any] = {"steps": steps, "came": {}, "judge": {}, "shuffled": []}
    found["agreement"] = {
        kind: float(np.corrcoef(reading.score(leading, anywhere), judges[kind].score(leading, anywhere))[0, 1])
        for kind, reading in readings.items()
    }
    for kind, reading in readings.items():
        found["came"][kind] = products(reading.score(leading, added))
        score = np.zeros(len(rows))
        for part in _folds(np.unique(split.held.episodes()), split.seed):
            out = np.isin(episode, part)
            score[out] = read(split, kind, 1, without=part).score(leading[out], added[out])
        found["judge"][kind] = products(score)
    _, unforeseen = came_after(split, split.held, 1, motion=True)
    found["motion known"] = products(readings["ahead"].score(leading, added), unforeseen)
    for number in range(SHUFFLES):
        mixed = replace(split.train, label=_coins(split.train.label, SHUFFLES * split.seed + number))
        shuffled = read(replace(split, train=mixed), "ahead", 0)
        found["shuffled"].append(products(shuffled.score(leading, added)))
    return found


def horizons(split: Split) -> dict[str, Any]:
    """Return what readings that look so many steps ahead foretell of the held-out side, as :func:`foretold` does."""
    found = {}
    for ahead in HORIZONS:
        rows, came = came_after(split, split.held, 1, ahead=ahead)
        score = read(split, "ahead", 0, ahead=ahead).score(split.leading[rows], split.chunks(rows, split.added).mean(1))
        episode = split.episode[rows]
        steps = [int((episode == name).sum()) for name in np.unique(episode)]
        found[str(ahead)] = {"came": _products(score, came, episode), "steps": steps}
    return found


def _products(score: Array, outcome: Array, episode: NDArray[Any]) -> list[float]:
    """Return sums over episodes of products of standardised values, of which the correlation is the mean."""
    if score.std() == 0:
        return [0.0] * len(np.unique(episode))
    z = (score - score.mean()) / score.std() * (outcome - outcome.mean()) / outcome.std()
    return [float(z[episode == name].sum()) for name in np.unique(episode)]


def _coins(label: Array, seed: int) -> Array:
    """Turn each label round with probability one half."""
    return np.where(np.random.default_rng([seed, 3]).random(len(label)) < 0.5, label, 1 - label)


def judge_accuracy(split: Split) -> dict[str, Any]:
    """Return how judges of pairs order pairs of their own side, in episodes that they had not read."""
    found: dict[str, Any] = {"cluster": [], "right": {"states": [], "segments": [], "residuals": []}}
    for part in _folds(np.unique(split.held.episodes()), split.seed):
        inside = np.isin(split.held.episodes(), part).all(1) & (split.held.label != 0.5)
        if not inside.any():
            continue
        fitted, left = _without(split.held, part), split.held.select(inside)
        found["cluster"] += left.episodes()[:, 0].tolist()
        for kind, more in (("states", None), ("segments", _whole(split)), ("residuals", split.added)):
            values = split.state if more is None else np.concatenate([split.state, features(split.leading, more)], 1)
            reward = PeopleReward.fit(fitted, fitted.differences(values), seed=split.seed)
            found["right"][kind] += _agrees(reward(left.differences(values)), left.label).tolist()
    return found


def measure(
    segments: HumanSegments,
    seed: int,
    *,
    methods: dict[str, Callable[[], ControlMethod]] | None = None,
    every: int = EVERY,
    epochs: int = 30,
    network: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure everything on one split; JSON values.

    Args:
        segments: recorded transitions and labels. seed: of the split and of all that is fitted.
        methods: to be compared; None for all of :data:`METHODS`.
        every, epochs, network: how many states, how long cloning takes at most, and whether to fit B-Pref's network.
        report: is told each step.
    """
    began = time.perf_counter()
    report("cloning")
    split = Split.of(segments, seed, epochs=epochs)
    readings = {kind: read(split, kind, 0) for kind in READINGS}
    measured = Measured(split, {kind: read(split, kind, 1) for kind in READINGS})
    report("labels")
    outside = split.held.actions[measured.rows]
    left = np.square(split.base[measured.rows] - outside).sum() / np.square(outside - outside.mean(0)).sum()
    result: dict[str, Any] = {
        "seed": seed,
        "pairs": [len(split.train), len(split.held)],
        "clone_r2": float(1 - left),
        "radius": measured.radius,
        "labels": what_labels_say(split, network=network),
        "judges": judge_accuracy(split),
        "foretold": foretold(split, readings, measured.judges),
        "horizons": horizons(split),
        "methods": {},
    }
    known = METHODS if methods is None else methods
    for kind in READINGS:
        pairs = pairs_of(split, readings[kind], every=every)
        result["states"] = len(pairs)
        data = ControlData(pairs, split.policy, lambda: None, 0, None, seed)
        for name, make in known.items():
            if kind != "ahead" and name not in FEW:
                continue
            report(f"{kind}: {name}")
            method = make()
            notes = method.learn(data, Bench("", "", seed, False))
            found = [{"settings": each.settings, **measured.of(each.policy)} for each in method.candidates()]
            result["methods"].setdefault(kind, {})[name] = {"found": found, "notes": _finite(notes)}
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def _finite(value: Any) -> Any:
    """Replace what JSON cannot hold."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


# -- command --------------------------------------------------------------------------------------------------------


def _numbers(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main() -> int:
    """Measure the splits that are missing; write results.json, door.md and door.png."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.control.door",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/door"), help="folder of the results (runs/door)")
    parser.add_argument("--seeds", type=_numbers, default=3, help="how many splits (3)")
    parser.add_argument("--report", action="store_true", help="measure nothing, report the splits in the folder")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if not arguments.report:
        try:
            segments = load_segments()
        except (MissingDataError, FileNotFoundError) as error:
            print(error, file=sys.stderr)
            return 1
        _measure_missing(segments, arguments.seeds, out)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("split-*.json"))]
    if not results:
        print(f"there are no splits in {out}: run without --report first", file=sys.stderr)
        return 1
    print(write_report(results, out))
    return 0


def _measure_missing(segments: HumanSegments, seeds: int, out: Path) -> None:
    from tqdm.auto import tqdm

    missing = [seed for seed in range(seeds) if not (out / f"split-{seed:02d}.json").is_file()]
    out.mkdir(parents=True, exist_ok=True)
    steps = 2 + len(METHODS) + len(FEW) * (len(READINGS) - 1)
    with tqdm(total=steps * len(missing), unit="step", disable=not missing) as bar:
        for seed in missing:

            def tell(what: str, seed: int = seed) -> None:
                bar.set_description(f"split {seed}, {what}")
                bar.update()

            replace_json(out / f"split-{seed:02d}.json", measure(segments, seed, report=tell))


if __name__ == "__main__":
    sys.exit(main())
