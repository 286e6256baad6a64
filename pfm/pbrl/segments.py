"""Labelled segments of actions: M segments from the same exact state, their values, and who was preferred.

Conventions: N states, M segments (members) a state - pairs are M = 2 -, H steps a segment, A action values,
O observation values, L labelled comparisons.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pfm._internal.checks import check_choice, check_finite, check_number, check_seed, check_shape
from pfm._internal.files import replace_file
from pfm._internal.moved import renamed_method
from pfm.data.encoded import EncodedPairs
from pfm.pbrl.states import join_states, pack_states, pick_states, unpack_states
from pfm.pbrl.teachers import Teacher, all_comparisons

__all__ = ["FORMS", "SegmentPairs", "SegmentStatistics"]

FORMS = ("residual", "directions", "actions")
SUPPORT = 0.99  # quantile of the members' distances from the proposal that counts as the data's support
SMALL = 0.1  # variance of a direction, against that of the largest, from which on something was tried in it
STATE = "state."
MEMORY = "memory."
VERSION = 1


@dataclass(frozen=True)
class SegmentStatistics:
    """Holds counts and rates of a set of labelled segments; values are in the environment's reward.

    ``skipped`` and ``ties`` are shares of the comparisons, ``label_accuracy`` is the share of the other labels that
    agree with the values, ``return_accuracy`` what the segments' returns alone would reach: what a teacher gets wrong
    who does not look beyond the segment. ``margin`` is the mean absolute difference of values in a comparison,
    ``median_margin`` its median. ``member_gain`` is the mean value of the members above that of the reference's own
    deterministic segment, ``best_gain`` that of the best member of each state: what is there to be learned; both None
    if the reference's own were not run. ``ended`` is the share of segments that an episode's end cut short,
    ``at_bound`` the share of action values at a bound.
    """

    states: int
    members: int
    comparisons: int
    labels: int
    skipped: float
    ties: float
    label_accuracy: float
    return_accuracy: float
    margin: float
    median_margin: float
    member_gain: float | None
    best_gain: float | None
    ended: float
    at_bound: float


@dataclass(frozen=True)
class SegmentPairs:
    """Holds M segments from each of N states, their rewards, and labels of comparisons between them.

    Args:
        observation: (N, O) what the policy sees in each state.
        actions: (N, M, H, A) actions as executed, within the bounds. After an episode's end they repeat the last one.
        rewards: (N, M, H) rewards as executed; 0 after an episode's end.
        after: (N, M) discounted reward of what followed the segment, seen from its first step.
        steps: (N, M) steps before the episode's end, at most H.
        trajectory: (N,) which trajectory of the reference a state lies on; splits never cut one.
        low, high: (A,) bounds of the action space.
        reference_actions: (N, M, H, A) the reference's deterministic actions at the observations on the way, or
            None. ``actions - reference_actions`` is what was added to the reference.
        plan: (N, H, A) the segment of the deterministic reference itself, or None.
        plan_return, plan_value: (N,) its return, and its return with what followed; None without a plan.
        compared: (L, 3) comparisons (state, first, second); None for all pairs of members.
        label: (L,) probability that the first is preferred: 1, 0, 0.5 for a tie, NaN where nobody answered.
        states: arrays of the environment's states, see :func:`pack_states`; None if they were not kept.
        memory: the policy's own state in each, arrays (N, ...); None if it keeps none.
        discount: in (0, 1], of rewards a step.
        meta: JSON values: environment, policy, settings.

    Raises:
        ValueError: shapes disagree, values are not finite, or labels lie outside [0, 1].
    """

    observation: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    after: np.ndarray
    steps: np.ndarray
    trajectory: np.ndarray
    low: np.ndarray
    high: np.ndarray
    reference_actions: np.ndarray | None = None
    plan: np.ndarray | None = None
    plan_return: np.ndarray | None = None
    plan_value: np.ndarray | None = None
    compared: np.ndarray | None = None
    label: np.ndarray | None = None
    states: dict[str, np.ndarray] | None = None
    memory: tuple[np.ndarray, ...] | None = None
    discount: float = 1.0
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.actions.ndim != 4 or self.actions.shape[1] < 1:
            raise ValueError(f"actions must be (N, M, H, A): got {self.actions.shape}")
        n, m, h, a = self.actions.shape
        if n == 0:
            raise ValueError("actions holds no states: at least one is needed")
        if self.compared is None:
            object.__setattr__(self, "compared", all_comparisons(n, m))
        wanted: dict[str, tuple[int, ...]] = {
            "rewards": (n, m, h), "after": (n, m), "steps": (n, m), "trajectory": (n,), "low": (a,), "high": (a,),
            "reference_actions": (n, m, h, a), "plan": (n, h, a), "plan_return": (n,), "plan_value": (n,),
            "label": (len(self.comparisons),),
        }  # fmt: skip
        for name, shape in wanted.items():
            value = getattr(self, name)
            if value is not None:
                check_shape(name, value, shape, f"for actions {self.actions.shape}")
        check_shape("observation", self.observation, (n, "O"), "one row a state")
        for name in ("observation", "actions", "rewards", "after", "reference_actions", "plan"):
            value = getattr(self, name)
            if value is not None:
                check_finite(name, value)
        compared = self.comparisons
        if compared.ndim != 2 or compared.shape[1] != 3 or (compared < 0).any() or (compared >= [n, m, m]).any():
            raise ValueError(f"compared must be (L, 3) rows (state < {n}, first < {m}, second < {m})")
        if self.label is not None and ((self.label < 0) | (self.label > 1)).any():
            raise ValueError("label must lie in [0, 1], or be NaN where nobody answered")

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def comparisons(self) -> np.ndarray:
        """Return the comparisons, (L, 3) rows (state, first, second)."""
        assert self.compared is not None
        return self.compared

    @property
    def members(self) -> int:
        """Return M, the number of segments a state."""
        return self.actions.shape[1]

    @property
    def length(self) -> int:
        """Return H, the number of steps of a segment."""
        return self.actions.shape[2]

    @property
    def returns(self) -> np.ndarray:
        """Return the discounted reward of the segments alone, (N, M)."""
        return self._discounted().sum(-1)

    @property
    def values(self) -> np.ndarray:
        """Return the discounted reward of the segments and of what followed them, (N, M)."""
        return self.returns + self.after

    def saved_states(self) -> Any:
        """Return the exact states, as ``restore_states`` of a batch environment takes them.

        Raises:
            ValueError: they were not kept.
        """
        if self.states is None:
            raise ValueError("these segments carry no states of the simulator: collect them with pfm.pbrl.collect")
        return unpack_states(self.states)

    @property
    def labels(self) -> int:
        """Count the answers that a teacher gave: what these data cost."""
        return 0 if self.label is None else int(np.isfinite(self.label).sum())

    def _discounted(self) -> np.ndarray:
        return self.rewards.astype(np.float64) * self.discount ** np.arange(self.length)

    # -- labels -------------------------------------------------------------------------------------------------

    def relabel(self, teacher: str | Teacher = "oracle", *, design: str = "all", seed: int = 0) -> SegmentPairs:
        """Label the segments again; nothing is simulated.

        Args:
            teacher: a :class:`Teacher` or the name of one.
            design: ``"all"`` compares all members of a state, M (M - 1) / 2 answers; ``"knockout"`` lets winners meet
                winners, M - 1 answers, which order the best member only. They agree for M = 2.
            seed: the same seed gives the same answers.

        Raises:
            ValueError: an unknown teacher or design, or fewer than two members.
        """
        seed = check_seed(seed)
        teacher = Teacher.named(teacher)
        if self.members < 2:
            raise ValueError(f"a comparison needs two segments a state, and these have {self.members}")
        seen = teacher.perceive(self._discounted(), self.after)
        if design == "all":
            compared = all_comparisons(*seen.shape)
            label = teacher.label(seen, compared, seed=seed)
        elif design == "knockout":
            compared, label = _knockout(teacher, seen, seed)
        else:
            raise ValueError(f"design must be 'all' or 'knockout': got {design!r}")
        settings = {name: getattr(teacher, name) for name in ("mistake", "skip", "equal", "gamma")}
        settings["beta"] = None if np.isinf(teacher.beta) else teacher.beta
        return replace(
            self, compared=compared, label=label,
            meta=self.meta | {"teacher": settings, "design": design, "label_seed": seed},
        )  # fmt: skip

    def summary(self) -> SegmentStatistics:
        """Describe the labels, their noise, the margins, and what there is to be learned.

        Raises:
            ValueError: the segments carry no labels.
        """
        label = self._labelled()
        values, returns = self.values, self.returns
        state, first, second = self.comparisons.T
        gap = values[state, first] - values[state, second]
        return_gap = returns[state, first] - returns[state, second]
        answered = np.isfinite(label)
        decided = answered & (label != 0.5) & (gap != 0)
        steps = np.arange(self.length) < self.steps[..., None]
        bound = np.isclose(self.actions, self.low) | np.isclose(self.actions, self.high)
        above = None if self.plan_value is None else values - self.plan_value[:, None]
        return SegmentStatistics(
            states=len(self),
            members=self.members,
            comparisons=len(label),
            labels=self.labels,
            skipped=float(1 - answered.mean()),
            ties=float((label == 0.5).mean()),
            label_accuracy=float(((label > 0.5) == (gap > 0))[decided].mean()) if decided.any() else float("nan"),
            return_accuracy=float(_half_right(return_gap, gap)[gap != 0].mean()) if (gap != 0).any() else float("nan"),
            margin=float(np.abs(gap).mean()),
            median_margin=float(np.median(np.abs(gap))),
            member_gain=None if above is None else float(above.mean()),
            best_gain=None if above is None else float(above.max(1).mean()),
            ended=float((self.steps < self.length).mean()),
            at_bound=float(bound[steps].mean()) if steps.any() else 0.0,
        )

    # -- towards a flow -----------------------------------------------------------------------------------------

    statistics = renamed_method("statistics", "summary")

    def encode(self, form: str = "residual", *, ties: str = "keep") -> EncodedPairs:
        """Turn the labelled segments into what :meth:`pfm.PreferenceFlow.fit` takes, with the observation as context.

        Args:
            form: ``"residual"``: outputs are what was added to the reference's own actions at the observations
                on the way, so that the reference is the zero segment in every state and nothing has to be learned
                about it; ``"directions"``: the same in coordinates (K,) of :meth:`directions`, far fewer where the
                noise was one offset for a whole segment; ``"actions"``: the actions themselves.
            ties: ``"keep"`` gives a tie as half a label each way, which is what the winners' distribution
                p1 = 2 pi_ref b needs; ``"drop"`` leaves it out. Skipped comparisons are always left out.

        Returns:
            pairs of (H, A) outputs, or (K,), in groups by trajectory; with M > 2 members also candidate sets, scored
            by wins, for ``FlowConfig(best_of=...)``. What :class:`pfm.pbrl.FlowPolicy` needs to know is in ``encoder``.

        Raises:
            ValueError: there are no labels, none of them prefers anything, or the form's actions are missing.
        """
        label = self._labelled()
        check_choice("form", form, FORMS)
        check_choice("ties", ties, ("keep", "drop"))
        outputs = self.outputs("actions" if form == "actions" else "residual")
        used = np.isfinite(label) if ties == "keep" else np.isfinite(label) & (label != 0.5)
        if not (used & (label != 0.5)).any():
            raise ValueError(
                f"none of the {len(label)} comparisons prefers a segment ({int((label == 0.5).sum())} ties, "
                f"{int(np.isnan(label).sum())} skipped): collect longer segments, more noise or more continuation"
            )
        state, first, second = self.comparisons[used].T
        label = label[used]
        forward = label >= 0.5
        chosen, rejected = np.where(forward, first, second), np.where(forward, second, first)
        probability = np.maximum(label, 1 - label)
        hard = bool((probability == 1).all())
        described = self._described(form, outputs)
        table = torch.from_numpy(outputs).flatten(0, 1)
        if form == "directions":
            basis = self.directions()
            described["basis"] = basis.tolist()
            table = table.flatten(1) @ torch.from_numpy(np.linalg.pinv(basis.reshape(-1, basis.shape[-1])).T)
        return EncodedPairs.from_table(
            table,
            torch.from_numpy(state * self.members + chosen),
            torch.from_numpy(state * self.members + rejected),
            contexts=torch.from_numpy(self.observation.astype(np.float32)),
            context_index=torch.from_numpy(state),
            probability=None if hard else torch.from_numpy(probability.astype(np.float32)),
            group=torch.from_numpy(self.trajectory[state].astype(np.int64)),
            encoder=described,
            candidates=self._candidates(used) if self.members > 2 else None,
        )

    def outputs(self, form: str = "residual") -> np.ndarray:
        """Return the segments (N, M, H, A) float32 in one of the forms of :meth:`encode`."""
        actions = self.actions.astype(np.float32)
        if form == "actions":
            return actions
        if self.reference_actions is None:
            raise ValueError("form='residual' needs reference_actions, and these segments have none: use 'actions'")
        residual = actions - self.reference_actions.astype(np.float32)
        # Nothing was added after an episode's end.
        alive = np.arange(self.length) < self.steps[..., None]
        return residual * alive[..., None].astype(np.float32)

    def directions(self) -> np.ndarray:
        """Return the directions in which residuals vary, as a basis (H, A, K) float32.

        A residual is about ``basis @ z`` with z (K,) of unit covariance. Directions in which little was tried are left
        out: noise that is one offset for a segment has K = A of them.

        Raises:
            ValueError: the segments carry no ``reference_actions``, or nothing was added to them.
        """
        residual = self.outputs("residual")
        away = residual.reshape(-1, residual.shape[2] * residual.shape[3]).astype(np.float64)
        values, vectors = np.linalg.eigh(away.T @ away / len(away))
        if not values[-1] > 0:
            raise ValueError("the segments are all the reference's own, so that no direction was tried: add noise")
        kept = values > SMALL * values[-1]
        return (vectors[:, kept] * np.sqrt(values[kept])).reshape(*residual.shape[2:], -1).astype(np.float32)

    def _described(self, form: str, outputs: np.ndarray) -> dict[str, Any]:
        described: dict[str, Any] = {
            "kind": "action segments",
            "form": form,
            "length": self.length,
            "low": [None if np.isinf(value) else float(value) for value in self.low],
            "high": [None if np.isinf(value) else float(value) for value in self.high],
            "environment": self.meta.get("environment"),
            "correlation": self.meta.get("correlation"),
        }
        centre = 0.0 if form != "actions" else None if self.plan is None else self.plan[:, None].astype(np.float32)
        if centre is not None:
            away = outputs - centre
            unit = np.sqrt(np.square(away).mean((0, 1)))
            unit = np.maximum(unit, 1e-4 * max(float(unit.max()), 1e-12))
            distance = np.sqrt(np.square(away / unit).mean((2, 3)))
            described |= {"unit": unit.tolist(), "radius": float(np.quantile(distance, SUPPORT))}
        return described

    def _candidates(self, used: np.ndarray) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """Return each state's members with their numbers of wins, ties counting half each."""
        assert self.label is not None
        state, first, second = self.comparisons[used].T
        wins = np.zeros((len(self), self.members), dtype=np.float32)
        np.add.at(wins, (state, first), self.label[used])
        np.add.at(wins, (state, second), 1 - self.label[used])
        rows = torch.arange(len(self) * self.members).view(len(self), self.members)
        return [(int(each), rows[each], torch.from_numpy(wins[each])) for each in np.unique(state)]

    def _labelled(self) -> np.ndarray:
        if self.label is None:
            raise ValueError("these segments carry no labels: give them some with relabel(teacher)")
        return self.label

    # -- parts --------------------------------------------------------------------------------------------------

    def select(self, index: Any) -> SegmentPairs:
        """Take the states at ``index`` (integers or a mask), with their comparisons."""
        index = np.asarray(index)
        if index.dtype == bool:
            index = np.flatnonzero(index)
        if len(index) == 0:
            raise ValueError("index selects no states: at least one is needed")
        if len(np.unique(index)) < len(index):
            raise ValueError("index must name each state once")
        place = np.full(len(self), -1)
        place[index] = np.arange(len(index))
        kept = place[self.comparisons[:, 0]] >= 0
        compared = self.comparisons[kept].copy()
        compared[:, 0] = place[compared[:, 0]]
        order = np.argsort(compared[:, 0], kind="stable")
        per_state = ("observation", "actions", "rewards", "after", "steps", "trajectory", "reference_actions", "plan",
                     "plan_return", "plan_value")  # fmt: skip
        parts = {name: None if getattr(self, name) is None else getattr(self, name)[index] for name in per_state}
        states = None
        if self.states is not None:
            states = pack_states(pick_states(self.saved_states(), index))
        label = None if self.label is None else self.label[kept][order]
        memory = None if self.memory is None else tuple(part[index] for part in self.memory)
        return replace(self, **parts, compared=compared[order], label=label, states=states, memory=memory)

    def split(self, held_out: float = 0.1, seed: int = 0) -> tuple[SegmentPairs, SegmentPairs]:
        """Split by trajectory into (train, held out).

        Raises:
            ValueError: fewer than two trajectories, or ``held_out`` not in (0, 1).
        """
        seed = check_seed(seed)
        held_out = check_number("held_out", held_out, above=0, below=1)
        names = np.unique(self.trajectory)
        if len(names) < 2:
            raise ValueError("all states lie on one trajectory, so none can be held out: collect from more of them")
        count = min(max(round(held_out * len(names)), 1), len(names) - 1)
        out = np.isin(self.trajectory, np.random.default_rng(seed).permutation(names)[:count])
        return self.select(~out), self.select(out)

    @classmethod
    def concatenate(cls, parts: Sequence[SegmentPairs]) -> SegmentPairs:
        """Join sets of the same environment, length and number of members; trajectories are kept apart.

        Raises:
            ValueError: ``parts`` is empty, or the sets do not fit each other.
        """
        if not parts:
            raise ValueError("parts holds no segments to join")
        shape = parts[0].actions.shape[1:]
        for part in parts:
            if part.actions.shape[1:] != shape or part.discount != parts[0].discount:
                raise ValueError(
                    f"sets to be joined must agree in members, length, action size and discount: got {shape}, "
                    f"{parts[0].discount} and {part.actions.shape[1:]}, {part.discount}"
                )
        joined: dict[str, Any] = {}
        for name in ("observation", "actions", "rewards", "after", "steps", "reference_actions", "plan", "plan_return",
                     "plan_value", "label"):  # fmt: skip
            each = [getattr(part, name) for part in parts]
            joined[name] = None if any(value is None for value in each) else np.concatenate(each)
        trajectories, compared, states, first, begin = [], [], [], 0, 0
        for part in parts:
            names, number = np.unique(part.trajectory, return_inverse=True)
            trajectories.append(number + first)
            compared.append(part.comparisons + np.array([begin, 0, 0]))
            first, begin = first + len(names), begin + len(part)
            states.append(None if part.states is None else part.saved_states())
        joined["trajectory"], joined["compared"] = np.concatenate(trajectories), np.concatenate(compared)
        memories = [part.memory for part in parts]
        joined["memory"] = None
        if memories[0] is not None:
            joined["memory"] = tuple(np.concatenate(each) for each in zip(*(m or () for m in memories), strict=True))
        whole = any(each is None for each in states)
        joined["states"] = None if whole else pack_states(join_states(states))
        return replace(parts[0], **joined)

    # -- on disk ------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write everything to one .npz file, whole or not at all; no pickles."""
        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if isinstance(getattr(self, entry.name), np.ndarray)
        }
        for name, value in (self.states or {}).items():
            arrays[STATE + name] = value
        for number, value in enumerate(self.memory or ()):
            arrays[f"{MEMORY}{number}"] = value
        described = {"version": VERSION, "discount": self.discount, "meta": self.meta}
        arrays["described"] = np.array(json.dumps(described))

        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                np.savez_compressed(file, **arrays)

        replace_file(path, write)
        return path

    @classmethod
    def load(cls, path: str | Path) -> SegmentPairs:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it is damaged, or holds something else.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}: give a file that SegmentPairs.save wrote")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            described = json.loads(str(arrays.pop("described")))
            states = {name[len(STATE) :]: arrays.pop(name) for name in list(arrays) if name.startswith(STATE)}
            memory = tuple(arrays.pop(name) for name in sorted(arrays) if name.startswith(MEMORY))
            return cls(
                **arrays, states=states or None, memory=memory or None, discount=described["discount"],
                meta=described["meta"],
            )  # fmt: skip
        except (zipfile.BadZipFile, KeyError, EOFError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged or holds no segments ({error}): collect them again") from error


def _half_right(guess: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.where(guess == 0, 0.5, np.sign(guess) == np.sign(truth))


def _knockout(teacher: Teacher, values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Compare winners with winners until one member of every state is left; draw at random where none is preferred."""
    random = np.random.default_rng([seed, 1])
    standing = np.tile(np.arange(values.shape[1]), (len(values), 1))
    rows = np.arange(len(values))
    compared, labels = [], []
    number = 0
    while standing.shape[1] > 1:
        meetings = standing.shape[1] // 2
        first, second = standing[:, 0 : 2 * meetings : 2], standing[:, 1 : 2 * meetings : 2]
        table = np.stack([np.repeat(rows, meetings), first.ravel(), second.ravel()], axis=1)
        label = teacher.label(values, table, seed=seed + number)
        toss = random.random(len(label)) < 0.5
        wins = np.where(np.isnan(label) | (label == 0.5), toss, label > 0.5).reshape(-1, meetings)
        compared.append(table)
        labels.append(label)
        standing = np.concatenate([np.where(wins, first, second), standing[:, 2 * meetings :]], axis=1)
        number += 1
    table, label = np.concatenate(compared), np.concatenate(labels)
    order = np.argsort(table[:, 0], kind="stable")
    return table[order], label[order]
