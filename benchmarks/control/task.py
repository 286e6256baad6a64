"""The task of control: one reference in one simulator, pairs that every method learns from, and whole episodes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.control.config import ControlConfig
from benchmarks.control.learning import Candidate, ControlData, ControlMethod
from benchmarks.control.references import load_reference, normalised_score
from benchmarks.core.bench import Bench, Outcome
from benchmarks.core.errors import UnsuitableMethodError
from pfm._internal.files import replace_file
from pfm.pbrl import BatchedPendulum, FittedValue, Teacher, VectorEnv, episode_returns, episode_seeds
from pfm.pbrl.collection import collect
from pfm.pbrl.segments import SegmentPairs
from pfm.pbrl.states import pick_states, unpack_states
from pfm.statistics import Bootstrap, Estimate

__all__ = ["ControlTask", "open_simulator"]

Array = NDArray[np.float64]

# Parts of a seed's randomness. Test episodes and states are those of no other part.
_VALIDATE, _TEST, _LABELS = 1_000_003, 2_000_003, 3_000_017
_COIN = Teacher(mistake=0.5)
_BATCH = 64  # episodes that are stepped together
# Environments that have a twin in array code, hundreds of times as fast
_TWINS = {"Pendulum-v1": BatchedPendulum}


def open_simulator(name: str, count: int = 1) -> Any:
    """Make a batch environment of a gymnasium id, in array code where there is a twin of it."""
    return _TWINS[name]() if name in _TWINS else VectorEnv(name, count)


@dataclass(frozen=True)
class ControlTask:
    """A reference with the pairs of a seed.

    The score is the mean gain of whole episodes over the same policy's deterministic mode, from the same starts.
    Beside it stand the return itself, and the gain of single segments, with and without what follows them.
    """

    config: ControlConfig
    seed: int
    reference: Any
    best: Any

    @classmethod
    def load(cls, config: ControlConfig, seed: int) -> ControlTask:
        """Load the policies.

        Raises:
            MissingDataError: the pretrained actors are absent.
        """
        folder = Path(config.folder)
        best = None if config.best is None else load_reference(config.best, folder)
        return cls(config, seed, load_reference(config.reference, folder), best)

    def segments(self) -> tuple[SegmentPairs, SegmentPairs]:
        """Collect the pairs of this seed, or what is missing of them; give (train, held out)."""
        config = self.config
        count = config.pairs if config.limit is None else min(config.limit, config.pairs)
        pairs = self._collect(self.reference, count, self.seed, self._folder() / "segments")
        return pairs.split(config.held_out, self.seed)

    def run(self, method: object, bench: Bench) -> Outcome:
        """Let a method learn, choose among its settings on held-out episodes, and measure the choice.

        Raises:
            TypeError: the method gives no policies. ValueError: its actions are not those of the environment.
        """
        if not isinstance(method, ControlMethod):
            raise UnsuitableMethodError(f"{type(method).__name__} gives no policies, which this task needs")
        config = self.config
        episodes = min(config.episodes, getattr(method, "episodes", None) or config.episodes)
        env = open_simulator(config.environment, min(_BATCH, episodes))
        marks = [time.perf_counter()]
        train, held = self.segments()
        marks.append(time.perf_counter())
        chosen, notes = self._learn(method, bench, train, env)
        marks.append(time.perf_counter())
        returns = self._returns(env, chosen.policy, _TEST, episodes)
        plain = self._reference_returns(env)[:episodes]
        marks.append(time.perf_counter())
        segments = held.select(np.arange(min(config.states, len(held))))
        gains = self._segment_gains(env, chosen.policy, segments) if config.states else {}
        marks.append(time.perf_counter())
        statistics = train.summary()
        figures = self._figures(returns, plain, gains)
        gain = figures["gain"]
        assert gain is not None
        return Outcome(
            kind="control",
            score=gain.value,
            figures=figures,
            seconds=dict(zip(("collect", "learn", "episodes", "segments"), np.diff(marks).round(3).tolist(),
                             strict=True)),
            about={
                "environment": config.environment,
                "reference": config.reference,
                "pairs": len(train) + len(held),
                "labels": train.labels + held.labels,
                "steps": int(train.meta.get("steps", 0)),
                "best": None if self.best is None else float(self._best_returns(env).mean()),
                "statistics": {name: _plain(value) for name, value in vars(statistics).items()},
            },
            notes=notes,
            save=lambda path: _save(path, {"returns": returns, "reference": plain, **gains}),
        )  # fmt: skip

    def learned(self, method: ControlMethod, bench: Bench) -> Any:
        """Let a method learn and choose; give the policy."""
        env = open_simulator(self.config.environment, self.config.validation)
        return self._learn(method, bench, self.segments()[0], env)[0].policy

    def start(self, number: int) -> int:
        """Return the seed of one of the test's starts."""
        return episode_seeds(self.seed + _TEST, number + 1)[-1]

    def _collect(self, policy: Any, count: int, seed: int, folder: Path | None = None) -> SegmentPairs:
        config = self.config
        value = None if config.value is None else self._value(policy, seed, folder)
        return collect(
            open_simulator(config.environment),
            policy,
            count,
            length=config.length,
            continuation=config.continuation if value is None else 0,
            discount=1.0 if value is None else value.discount,
            value=value,
            teacher=_COIN if config.teacher == "coin" else config.teacher,
            seed=seed,
            members=config.members,
            noise=config.noise,
            correlation=config.correlation,
            explore=config.explore,
            folder=folder,
            batch=_BATCH,
            progress=False,
        )

    def _value(self, policy: Any, seed: int, folder: Path | None) -> FittedValue:
        """Fit what the policy goes on to earn, or read it from beside the pairs that it labelled."""
        config = self.config
        assert config.value is not None
        path = None if folder is None else folder.parent / "value.safetensors"
        if path is not None and path.is_file():
            return FittedValue.load(path)
        value = FittedValue.fit(
            open_simulator(config.environment), policy, discount=config.value, length=config.length,
            noise=config.noise or 0.3, correlation=config.correlation, explore=config.explore, batch=_BATCH, seed=seed,
        )  # fmt: skip
        if path is not None:
            value.save(path)
        return value

    # -- learning and choice ----------------------------------------------------------------------------------------

    def _learn(
        self, method: ControlMethod, bench: Bench, train: SegmentPairs, env: Any
    ) -> tuple[Candidate, dict[str, Any]]:
        """Learn and choose, over as many rounds of labels as the method has."""
        rounds = getattr(getattr(method, "config", None), "label_rounds", 1)
        if rounds > 1:
            train = train.select(np.arange(max(len(train) // rounds, 2)))
        standing, found = Candidate({"standing still": True}, self.reference), []
        for number in range(rounds):
            if number:
                train = self._collect(standing.policy, len(train.comparisons), self.seed + _LABELS * number)
            data = self._data(train, standing.policy)
            notes = method.learn(data, bench)
            chosen, tried = self._choose(method, env, standing)
            found.append(notes | {"labels": train.labels, "chosen": chosen.settings, "tried": tried})
            standing = Candidate({"standing still": True}, chosen.policy)
        return standing, found[0] if rounds == 1 else {"label_rounds": found}

    def _choose(self, method: ControlMethod, env: Any, standing: Candidate) -> tuple[Candidate, list[dict[str, Any]]]:
        """Take the candidate that earns most in the validation episodes; standing still is one, if the method says so.

        The same starts serve every candidate of every method. A method without a choice is taken as it is.
        """
        candidates = list(method.candidates())
        if getattr(method, "standing", len(candidates) > 1):
            candidates.append(standing)
        if len(candidates) == 1:
            return candidates[0], []
        earned = [
            float(self._returns(env, candidate.policy, _VALIDATE, self.config.validation).mean())
            for candidate in candidates
        ]
        tried = [candidate.settings | {"return": value} for candidate, value in zip(candidates, earned, strict=True)]
        return candidates[int(np.argmax(earned))], tried

    def _data(self, train: SegmentPairs, reference: Any) -> ControlData:
        config = self.config
        return ControlData(
            train, reference, lambda: open_simulator(config.environment), config.continuation, config.noise,
            self.seed,
        )  # fmt: skip

    # -- measures ---------------------------------------------------------------------------------------------------

    def _returns(self, env: Any, policy: Any, part: int, episodes: int) -> Array:
        policy = policy.bind(env) if hasattr(policy, "bind") else policy
        return episode_returns(env, policy, episodes, self.seed + part, deterministic=True, batch=_BATCH)

    def _segment_gains(self, env: Any, policy: Any, held: SegmentPairs) -> dict[str, Array]:
        """Return what H steps of a policy from held-out states earn beyond the reference's own, (S,) each.

        ``segment_gain`` counts what follows when the reference goes on, ``segment_return_gain`` the H steps alone.
        """
        whole, alone = self._segment_returns(env, policy, held)
        if self.config.value is None:
            assert held.plan_return is not None
            assert held.plan_value is not None
            return {"segment_gain": whole - held.plan_value, "segment_return_gain": alone - held.plan_return}
        plain, plain_alone = self._segment_returns(env, self.reference, held)  # the plans' values are discounted
        return {"segment_gain": whole - plain, "segment_return_gain": alone - plain_alone}

    def _segment_returns(self, env: Any, policy: Any, held: SegmentPairs) -> tuple[Array, Array]:
        """Return what H steps of a policy earn with and without the reference's steps that follow, (S,) each."""
        assert held.states is not None
        states, alone, whole = unpack_states(held.states), [], []
        for begin in range(0, len(held), _BATCH):
            rows = np.arange(begin, min(begin + _BATCH, len(held)))
            seen = env.restore_states(pick_states(states, rows))
            bound = policy.bind(env) if hasattr(policy, "bind") else policy
            totals, memory, start = np.zeros((2, len(rows))), None, np.ones(len(rows), dtype=bool)
            for step in range(held.length + self.config.continuation):
                actor = bound if step < held.length else self.reference
                if step == held.length:
                    memory = None
                action, memory = actor.predict(seen, memory, start, True)
                start = np.zeros(len(rows), dtype=bool)
                seen, reward, done = env.step(action)
                totals[1] += reward
                totals[0] += reward * (step < held.length)
                if done.all():
                    break
            alone.append(totals[0])
            whole.append(totals[1])
        return np.concatenate(whole), np.concatenate(alone)

    def _figures(self, returns: Array, plain: Array, gains: dict[str, Array]) -> dict[str, Estimate | None]:
        bootstrap = Bootstrap(len(returns))
        figures: dict[str, Estimate | None] = {
            "return": bootstrap.mean(returns),
            "gain": bootstrap.mean(returns - plain),
            "better": bootstrap.mean((returns > plain) + 0.5 * (returns == plain)),
        }
        if self.config.d4rl is not None:
            name = self.config.d4rl
            mean = figures["return"]
            assert mean is not None
            figures["d4rl"] = Estimate(*(normalised_score(value, name) for value in (mean.value, mean.low, mean.high)))
        return figures | {name: Bootstrap(len(values)).mean(values) for name, values in gains.items()}

    def _reference_returns(self, env: Any) -> Array:
        return self._kept("reference", lambda: self._returns(env, self.reference, _TEST, self.config.episodes))

    def _best_returns(self, env: Any) -> Array:
        return self._kept("best", lambda: self._returns(env, self.best, _TEST, self.config.episodes))

    def _kept(self, name: str, measure: Any) -> Array:
        """Read returns that were measured before, or measure them."""
        config = self.config
        policy = config.best if name == "best" else config.reference
        path = Path(config.folder) / "returns" / f"{config.environment}-{policy}-{self.seed}-{config.episodes}.npy"
        if not path.is_file():
            values = measure()
            path.parent.mkdir(parents=True, exist_ok=True)

            def write(partial: Path) -> None:
                with partial.open("wb") as file:
                    np.save(file, values)

            replace_file(path, write)
        return np.load(path, allow_pickle=False)

    def _folder(self) -> Path:
        """Name the folder of one collection by what decides it."""
        c = self.config
        parts: Sequence[Any] = (
            c.reference, f"h{c.length}", f"c{c.continuation}" if c.value is None else f"v{c.value:g}",
            "own" if c.noise is None else f"n{c.noise:g}", f"r{c.correlation:g}",
            "" if c.explore is None else f"e{c.explore:g}", f"m{c.members}", f"s{self.seed}",
        )  # fmt: skip
        return Path(c.folder) / "data" / c.environment / "-".join(part for part in parts if part)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _save(path: Path, arrays: dict[str, Array]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
