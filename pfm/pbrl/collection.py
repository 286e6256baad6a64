"""Collecting preferences: several noisy segments from the same exact state, run on, valued and labelled.

States lie uniformly over whole episodes of the (explored) reference. From each, M segments of the reference with noise
on its actions and one without are run from the restored state, and the deterministic reference goes on from their ends,
or a fitted value says what it would earn: a teacher who does not look beyond the segment prefers what pays at once and
costs later.

Work is cut into shards that depend on the seed and their number alone: the result is the same for any number of
workers, and an interrupted collection resumes from the shards on disk.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import gymnasium
import numpy as np

from pfm._internal.checks import check_choice, check_number, check_whole
from pfm._internal.files import claim_folder
from pfm.pbrl.policies import check_policy
from pfm.pbrl.running import (
    Continued,
    Memory,
    Value,
    check_actions,
    check_observation,
    clipper,
    correlated_noise,
    expected_value,
    follow,
    half_range,
    run_on,
)
from pfm.pbrl.segments import SegmentPairs
from pfm.pbrl.states import join_states, pack_states, pick_states
from pfm.pbrl.teachers import Teacher, all_comparisons

__all__ = ["Visited", "collect", "fingerprint", "open_environment", "visit"]

SHARD = 100  # states; a constant of the format: results depend on it
LARGE = 4096  # rows of an environment in array code that are stepped together
TRAJECTORIES = 1_000_000  # more than a shard has
MANIFEST = "collection.json"


@dataclass(frozen=True)
class _Settings:
    """Holds all that decides what a shard holds, besides the policy and the environment themselves."""

    environment: str
    policy: str
    length: int
    continuation: int
    members: int
    noise: float | None
    correlation: float
    explore: float
    states_per_trajectory: int
    discount: float
    value: str | None
    batch: int
    seed: int


@dataclass(frozen=True)
class _Work:
    """Holds what is sent to a worker: what to run, and where to write the result."""

    environment: Any
    policy: Any
    value: Value | None
    settings: _Settings
    folder: Path | None


def collect(
    environment: Any,
    policy: Any,
    pairs: int,
    *,
    length: int,
    continuation: int,
    teacher: str | Teacher = "oracle",
    seed: int = 0,
    members: int = 2,
    design: str = "all",
    noise: float | None = 0.3,
    correlation: float = 0.0,
    explore: float | None = None,
    states_per_trajectory: int = 10,
    discount: float = 1.0,
    value: Value | None = None,
    workers: int = 1,
    folder: str | Path | None = None,
    batch: int = 32,
    progress: bool = True,
) -> SegmentPairs:
    """Collect labelled comparisons of action segments from the same exact state.

    Args:
        environment: a gymnasium id, a batch environment, or a callable that makes one (sent to the workers), or that
            makes a gymnasium environment, with or without wrappers such as RescaleAction.
        policy: the frozen reference: an object with stable-baselines3's ``predict``.
        pairs: comparisons that the teacher labels. With two members that is the number of states; with more, as many
            states as give that number of comparisons, rounded up.
        length: H, steps of a segment. continuation: further steps of the deterministic reference that count for the
            label.
        teacher: a :class:`Teacher` or the name of one. design: which members are compared, see
            :meth:`SegmentPairs.relabel`.
        seed: decides states, noise and labels. The first states do not depend on ``pairs``.
        members: M, segments a state.
        noise: standard deviation of the Gaussian noise on the deterministic reference, as a share of half the range
            of the action space; None for the reference's own stochastic actions.
        correlation: of the noise from one step to the next, in [0, 1]; 1 is one offset for the whole segment, which
            shows more clearly in what follows.
        explore: noise on the trajectories that the states are taken from; None for that of the segments.
        states_per_trajectory: how many states are taken from one episode.
        discount: of rewards a step, in (0, 1].
        value: what is to be expected after the continuation, from observations (B, O) to (B,), such as a
            :class:`pfm.pbrl.FittedValue` of the same ``discount``; most often with ``continuation=0``. An episode that
            ends by termination is worth nothing more, one that is cut by the time limit what its last observation is.
            None for nothing.
        workers: processes. folder: for the shards, from which an interrupted collection resumes; None keeps nothing.
        batch: copies of a gymnasium environment that are stepped together; results depend on it by rounding only.
        progress: show a progress bar.

    Returns:
        the segments with their states and labels.

    Raises:
        ValueError: an argument is out of range, the policy acts in another space, observations or values are not
            finite, the value has another discount, or ``folder`` holds a collection with other settings.
        TypeError: ``environment`` is none of the three, or does not say which episodes terminated, which a value needs.
        pfm.pbrl.UnsupportedEnvironmentError: the environment's state cannot be restored exactly.
    """
    teacher = Teacher.named(teacher)
    _check(pairs, length, continuation, members, noise, correlation, explore, states_per_trajectory, discount,
           workers, batch, design)  # fmt: skip
    env, name = open_environment(environment)
    acts, foretells = _fingerprints(env, policy, value, discount)
    settings = _Settings(
        name, acts, length, continuation, members, noise, correlation,
        float((noise or 0.0) if explore is None else explore), states_per_trajectory, discount, foretells, batch, seed,
    )  # fmt: skip
    per_state = len(all_comparisons(1, members)) if design == "all" else members - 1
    states = math.ceil(pairs / per_state)
    place = None if folder is None else Path(folder).expanduser()
    if place is not None:
        claim_folder(place, MANIFEST, asdict(settings), "a collection")
    work = _Work(environment, policy, value, settings, place)
    sizes = [min(SHARD, states - begin) for begin in range(0, states, SHARD)]
    parts: list[SegmentPairs | None] = [None] * len(sizes)
    for number, part in _bar(_shards(work, sizes, env, workers), len(sizes), progress):
        parts[number] = part
    segments = SegmentPairs.concatenate([part for part in parts if part is not None])
    steps = sum(part.meta["steps"] for part in parts if part is not None)
    meta = {name: value for name, value in asdict(settings).items() if name not in ("batch", "policy")}
    segments = replace(segments, meta=meta | {"steps": steps})
    return segments.relabel(teacher, design=design, seed=seed)


def _check(pairs: int, length: int, continuation: int, members: int, noise: float | None, correlation: float,
           explore: float | None, states_per_trajectory: int, discount: float, workers: int, batch: int,
           design: str) -> None:  # fmt: skip
    whole = {
        "pairs": (pairs, 1), "length": (length, 1), "continuation": (continuation, 0), "members": (members, 2),
        "states_per_trajectory": (states_per_trajectory, 1), "workers": (workers, 1), "batch": (batch, 1),
    }  # fmt: skip
    for name, (number, low) in whole.items():
        check_whole(name, number, low)
    check_number("noise", noise, above=0, also=(None,), hint="None takes the reference's own stochastic actions")
    check_number("explore", explore, least=0, also=(None,))
    check_number("correlation", correlation, least=0, most=1)
    check_number("discount", discount, above=0, most=1)
    check_choice("design", design, ("all", "knockout"))


def _shards(work: _Work, sizes: list[int], env: Any, workers: int) -> Iterator[tuple[int, SegmentPairs]]:
    missing = []
    for number, size in enumerate(sizes):
        found = _stored(work, number, size)
        if found is None:
            missing.append(number)
        else:
            yield number, found
    if workers == 1 or len(missing) <= 1:
        for number in missing:
            yield number, _shard(work, env, number, sizes[number])
        return
    # Not forked from here: simulators and torch keep threads and handles that a fork would share.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        multiprocessing.set_forkserver_preload(["pfm.pbrl.policies", "pfm.pbrl.collection"])
    with ProcessPoolExecutor(min(workers, len(missing)), context, initializer=_start_worker) as pool:
        running = {pool.submit(_in_worker, work, number, sizes[number]): number for number in missing}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BaseException:
            for future in running:
                future.cancel()
            raise


_environments: dict[str, Any] = {}


def _start_worker() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def _in_worker(work: _Work, number: int, size: int) -> SegmentPairs:
    if work.settings.environment not in _environments:
        _environments[work.settings.environment] = open_environment(work.environment)[0]
    return _shard(work, _environments[work.settings.environment], number, size)


def _stored(work: _Work, number: int, size: int) -> SegmentPairs | None:
    if work.folder is None:
        return None
    path = _shard_path(work.folder, number)
    if not path.is_file():
        return None
    try:
        found = SegmentPairs.load(path)
    except ValueError:
        return None  # damaged: it is run again
    if len(found) < size:
        return None
    return found if len(found) == size else found.select(np.arange(size))


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npz"


def _shard(work: _Work, env: Any, number: int, size: int) -> SegmentPairs:
    """Collect the first ``size`` states of a shard."""
    from pfm.pbrl.policies import seed_policy

    settings = work.settings
    random = np.random.default_rng([settings.seed, number])
    seed_policy(work.policy, int(random.integers(2**31)))
    seen, walked = visit(
        env, work.policy, random, per=settings.states_per_trajectory, explore=settings.explore,
        correlation=settings.correlation, deterministic=settings.noise is not None, number=number,
    )  # fmt: skip
    seen = seen.pick(np.arange(size))
    action = env.action_space.shape[0]
    spread = half_range(env.action_space)
    added = correlated_noise(
        random, (SHARD, settings.members, settings.length, action), settings.noise or 0.0, settings.correlation
    )[:size] * spread  # fmt: skip
    # The members of a state, and last the reference without noise.
    added = np.concatenate([added, np.zeros_like(added[:, :1])], axis=1)
    each = settings.members + 1
    stochastic = np.tile(np.arange(each) < settings.members, size) & (settings.noise is None)
    rows = np.repeat(np.arange(size), each)
    flat = added.reshape(size * each, settings.length, action)
    pieces = []
    chunk = LARGE if isinstance(seen.states, np.ndarray) else settings.batch
    for begin in range(0, len(rows), chunk):
        part = slice(begin, begin + chunk)
        at = seen.pick(rows[part])
        pieces.append(
            run_on(
                env, work.policy, at.states, flat[part], settings.continuation, memory=at.memory,
                stochastic=stochastic[part], discount=settings.discount, value=work.value,
            )
        )  # fmt: skip
    whole = Continued.concatenate(pieces)
    shape = (size, each)
    actions = whole.actions.reshape(*shape, *whole.actions.shape[1:])
    rewards = whole.rewards.reshape(*shape, -1)
    after, steps = whole.after.reshape(shape), whole.steps.reshape(shape)
    reference = whole.reference_actions.reshape(actions.shape)
    plan_return = rewards[:, -1] @ settings.discount ** np.arange(settings.length)
    segments = SegmentPairs(
        observation=seen.observation.astype(np.float32), actions=actions[:, :-1].astype(np.float32),
        rewards=rewards[:, :-1].astype(np.float32), after=after[:, :-1], steps=steps[:, :-1].astype(np.int32),
        trajectory=seen.trajectory, low=env.action_space.low.astype(np.float32),
        high=env.action_space.high.astype(np.float32), reference_actions=reference[:, :-1].astype(np.float32),
        plan=actions[:, -1].astype(np.float32), plan_return=plan_return, plan_value=plan_return + after[:, -1],
        states=pack_states(seen.states), memory=seen.memory, discount=settings.discount,
        meta={"environment": settings.environment, "steps": walked + whole.simulated},
    )  # fmt: skip
    if work.folder is not None:
        segments.save(_shard_path(work.folder, number))
    return segments


@dataclass(frozen=True)
class Visited:
    """Holds visited states: observations (N, O), exact states, the policy's memory, trajectories (N,)."""

    observation: np.ndarray
    states: Any
    memory: Memory
    trajectory: np.ndarray

    def pick(self, index: np.ndarray) -> Visited:
        """Select states by their indices (M,)."""
        memory = None if self.memory is None else tuple(part[index] for part in self.memory)
        return Visited(self.observation[index], pick_states(self.states, index), memory, self.trajectory[index])

    @classmethod
    def concatenate(cls, parts: list[Visited]) -> Visited:
        """Join several sets of states in their order."""
        memory: Memory = None
        if parts[0].memory is not None:
            memory = tuple(np.concatenate(each) for each in zip(*(part.memory or () for part in parts), strict=True))
        return cls(
            np.concatenate([part.observation for part in parts]), join_states([part.states for part in parts]), memory,
            np.concatenate([part.trajectory for part in parts]),
        )  # fmt: skip


def visit(
    env: Any,
    policy: Any,
    random: np.random.Generator,
    *,
    per: int,
    explore: float,
    correlation: float,
    deterministic: bool,
    number: int = 0,
) -> tuple[Visited, int]:
    """Walk whole episodes and keep SHARD states of them, each step as likely as any other; count the steps.

    Args:
        env: a batch environment. policy: the reference, ``deterministic`` or not. random: decides everything.
        per: states of one episode. explore: standard deviation of the noise on its actions, in half ranges, with its
            ``correlation`` from step to step.
        number: of the shard; trajectories of different shards have different names.
    """
    count = math.ceil(SHARD / per)
    found: list[Visited] = []
    walked = begun = 0
    spread = explore * half_range(env.action_space)
    clip, dtype = clipper(env.action_space), env.action_space.dtype
    while sum(len(each.trajectory) for each in found) < SHARD:
        observation = env.reset(count, int(random.integers(2**31)))
        # Reservoir sampling over time: the length of an episode is not known before its end.
        kept: list[Visited] = []
        memory: Memory = None
        start, going_on = np.ones(count, dtype=bool), np.zeros(count, dtype=bool)
        offset = noise = np.zeros(())
        step = 0
        alive = ~env.done
        while left := int(np.count_nonzero(alive)):
            slot = len(kept) if len(kept) < per else int(random.integers(step + 1))
            # A memory is None before the first step only, and states are kept with memories of one kind.
            if slot < per and (step > 0 or not _remembers(policy, observation)):
                seen = Visited(observation, env.save_states(), memory, begun + np.arange(count))
                kept[slot : slot + 1] = [seen.pick(np.flatnonzero(alive))]
            action, memory = policy.predict(observation, memory, start, deterministic)
            memory, start = _checked_memory(memory, count), going_on
            check_actions(action, env, count)
            fresh = random.standard_normal((count, *env.action_space.shape))
            if step == 0 or correlation < 1:
                noise = fresh if step == 0 else follow(noise, fresh, correlation)
                offset = spread * noise
            action = clip(action)
            action += offset
            action = clip(action)
            walked += left
            observation, _, done = env.step(action.astype(dtype))
            alive = ~done
            check_observation(observation, alive, f"step {step + 1} of a trajectory of shard {number}")
            step += 1
        found += kept
        begun += count
    seen = Visited.concatenate(found)
    # Trajectories of different shards have different numbers.
    seen = replace(seen, trajectory=seen.trajectory + number * TRAJECTORIES)
    return seen.pick(random.permutation(len(seen.trajectory))[:SHARD]), walked


def _remembers(policy: Any, observation: np.ndarray) -> bool:
    return policy.predict(observation, None, np.ones(len(observation), dtype=bool), True)[1] is not None


def _checked_memory(memory: Any, count: int) -> Memory:
    if memory is None:
        return None
    if isinstance(memory, tuple) and all(isinstance(part, np.ndarray) and len(part) == count for part in memory):
        return memory
    raise ValueError(
        "a policy's state must be None or a tuple of arrays with one row an episode, so that it can be kept with the "
        f"environment's: got {type(memory).__name__}"
    )


def open_environment(environment: Any) -> tuple[Any, str]:
    """Return a batch environment and its name, from a gymnasium id, a batch environment or what makes one.

    What is made may be a gymnasium environment too, with wrappers that keep no state of their own.
    """
    from pfm.pbrl.rollouts import VectorEnv

    if isinstance(environment, str):
        return VectorEnv(environment), environment
    if isinstance(environment, gymnasium.Env):
        raise TypeError(
            f"environment must be made here, as several copies are stepped together: got {environment}; give the "
            "function that makes it, lambda: ..."
        )
    if hasattr(environment, "restore_states") and not isinstance(environment, type):
        return environment, getattr(environment, "name", type(environment).__name__)
    if callable(environment):
        made = environment()
        if isinstance(made, gymnasium.Env):
            vector = VectorEnv(_Once(made, cast(Callable[[], gymnasium.Env], environment)))
            return vector, vector.name
        if hasattr(made, "restore_states"):
            return made, getattr(made, "name", type(made).__name__)
    raise TypeError(
        f"environment must be a gymnasium id, a batch environment or a callable that makes one: got "
        f"{type(environment).__name__}; a batch environment has reset, step, save_states and restore_states"
    )


class _Once:
    """Makes environments by a function, of which the first is there already."""

    def __init__(self, first: gymnasium.Env, make: Callable[[], gymnasium.Env]) -> None:
        self.first: gymnasium.Env | None = first
        self.make = make

    def __call__(self) -> gymnasium.Env:
        first, self.first = self.first, None
        return self.make() if first is None else first


def fingerprint(env: Any, policy: Any) -> str:
    """Return a short name of what a policy does at a few observations of a batch environment.

    Raises:
        ValueError: the policy's spaces, or its actions, are not those of the environment.
    """
    check_policy(policy, env)
    action, _ = policy.predict(env.reset(8, 0), None, np.ones(8, dtype=bool), True)
    check_actions(action, env, 8)
    return _digest(np.asarray(action, dtype=np.float64))


def _fingerprints(env: Any, policy: Any, value: Value | None, discount: float) -> tuple[str, str | None]:
    """Return fingerprints of the policy and of the value at a few observations, and check both."""
    acts = fingerprint(env, policy)
    if value is None:
        return acts, None
    if not hasattr(env, "terminated"):
        raise TypeError(
            f"{type(env).__name__} does not say which episodes terminated, after which nothing is to be expected: "
            "give it terminated (E,), or leave value out"
        )
    theirs = getattr(value, "discount", discount)
    if not math.isclose(theirs, discount):
        raise ValueError(f"the value has discount {theirs} and the collection {discount}: give both the same")
    expected = expected_value(value, env.reset(8, 0))
    return acts, _digest(expected / max(float(np.abs(expected).max()), 1e-12))


def _digest(numbers: np.ndarray) -> str:
    return hashlib.sha256(np.round(numbers, 4).tobytes()).hexdigest()[:16]


def _bar(items: Iterator[Any], total: int, progress: bool) -> Any:
    if not progress:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, total=total, desc="collecting", unit="shard")
