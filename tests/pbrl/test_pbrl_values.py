"""The value of a reference: known in closed form, and in place of its further steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Box

from pfm.pbrl.arrays import BatchedPendulum, _Batched
from pfm.pbrl.collection import collect
from pfm.pbrl.rollouts import VectorEnv
from pfm.pbrl.running import run_on
from pfm.pbrl.segments import SegmentPairs
from pfm.pbrl.values import FittedValue, monte_carlo_returns

GAMMA = 0.9


class Countdown(_Batched):
    """Pays 1 a step until a number is used up, by 1 a step, or by 2 where the action is above a half."""

    horizon = 1000
    width = 1
    observation_space = Box(-np.inf, np.inf, (1,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    @property
    def terminated(self) -> np.ndarray:
        return self._states[:, 0] <= 0

    @property
    def done(self) -> np.ndarray:
        return super().done | self.terminated

    def _start(self, count: int, generator: np.random.Generator) -> np.ndarray:
        return generator.integers(1, 21, (count, 1)).astype(float)

    def _move(self, state: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.ones(len(state)), state - 1 - (action > 0.5)

    def _observe(self) -> np.ndarray:
        return (self._states[:, :1] / 20).astype(np.float32)


class Switch(Countdown):
    """Stands in one of two places by turns, and pays 1 in the first; it never ends but by time."""

    @property
    def terminated(self) -> np.ndarray:
        return np.zeros(self.count, bool)

    def _start(self, count: int, generator: np.random.Generator) -> np.ndarray:
        return generator.integers(0, 2, (count, 1)).astype(float)

    def _move(self, state: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return 1 - state[:, 0], 1 - state


class Still:
    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.zeros((len(observation), 1), np.float32), state


class Swinging:
    """Pumps a pendulum up and holds it."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        seen = np.asarray(observation, dtype=np.float64)
        action = np.where(seen[:, 0] > 0.9, -8 * seen[:, 1] - 2 * seen[:, 2], np.sign(seen[:, 2]))
        return np.clip(action, -2, 2)[:, None].astype(np.float32), state


def counted(observation: np.ndarray) -> np.ndarray:
    """The value of a countdown, and nonsense where nothing is left."""
    left = np.round(observation[:, 0] * 20)
    return np.where(left > 0, (1 - GAMMA**left) / (1 - GAMMA), 1e6)


@pytest.fixture(scope="module")
def pendulum() -> FittedValue:
    return FittedValue.fit(BatchedPendulum, Swinging(), discount=0.95, states=300, epochs=10, seed=1)


# -- closed forms ---------------------------------------------------------------------------------------------------


def test_returns_are_sums_of_what_follows():
    rewards = np.array([[1.0, 0.0], [2.0, 0.0], [4.0, 8.0]])
    assert monte_carlo_returns(rewards, 0.5).tolist() == [[3.0, 2.0], [4.0, 4.0], [4.0, 8.0]]


def test_the_value_of_two_states_is_that_of_their_equations():
    short = type("Short", (Switch,), {"horizon": 7})  # the time limit is no part of the value
    value = FittedValue.fit(short, Still(), discount=GAMMA, states=200, epochs=10)
    expected = np.array([1, GAMMA]) / (1 - GAMMA**2)  # V0 = 1 + gamma V1, V1 = gamma V0
    assert value(np.array([[0.0], [0.05]])) == pytest.approx(expected, rel=0.01)
    assert value.r2 > 0.98


def test_the_value_of_a_countdown_is_a_geometric_sum():
    value = FittedValue.fit(Countdown, Still(), discount=GAMMA, states=300, epochs=100)
    seen = np.arange(1, 13)[:, None] / 20
    assert value(seen) == pytest.approx(counted(seen), abs=0.15)
    assert value.r2 > 0.99
    assert value.simulated < 300 * 40


def test_a_value_stands_for_all_further_steps_and_for_none_after_a_termination():
    settings: dict[str, Any] = {"length": 4, "discount": GAMMA, "noise": 0.6, "seed": 3}
    run = collect(Countdown, Still(), 200, continuation=30, **settings)
    told = collect(Countdown, Still(), 200, continuation=0, value=counted, **settings)
    assert np.array_equal(told.actions, run.actions)
    assert told.after == pytest.approx(run.after, abs=1e-4)
    assert told.plan_value == pytest.approx(run.plan_value, abs=1e-4)
    ended = told.steps < 4
    assert ended.mean() > 0.05
    assert (told.after[ended] == 0).all()
    assert told.meta["steps"] < 0.6 * run.meta["steps"]


def test_what_a_time_limit_cuts_off_is_worth_what_would_have_come():
    env = Countdown()
    left, clock = np.arange(3, 21), np.array([0, 997, 998, 999] * 5)[:18]
    states = np.column_stack([left, clock])
    ran = run_on(env, Still(), states, np.zeros((18, 3, 1)), 2, discount=GAMMA, value=counted)
    total = ran.rewards @ GAMMA ** np.arange(3) + ran.after
    assert set(ran.steps) == {1, 2, 3}
    assert total == pytest.approx(counted(left[:, None] / 20), abs=1e-6)


def test_an_environment_says_whether_time_or_something_else_ended_it():
    class Pushing(Still):
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            return np.full((len(observation), 3), 1.0, np.float32), state

    env = VectorEnv("Hopper-v5", max_episode_steps=30)
    observation = env.reset(2, 0)
    while not env.done.all():
        observation, _, _ = env.step(Pushing().predict(observation)[0])
    assert env.terminated.all()
    fallen = env.save_states()
    env.reset(2, 0)
    assert not env.terminated.any()
    for _ in range(30):
        env.restart_clock()
        env.step(np.zeros((2, 3)))
    assert [each.elapsed for each in env.envs] == [1, 1]
    short = VectorEnv("Hopper-v5", max_episode_steps=3)
    short.reset(2, 0)
    for _ in range(3):
        short.step(np.zeros((2, 3)))
    assert short.done.all()
    assert not short.terminated.any()
    cut = short.save_states()
    short.restore_states([fallen[0], cut[0]])
    assert short.done.all()
    env.restore_states([fallen[0], fallen[1]])
    assert env.terminated.all()


# -- in place of the reference's steps ---------------------------------------------------------------------------------


def agreement(one: SegmentPairs, other: SegmentPairs, rows: np.ndarray) -> float:
    assert one.label is not None
    assert other.label is not None
    return float((one.label == other.label)[rows].mean())


def test_labels_by_value_are_those_of_a_long_look_ahead_and_a_myopic_teachers_are_not(pendulum):
    settings: dict[str, Any] = {"length": 5, "discount": 0.95, "noise": 0.3, "correlation": 0.9, "seed": 5}
    far = collect(BatchedPendulum, Swinging(), 600, continuation=100, **settings)
    told = collect(BatchedPendulum, Swinging(), 600, continuation=0, value=pendulum, **settings)
    near = collect(BatchedPendulum, Swinging(), 600, continuation=0, **settings)
    rows = far.saved_states()[:, -1] < 95  # the look-ahead is not cut short
    assert rows.sum() > 200
    assert np.array_equal(told.actions, far.actions)
    assert agreement(told, far, rows) > 0.8
    assert agreement(told, far, rows) > agreement(near, far, rows) + 0.1
    assert told.meta["steps"] < 0.4 * far.meta["steps"]


def test_a_value_is_the_same_for_the_same_seed_and_comes_back_from_its_file(pendulum, tmp_path):
    seen = np.random.default_rng(0).normal(size=(20, 3))
    settings: dict[str, Any] = {"discount": GAMMA, "states": 100, "steps": 20, "epochs": 20}
    one, same, other = (FittedValue.fit(BatchedPendulum, Swinging(), seed=seed, **settings) for seed in (4, 4, 5))
    assert np.array_equal(one(seen), same(seen))
    assert not np.array_equal(one(seen), other(seen))
    loaded = FittedValue.load(pendulum.save(tmp_path / "made" / "value.safetensors"))
    assert np.array_equal(loaded(seen), pendulum(seen))
    for name in ("discount", "r2", "rows", "simulated"):
        assert getattr(loaded, name) == getattr(pendulum, name)
    with pytest.raises(FileNotFoundError, match=r"FittedValue\.save"):
        FittedValue.load(tmp_path / "absent.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"torn\.safetensors is no"):
        FittedValue.load(tmp_path / "torn.safetensors")


def test_an_interrupted_collection_goes_on_with_its_value_and_refuses_another(pendulum, tmp_path):
    settings: dict[str, Any] = {"length": 2, "continuation": 0, "discount": 0.95, "seed": 1, "folder": tmp_path}
    first = collect(BatchedPendulum, Swinging(), 150, value=pendulum, **settings)
    again = collect(BatchedPendulum, Swinging(), 150, value=pendulum, workers=2, **settings)
    assert np.array_equal(first.after, again.after)
    assert first.meta["value"] == again.meta["value"]
    with pytest.raises(ValueError, match="holds a collection with value="):
        collect(BatchedPendulum, Swinging(), 150, **settings)
    with pytest.raises(ValueError, match="holds a collection with value="):
        collect(BatchedPendulum, Swinging(), 150, value=lambda observation: observation[:, 0], **settings)


def test_a_gymnasium_environment_goes_on_beyond_its_time_limit():
    value = FittedValue.fit("Pendulum-v1", Swinging(), discount=0.5, states=20, steps=20, epochs=5,
                            states_per_trajectory=20)  # fmt: skip
    env = VectorEnv("Pendulum-v1", 1, max_episode_steps=10)
    env.reset(1, 0)
    told = collect(env, Swinging(), 10, length=3, continuation=0, discount=0.5, value=value)
    assert (told.steps < 3).any()  # cut by the limit, and worth something all the same
    assert (told.after != 0).all()


# -- bad input ---------------------------------------------------------------------------------------------------------


class Chance(Switch):
    """Pays by chance, so that nothing can be foretold from an observation."""

    def __init__(self) -> None:
        super().__init__()
        self.random = np.random.default_rng(0)

    def _move(self, state: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.random.standard_normal(len(state)), self.random.random((len(state), 1))


class Salary(Switch):
    """Pays the same wherever it stands."""

    def _move(self, state: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.ones(len(state)), 1 - state


def test_a_value_that_explains_nothing_is_refused():
    with pytest.raises(ValueError, match=r"explains nothing.*R² = -.*continuation"):
        FittedValue.fit(Salary, Still(), discount=GAMMA, states=50, steps=10, epochs=2)
    try:
        found = FittedValue.fit(Chance, Still(), discount=GAMMA, states=100, steps=20, epochs=10).r2
    except ValueError:
        found = 0.0
    assert found < 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"discount": 1.0}, "discount must lie between 0 and 1"),
        ({"states": 0}, "states"),
        ({"length": 1.5}, "length"),
        ({"noise": -0.1}, "noise"),
        ({"correlation": 2.0}, "correlation"),
        ({"held_out": 1.0}, "held_out"),
        ({"states": 2}, "too few to hold some out"),
        ({"length": 100}, "every episode ended within its noisy segment"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        FittedValue.fit(Countdown, Still(), **({"discount": GAMMA} | settings))


def test_what_is_no_value_of_this_collection_is_refused(pendulum):
    given: dict[str, Any] = {"length": 2, "continuation": 0}
    for value, message in (
        (pendulum, r"discount 0\.95 and the collection 1\.0"),
        (lambda observation: observation, r"one number an observation: got \(8, 3\)"),
        (lambda observation: np.full(len(observation), np.nan), "value gives NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            collect(BatchedPendulum, Swinging(), 10, value=value, **given)
    with pytest.raises(ValueError, match=r"must be \(B, 3\)"):
        collect(Countdown, Still(), 10, value=pendulum, discount=0.95, **given)
    with pytest.raises(TypeError, match="restart_clock"):
        FittedValue.fit(Clockless(), Swinging(), discount=GAMMA)
    with pytest.raises(TypeError, match="which episodes terminated"):
        collect(Clockless(), Swinging(), 10, value=pendulum, discount=0.95, **given)


class Clockless:
    """A pendulum that knows neither why it ended nor how to go on."""

    hidden = ("restart_clock", "terminated")

    def __init__(self) -> None:
        self._env = BatchedPendulum()

    def __getattr__(self, name: str) -> Any:
        if name in self.hidden:
            raise AttributeError(name)
        return getattr(self._env, name)
