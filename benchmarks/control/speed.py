"""How fast preferences are collected: simulator steps a second, as a share of what the bare simulator makes.

Four contestants take turns in one process, each by as many calls of the simulator's own ``step``, counted at its class:

- ``bare``: one copy of the environment without its wrappers walks whole episodes. The actions, the reference's with the
  noise of exploration, were drawn beforehand. It runs twice, to see what the clock cannot tell apart.
- ``collection``: :func:`pfm.pbrl.collect` with one worker: episodes of the reference, saved and restored states,
  segments with what follows them, policy calls, labels, a file on disk. Steps that only replay an episode up to a state
  (Box2D) are calls of the simulator too; their share of all steps stands beside.
- ``least``: as many copies as the collection runs side by side, the bare products of the reference's layers for their
  actions, nothing checked, kept or restored. What this falls behind is out of reach of any loop over simulators.

A collection takes a second, and what a second is worth changes within one. So it is stopped every few hundredths of a
second, and the others make as many steps as it made since. Time is the process's own; resets and restored states are
part of it and count as no steps. A reading is the ratio of the sums over whole collections; the median of the readings
is given, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box

from benchmarks.control.references import load_reference
from benchmarks.core.tables import markdown_table
from benchmarks.speed.clock import Race
from pfm.pbrl import ActorPolicy, VectorEnv, collect
from pfm.pbrl.collection import SHARD
from pfm.pbrl.running import half_range
from pfm.statistics import Estimate

__all__ = ["ENVIRONMENTS", "Case", "measure"]

BATCH = 64  # as in the task
EXAMPLES = """examples:
  python -m benchmarks.control.speed
  python -m benchmarks.control.speed --envs Pendulum-v1 Reacher-v5 --readings 12
  python -m benchmarks.control.speed --untrained --envs Walker2d-v4 --readings 2
"""


@dataclass(frozen=True)
class Case:
    """Says how an environment is collected from, as in its task where it has one.

    ``reference``: a pretrained actor, a recipe of :mod:`benchmarks.control.references`, or None for two layers of 64
    with random weights, where nobody published an actor.
    """

    reference: str | None = None
    length: int = 5
    continuation: int = 40
    members: int = 2
    noise: float = 0.3
    explore: float = 0.1


ENVIRONMENTS = {
    "Pendulum-v1": Case("sac_Pendulum-v1_early"),
    "MountainCarContinuous-v0": Case("ppo_MountainCarContinuous-v0"),
    "Reacher-v5": Case("a2c_Reacher-v5"),
    "Hopper-v4": Case("ppo_Hopper-v4_early", length=10, members=3),
    "HalfCheetah-v4": Case("ppo_HalfCheetah-v4_early", length=10, continuation=10, members=3),
    "Walker2d-v4": Case(),
    "Ant-v4": Case(),
    "BipedalWalker-v3": Case(length=10, continuation=20),
    "LunarLanderContinuous-v3": Case("ppo_LunarLanderContinuous-v3_early", length=10, continuation=20, members=3),
}


@dataclass(frozen=True)
class Measured:
    """Holds the race, with the collection's calls of the simulator and those of them that replayed nothing."""

    race: Race
    steps: int
    useful: int

    @property
    def ratio(self) -> Estimate:
        """Return the collection's steps a second over the bare simulator's."""
        return self.race.ratio("bare", "collection")

    @property
    def least(self) -> Estimate:
        """Return the same of the least that any collection does."""
        return self.race.ratio("bare", "least")


class _Stopped(VectorEnv):
    """Says when the collection asks for the next step of its copies."""

    before: Callable[[], None] | None = None

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.before is not None:
            self.before()
        return super().step(actions)


@dataclass
class _Turns:
    """Stops a collection every ``block`` seconds, and lets the others make as many steps as it made meanwhile.

    ``made`` are the simulator's steps before each step of all copies, and at the end; ``seconds`` of each so far.
    """

    others: dict[str, Callable[[int], None]]
    made: list[int]
    block: float
    seconds: dict[str, float] = field(default_factory=dict)

    def begin(self) -> None:
        self.number = self.paid = self.turns = 0
        self.began = time.process_time()

    def __call__(self) -> None:
        if time.process_time() - self.began >= self.block:
            self.stop(self.number)
        self.number += 1

    def stop(self, number: int) -> None:
        self._add("collection", time.process_time() - self.began)
        steps, self.paid = self.made[number] - self.paid, self.made[number]
        names = list(self.others)
        self.turns += 1
        for place in range(len(names)):
            name = names[(place + self.turns) % len(names)]
            began = time.process_time()
            self.others[name](steps)
            self._add(name, time.process_time() - began)
        self.began = time.process_time()

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def measure(
    name: str, case: Case, policy: ActorPolicy, *, seed: int = 0, readings: int = 8, seconds: float = 1.0,
    block: float = 0.03,
) -> Measured:  # fmt: skip
    """Race collection against the bare simulator.

    Args:
        name: the gymnasium id. case: how it is collected from. policy: the reference.
        seed: of everything. readings: how many. seconds: of collections in a reading, at least.
        block: seconds between two turns.
    """

    def gather(env: VectorEnv) -> int:
        with tempfile.TemporaryDirectory() as folder:
            found = collect(
                env, policy, SHARD * math.comb(case.members, 2), length=case.length, continuation=case.continuation,
                members=case.members, noise=case.noise, correlation=1.0, explore=case.explore, seed=seed, batch=BATCH,
                folder=folder, progress=False,
            )  # fmt: skip
        return int(found.meta["steps"])

    made: list[int] = []
    env = _Stopped(name, BATCH)
    with counted(type(env.envs[0].unwrapped)) as calls:
        env.before = lambda: made.append(calls[0])
        useful = gather(env)
        made.append(calls[0])
    env.close()
    env = _Stopped(name, BATCH)  # made when nobody counted
    episodes = _episodes(name, case, policy, made[-1], seed)
    others = {"bare": _bare(name, episodes), "bare again": _bare(name, episodes), "least": _least(name, policy, seed)}
    turns = _Turns(others, made, block)
    found: dict[str, list[float]] = {"collection": []} | {each: [] for each in others}
    env.before = turns
    for reading in range(-1, readings):  # the first allocates
        turns.seconds = {}
        steps = 0
        while turns.seconds.get("collection", 0.0) < (seconds if reading >= 0 else 1e-9):
            turns.begin()
            gather(env)
            turns.stop(-1)
            steps += made[-1]
        for each, values in found.items():
            values += [turns.seconds[each] / steps] * (reading >= 0)
    env.close()
    return Measured(Race({each: np.array(values)[:, None] for each, values in found.items()}, "bare"), made[-1], useful)


@contextmanager
def counted(kind: type) -> Iterator[list[int]]:
    """Count the calls of a simulator's ``step`` while this lasts, of copies made meanwhile too."""
    own: Callable[..., Any] = kind.step  # type: ignore[attr-defined]
    calls = [0]

    def step(self: Any, action: Any) -> Any:
        calls[0] += 1
        return own(self, action)

    kind.step = step  # type: ignore[attr-defined]
    try:
        yield calls
    finally:
        kind.step = own  # type: ignore[attr-defined]


def _episodes(name: str, case: Case, policy: ActorPolicy, steps: int, seed: int) -> list[tuple[int, list[np.ndarray]]]:
    """Draw the seeds and the actions of whole episodes of so many steps together, the last one cut."""
    env = VectorEnv(name)
    random = np.random.default_rng(seed)
    space = env.action_space
    episodes: list[tuple[int, list[np.ndarray]]] = []
    left = steps
    while left:
        own = int(random.integers(2**31))
        observation, offset = env.reset(1, [own]), random.standard_normal(space.shape)
        actions: list[np.ndarray] = []
        memory: Any = None
        while left and not env.done[0]:
            action, memory = policy.predict(observation, memory, np.array([not actions]), True)
            action = action + case.explore * half_range(space) * offset
            actions.append(np.clip(action[0], space.low, space.high).astype(space.dtype))
            observation, _, _ = env.step(actions[-1][None])
            left -= 1
        episodes.append((own, actions))
    env.close()
    return episodes


def _bare(name: str, episodes: Sequence[tuple[int, list[np.ndarray]]]) -> Callable[[int], None]:
    env = VectorEnv(name).envs[0].unwrapped
    now, at = 0, -1

    def work(steps: int) -> None:
        nonlocal now, at
        while steps:
            seed, actions = episodes[now]
            if at < 0:
                env.reset(seed=seed)
                at = 0
            step = env.step
            part = actions[at : at + steps]
            for action in part:
                step(action)
            steps -= len(part)
            at += len(part)
            if at == len(actions):
                now, at = (now + 1) % len(episodes), -1

    return work


def _least(name: str, policy: ActorPolicy, seed: int) -> Callable[[int], None]:
    """Step copies side by side, each as often as any other, and start one anew where its episode ends."""
    made = VectorEnv(name, BATCH)
    horizon = made.horizon or 1000
    envs = [env.unwrapped for env in made.envs]
    low, high = made.action_space.low, made.action_space.high
    layers, activation = policy._layers, policy._activation
    last, bias = layers[-1]
    mean, scale, _ = policy._statistics or (0.0, 1.0, 0.0)
    rows = np.zeros((BATCH, layers[0][0].shape[0]), np.float32)
    for row, env in enumerate(envs):
        rows[row] = env.reset(seed=seed + row)[0]
    clock = owed = 0

    def work(steps: int) -> None:
        nonlocal clock, owed
        owed += steps
        while owed > 0:
            value = np.float32((rows - mean) / scale)
            for weight, offset in layers[:-1]:
                value = value @ weight + offset
                activation(value, out=value)
            actions = np.minimum(np.maximum(value @ last + bias, low), high)
            clock += 1
            owed -= BATCH
            for row, env in enumerate(envs):
                rows[row], _, terminated, _, _ = env.step(actions[row])
                if terminated or clock % horizon == 0:
                    rows[row] = env.reset()[0]

    return work


def untrained(name: str, seed: int = 2) -> ActorPolicy:
    """Make an actor of two layers of 64 with random weights; with those of ``seed`` 2, BipedalWalker falls soon."""
    env = VectorEnv(name)
    space: Box = env.action_space
    random = np.random.default_rng(seed)
    widths = [env.observation_space.shape[0], 64, 64, space.shape[0]]
    env.close()
    arrays: dict[str, np.ndarray] = {}
    for number, (inward, outward) in enumerate(itertools.pairwise(widths)):
        arrays[f"W{number}"] = random.standard_normal((outward, inward)) / math.sqrt(inward)
        arrays[f"b{number}"] = np.zeros(outward)
    meta = {"algo": "none", "env": name, "hidden_activation": "tanh", "output": "clip"}
    return ActorPolicy(arrays, meta, action_space=space)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.control.speed", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--envs", nargs="+", choices=list(ENVIRONMENTS), default=list(ENVIRONMENTS), metavar="ID",
                        help="gymnasium ids, of " + ", ".join(ENVIRONMENTS))  # fmt: skip
    parser.add_argument("--readings", type=int, default=8, help="readings, each a ratio (default: 8)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of collections in a reading (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="decides states, noise and starts (default: 0)")
    parser.add_argument("--folder", default="runs/pbrl", help="where trained references are kept (default: runs/pbrl)")
    parser.add_argument("--untrained", action="store_true", help="random weights in place of every reference")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [["environment", "collection / bare", "least / bare", "bare against itself", "bare steps a second",
             "steps", "replayed"]]  # fmt: skip
    for name in settings.envs:
        case = ENVIRONMENTS[name]
        trained = case.reference is not None and not settings.untrained
        policy = load_reference(case.reference or "", Path(settings.folder)) if trained else untrained(name)
        found = measure(name, case, policy, seed=settings.seed, readings=settings.readings, seconds=settings.seconds)
        rows.append([
            name, found.ratio.text(decimals=2), found.least.text(decimals=2), found.race.itself.text(decimals=2),
            f"{found.race.units_a_second('bare').value:,.0f}", f"{found.steps:,}",
            f"{1 - found.useful / found.steps:.0%}",
        ])  # fmt: skip
        print("done:", *rows[-1], flush=True)
    print("\n".join(markdown_table(rows)))


if __name__ == "__main__":
    main()
