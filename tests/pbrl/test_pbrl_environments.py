"""Exact states: what follows a restore equals, bit for bit, what followed the save."""

import subprocess
import sys
import time
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.mujoco.reacher_v5 import ReacherEnv
from gymnasium.spaces import Box, Dict
from gymnasium.wrappers import NormalizeObservation, TimeLimit

from pfm import pbrl

EXACT = [
    ("Pendulum-v1", {}),
    ("MountainCarContinuous-v0", {}),
    ("Reacher-v5", {}),
    ("Hopper-v5", {}),
    ("Hopper-v4", {}),
    ("HalfCheetah-v5", {}),
    ("HalfCheetah-v4", {}),
    ("Walker2d-v5", {}),
    ("Walker2d-v4", {}),
    ("Ant-v5", {}),
    ("Ant-v4", {}),
    ("BipedalWalker-v3", {}),
    ("LunarLanderContinuous-v3", {}),
    ("LunarLanderContinuous-v3", {"enable_wind": True}),
]
WITHOUT_DRAWS = [name for name, _ in EXACT if not name.startswith("LunarLander")]
STEPS = 200


def drawn_actions(env, steps, seed, size=1.0):
    low, high = env.action_space.low, env.action_space.high
    return np.random.default_rng(seed).uniform(size * low, size * high, (steps, *low.shape)).astype(np.float32)


def trace(env, actions):
    """Give observations, rewards and ends of a sequence of actions, going on after an end."""
    steps = [env.step(action)[:4] for action in actions]
    return [np.array(column) for column in zip(*steps, strict=True)]


def error(first, second):
    return max(float(np.abs(a.astype(float) - b.astype(float)).max()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("name", "settings"), EXACT)
def test_what_follows_a_restore_is_what_followed_the_save(name, settings, tmp_path):
    env, other = (pbrl.make_env(name, **settings) for _ in range(2))
    env.reset(seed=3)
    env.reset()  # a start whose seed nobody knows
    *_, before = (env.step(action)[0] for action in drawn_actions(env, 15, 0, 0.2))
    np.savez(tmp_path / "state.npz", allow_pickle=False, **env.save_state())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as file:
        state = dict(file)
    actions = drawn_actions(env, STEPS, 1)
    expected = trace(env, actions)
    other.reset(seed=8)
    trace(other, drawn_actions(env, 60, 2))  # another world with another history
    for restored in (env, other, other):
        observation = restored.restore_state(state)
        assert np.array_equal(observation, before)
        assert restored.elapsed == 15
        assert error(trace(restored, actions), expected) == 0
    assert error(trace(other, actions), expected) > 0  # the comparison sees a state that is not the saved one


@pytest.mark.parametrize("name", ["Hopper-v5", "Ant-v5"])
def test_positions_and_velocities_alone_are_not_the_state(name):
    env = pbrl.make_env(name)
    env.reset(seed=0)
    trace(env, drawn_actions(env, 15, 0))
    core: Any = env.unwrapped
    qpos, qvel = core.data.qpos.copy(), core.data.qvel.copy()
    actions = drawn_actions(env, 50, 1)
    expected = trace(env, actions)
    core.set_state(qpos, qvel)
    assert error(trace(env, actions), expected) > 0


def test_the_reward_of_ant_reads_positions_of_the_last_forward_pass():
    env = pbrl.make_env("Ant-v5")
    env.reset(seed=0)
    trace(env, drawn_actions(env, 15, 0))
    state = env.save_state()
    actions = drawn_actions(env, 1, 1)
    expected = trace(env, actions)
    env.restore_state(state)
    core: Any = env.unwrapped
    core.data.xpos[:] += 1e-3
    assert error(trace(env, actions), expected) > 1e-3


def test_a_used_bipedal_world_orders_its_contacts_as_a_new_one():
    used, new = (pbrl.make_env("BipedalWalker-v3") for _ in range(2))
    for seed in range(3):
        used.reset(seed=seed)
        trace(used, drawn_actions(used, 80, seed))
    used.reset(seed=9)
    new.reset(seed=9)
    actions = drawn_actions(new, STEPS, 4)
    assert error(trace(used, actions), trace(new, actions)) == 0


@pytest.mark.parametrize("name", ["Reacher-v5", "Pendulum-v1", "LunarLanderContinuous-v3"])
def test_the_time_limit_goes_on_counting_from_the_saved_step(name):
    env = pbrl.make_env(name, max_episode_steps=20)
    env.reset(seed=0)
    still = np.zeros_like(drawn_actions(env, 20, 0))
    trace(env, still[:16])
    state = env.save_state()
    for _ in range(2):
        *_, truncated = trace(env, still[:4])
        assert truncated.tolist() == [False, False, False, True]
        assert env.done
        env.reset(seed=1)
        env.restore_state(state)
        assert not env.done
        assert env.elapsed == 16


def test_an_episode_that_had_ended_has_ended_after_the_restore():
    env = pbrl.make_env("Reacher-v5", max_episode_steps=3)
    env.reset(seed=0)
    trace(env, drawn_actions(env, 3, 0))
    ended = env.save_state()
    env.reset(seed=1)
    env.restore_state(ended)
    assert env.done


@pytest.mark.parametrize("name", WITHOUT_DRAWS)
def test_no_step_draws_random_numbers(name):
    env = pbrl.make_env(name)
    env.reset(seed=0)
    before = env.unwrapped.np_random.bit_generator.state
    trace(env, drawn_actions(env, 60, 0))
    assert env.unwrapped.np_random.bit_generator.state == before


def test_the_replay_repeats_the_draws_of_a_step():
    env = pbrl.make_env("LunarLanderContinuous-v3")
    env.reset(seed=0)
    drawn = [env.unwrapped.np_random.bit_generator.state["state"]["state"]]
    for action in drawn_actions(env, 10, 0):
        env.step(action)
        drawn.append(env.unwrapped.np_random.bit_generator.state["state"]["state"])
    assert len(set(drawn)) == 11
    state = env.save_state()
    env.reset(seed=1)
    env.restore_state(state)
    assert env.unwrapped.np_random.bit_generator.state["state"]["state"] == drawn[-1]


def test_a_later_state_of_the_same_episode_is_reached_by_the_remaining_actions():
    env = pbrl.make_env("BipedalWalker-v3")
    env.reset(seed=5)
    trace(env, drawn_actions(env, 20, 0))
    early = env.save_state()
    trace(env, drawn_actions(env, 20, 1))
    late = env.save_state()
    expected = trace(env, drawn_actions(env, 50, 2))
    env.restore_state(early)
    env.restore_state(late)
    assert error(trace(env, drawn_actions(env, 50, 2)), expected) == 0


class GoalReacher(ReacherEnv):
    """Reacher with a goal that the simulator does not know, as goal environments have."""

    def __init__(self):
        super().__init__()
        whole, part = Box(-np.inf, np.inf, (10,), np.float64), Box(-np.inf, np.inf, (2,), np.float64)
        self.observation_space = Dict({"observation": whole, "desired_goal": part})

    def _get_obs(self):
        return {"observation": super()._get_obs(), "desired_goal": self.goal.copy()}

    def reset_model(self):
        observation = super().reset_model()
        self.goal = self.np_random.uniform(-0.1, 0.1, 2)
        return {**observation, "desired_goal": self.goal.copy()}  # type: ignore[dict-item]

    def _get_rew(self, action):
        return -float(np.linalg.norm(self.get_body_com("fingertip")[:2] - self.goal)), {}


def test_a_goal_kept_apart_from_the_simulator_is_restored():
    env = pbrl.StatefulEnv(TimeLimit(GoalReacher(), 50))
    env.reset(seed=0)
    for action in drawn_actions(env, 5, 0):
        observation = env.step(action)[0]
    state = env.save_state()
    actions = drawn_actions(env, 30, 1)
    expected = [env.step(action)[:2] for action in actions]
    env.reset(seed=1)
    restored = env.restore_state(state)
    assert restored.keys() == observation.keys()
    assert all(np.array_equal(restored[key], observation[key]) for key in restored)
    for action, (seen, reward) in zip(actions, expected, strict=True):
        now, again, *_ = env.step(action)
        assert again == reward
        assert all(np.array_equal(now[key], seen[key]) for key in seen)


@pytest.mark.parametrize("name", ["Pendulum-v1", "Reacher-v5", "LunarLanderContinuous-v3"])
def test_states_are_stored_together(name, tmp_path):
    env = pbrl.make_env(name)
    env.reset(seed=0)
    states = []
    for action in drawn_actions(env, 6, 0):
        states.append(env.save_state())
        env.step(action)
    np.savez(tmp_path / "states.npz", allow_pickle=False, **pbrl.stack_states(states))
    with np.load(tmp_path / "states.npz", allow_pickle=False) as file:
        unstacked = pbrl.unstack_states(dict(file))
    assert len(unstacked) == 6
    for state, again in zip(states, unstacked, strict=True):
        assert state.keys() == again.keys()
        assert all(np.array_equal(state[key], again[key]) and state[key].dtype == again[key].dtype for key in state)
        env.restore_state(again)


def test_an_environment_without_exact_state_says_so():
    with pytest.raises(pbrl.UnsupportedEnvironmentError, match="CartPole"):
        pbrl.make_env("CartPole-v1")
    env = pbrl.StatefulEnv(gymnasium.make("CartPole-v1"))
    env.reset(seed=0)
    assert not env.can_restore
    with pytest.raises(pbrl.UnsupportedEnvironmentError, match="cannot be saved exactly"):
        env.save_state()
    wrapped = pbrl.StatefulEnv(NormalizeObservation(gymnasium.make("Pendulum-v1")))
    with pytest.raises(pbrl.UnsupportedEnvironmentError, match=r"NormalizeObservation\(StatefulEnv\(env\)\)"):
        wrapped.save_state()


def test_states_of_another_environment_are_refused():
    hopper, reacher, pendulum = (pbrl.make_env(name) for name in ("Hopper-v5", "Reacher-v5", "Pendulum-v1"))
    for env in (hopper, reacher, pendulum):
        with pytest.raises(RuntimeError, match="reset"):
            env.save_state()
        with pytest.raises(gymnasium.error.ResetNeeded, match="reset"):
            env.step(env.action_space.sample())
        env.reset(seed=0)
    with pytest.raises(pbrl.StateMismatchError, match="lacks goal"):
        reacher.restore_state(hopper.save_state())
    with pytest.raises(pbrl.StateMismatchError, match="integration of the state has shape"):
        hopper.restore_state(reacher.save_state())
    with pytest.raises(pbrl.StateMismatchError, match="lacks state"):
        pendulum.restore_state(hopper.save_state())
    calm, windy = (pbrl.make_env("LunarLanderContinuous-v3", enable_wind=wind) for wind in (False, True))
    windy.reset(seed=0)
    trace(windy, drawn_actions(windy, 10, 0))
    with pytest.raises(pbrl.StateMismatchError, match="replay of 10 actions"):
        calm.restore_state(windy.save_state())
    with pytest.raises(ValueError, match="stack the states of one environment"):
        pbrl.stack_states([hopper.save_state(), pendulum.save_state()])


# -- array environments -------------------------------------------------------------------------------------


def test_the_batched_pendulum_is_gymnasiums():
    batch, single = pbrl.BatchedPendulum(), gymnasium.make("Pendulum-v1", disable_env_checker=True)
    core: Any = single.unwrapped
    batch.reset(5, 0)
    generator = np.random.default_rng(1)
    start = batch.save_states()
    actions = generator.uniform(-3, 3, (200, 5, 1)).astype(np.float32)  # beyond the bounds too
    stepped = [batch.step(action) for action in actions]
    for row in range(5):
        single.reset()
        core.state = start[row, :2].copy()
        for (observation, reward, done), action in zip(stepped, actions[:, row], strict=True):
            seen, got, _, truncated, _ = single.step(action)
            np.testing.assert_allclose(observation[row], seen, rtol=0, atol=1e-6)
            assert reward[row] == pytest.approx(got, abs=1e-6)
            assert done[row] == truncated
        np.testing.assert_allclose(batch.save_states()[row, :2], core.state, rtol=0, atol=1e-6)


def test_the_point_mass_earns_what_the_riccati_equation_says():
    env = pbrl.BatchedPointMass()
    h = env.seconds
    move = np.kron([[1, h], [0, 1]], np.eye(2))
    push = np.kron([[h * h / 2], [h]], np.eye(2))
    state_cost, action_cost = np.diag([1, 1, 0.1, 0.1]), 0.01 * np.eye(2)
    value, gains = np.zeros((4, 4)), []
    for _ in range(env.horizon):
        gain = np.linalg.solve(action_cost + push.T @ value @ push, push.T @ value @ move)
        value = state_cost + move.T @ value @ (move - push @ gain)
        gains.append(gain)
    start = np.random.default_rng(0).uniform(-0.02, 0.02, (64, 5)) * [1, 1, 1, 1, 0]  # no force meets its bound
    env.restore_states(start)
    total = np.zeros(64)
    for gain in reversed(gains):
        _, reward, done = env.step(-env.save_states()[:, :4] @ gain.T)
        total += reward
    assert done.all()
    np.testing.assert_allclose(total, -np.einsum("ei,ij,ej->e", start[:, :4], value, start[:, :4]), rtol=1e-9)


@pytest.mark.parametrize("kind", [pbrl.BatchedPendulum, pbrl.BatchedPointMass])
def test_array_states_go_on_where_they_were(kind):
    env = kind()
    assert isinstance(env, pbrl.BatchEnv)
    assert np.array_equal(env.reset(7, 3)[:4], env.reset(4, 3))
    actions = np.random.default_rng(0).uniform(-1, 1, (kind.horizon, 4, *env.action_space.shape))
    for action in actions[:20]:
        seen, *_ = env.step(action)
    states = env.save_states()
    expected = [env.step(action) for action in actions[20:]]
    assert expected[-1][2].all()
    assert not expected[-2][2].any()
    for rows in (np.arange(4), np.array([2, 0])):
        assert np.array_equal(env.restore_states(states[rows]), seen[rows])
        for action, (observation, reward, done) in zip(actions[20:], expected, strict=True):
            now, again, ended = env.step(action[rows])
            assert np.array_equal(now, observation[rows])
            assert np.array_equal(again, reward[rows])
            assert np.array_equal(ended, done[rows])
    after, reward, done = env.step(actions[0][rows])
    assert np.array_equal(after, now)
    assert not reward.any()
    assert done.all()
    with pytest.raises(ValueError, match=r"actions must have shape \(2, "):
        env.step(np.zeros((3, 1)))
    with pytest.raises(ValueError, match="NaN"):
        env.step(np.full((2, *env.action_space.shape), np.nan))
    with pytest.raises(ValueError, match="count"):
        env.reset(0, 0)
    with pytest.raises(ValueError, match="states must have shape"):
        env.restore_states(states[:, :2])


@pytest.mark.parametrize("kind", [pbrl.BatchedPendulum, pbrl.BatchedPointMass])
def test_array_environments_make_a_million_steps_a_second(kind):
    env = kind()
    env.reset(4000, 0)
    actions = np.zeros((4000, *env.action_space.shape), np.float32)
    spent = []
    for _ in range(20):
        begin = time.process_time()
        env.step(actions)
        spent.append(time.process_time() - begin)
    assert 4000 / np.median(spent) > 1e6


# -- many copies and rollouts -------------------------------------------------------------------------------


class Drawn:
    """Draws actions of its own stream, uniform within the bounds."""

    def __init__(self, env, seed=0):
        self.action_space = env.action_space
        self.generator = np.random.default_rng(seed)

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        shape = (*np.shape(observation)[:-1], *self.action_space.shape)
        return self.generator.uniform(-1, 1, shape).astype(np.float32), state


def test_copies_step_as_each_would_alone():
    vector, single = pbrl.VectorEnv("Hopper-v5", 3), pbrl.make_env("Hopper-v5")
    assert isinstance(vector, pbrl.BatchEnv)
    begin = vector.reset(3, seed=4)
    made = pbrl.rollout(vector, Drawn(vector), 60, observations=begin)
    assert made.done.any()  # one has fallen
    for row, seed in enumerate(pbrl.episode_seeds(4, 3)):
        observation, _ = single.reset(seed=seed)
        for step in range(len(made.rewards)):
            if not made.alive[step, row]:
                assert made.rewards[step:, row].sum() == 0
                assert np.array_equal(
                    made.observations[step:, row], np.tile(observation, (len(made.rewards) - step, 1))
                )
                break
            assert np.array_equal(made.observations[step, row], observation)
            observation, reward, terminated, truncated, _ = single.step(made.actions[step, row])
            assert made.rewards[step, row] == reward
        assert made.done[row] == (terminated or truncated)


@pytest.mark.parametrize("name", ["Reacher-v5", "Pendulum-v1", "HalfCheetah-v4"])
def test_copies_do_what_the_plain_environment_does(name):
    """Copies leave the time limit's wrapper out and read one model: nothing of that shows."""
    vector, plain = pbrl.VectorEnv(name, 3, max_episode_steps=60), gymnasium.make(name, max_episode_steps=60)
    made = pbrl.rollout(vector, Drawn(vector), 80, count=3, seed=5)
    assert made.done.all()
    assert len(made.rewards) == 60
    for row, seed in enumerate(pbrl.episode_seeds(5, 3)):
        observation, _ = plain.reset(seed=seed)
        truncated = False
        for step in range(60):
            assert not truncated
            assert np.array_equal(made.observations[step, row], observation)
            observation, reward, _, truncated, _ = plain.step(made.actions[step, row])
            assert made.rewards[step, row] == reward
        assert truncated
        assert np.array_equal(made.last[row], observation)


def test_copies_of_a_changed_class_keep_their_own_models():
    class Heavy(ReacherEnv):
        """Counts as somebody's own environment, which may change its model."""

    gymnasium.register("HeavyReacher-v0", Heavy, max_episode_steps=50)
    try:
        own = [vars(env.unwrapped)["model"] for env in pbrl.VectorEnv("HeavyReacher-v0", 2).envs]
    finally:
        del gymnasium.registry["HeavyReacher-v0"]
    shared = [vars(env.unwrapped)["model"] for env in pbrl.VectorEnv("Reacher-v5", 2).envs]
    assert own[0] is not own[1]
    assert shared[0] is shared[1]


def test_a_step_before_the_reset_is_refused():
    with pytest.raises(gymnasium.error.ResetNeeded, match="restore_states"):
        pbrl.VectorEnv("Pendulum-v1", 2).step(np.zeros((2, 1)))


@pytest.mark.parametrize("name", ["Reacher-v5", "LunarLanderContinuous-v3"])
def test_a_rollout_goes_on_and_is_played_again_from_a_saved_step(name):
    env = pbrl.VectorEnv(name)
    whole = pbrl.rollout(env, Drawn(env, 1), 30, count=4, seed=0)
    policy = Drawn(env, 1)
    first = pbrl.rollout(env, policy, 10, count=4, seed=0)
    second = pbrl.rollout(env, policy, 20, observations=first.last, states_at=[5])
    assert np.array_equal(np.concatenate([first.rewards, second.rewards]), whole.rewards)
    assert np.array_equal(np.concatenate([first.observations, second.observations]), whole.observations)
    rows = [3, 1]
    begin = env.restore_states([second.states[5][row] for row in rows])
    assert np.array_equal(begin, second.observations[5, rows])
    again = pbrl.play(env, second.actions[5:, rows].swapaxes(0, 1), observations=begin)
    assert np.array_equal(again.rewards, second.rewards[5:, rows])
    assert np.array_equal(again.last, second.last[rows])
    assert again.discounted(1.0) == pytest.approx(again.returns)
    assert again.discounted(0.5) == pytest.approx((0.5 ** np.arange(15)) @ again.rewards)


def test_a_rollout_of_ended_episodes_stops():
    env = pbrl.BatchedPointMass()
    made = pbrl.rollout(env, Drawn(env), 80, count=3, seed=0)
    assert made.rewards.shape == (50, 3)
    assert made.done.all()
    assert made.alive.all()
    rest = pbrl.rollout(env, Drawn(env), 5, observations=made.last)
    assert rest.rewards.shape == (0, 3)
    assert np.array_equal(rest.last, made.last)


def test_returns_do_not_depend_on_how_episodes_are_batched():
    class Still(Drawn):
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            return np.zeros((*np.shape(observation)[:-1], 1), np.float32), state

    policy = Still(pbrl.make_env("Pendulum-v1"))
    returns = pbrl.episode_returns("Pendulum-v1", policy, 5, 0)
    assert np.array_equal(returns, pbrl.episode_returns("Pendulum-v1", policy, 5, 0, batch=2))
    assert np.array_equal(returns[:3], pbrl.episode_returns("Pendulum-v1", policy, 3, 0))
    assert np.array_equal(
        returns, pbrl.episode_returns(pbrl.VectorEnv("Pendulum-v1"), policy, 5, pbrl.episode_seeds(0, 5))
    )
    assert len(set(returns)) == 5
    assert not np.array_equal(returns, pbrl.episode_returns("Pendulum-v1", policy, 5, 1))


def test_wrong_batches_are_refused():
    env = pbrl.VectorEnv("Pendulum-v1", 2)
    observations = env.reset(2, 0)
    with pytest.raises(ValueError, match=r"actions must have shape \(2, 1\): got \(3, 1\)"):
        env.step(np.zeros((3, 1)))
    with pytest.raises(ValueError, match="NaN"):
        env.step(np.full((2, 1), np.nan))
    with pytest.raises(ValueError, match="seed holds 3 numbers for 2"):
        env.reset(2, [1, 2, 3])
    with pytest.raises(ValueError, match="count"):
        env.reset(0, 0)
    with pytest.raises(TypeError, match="must be boxes"):
        pbrl.VectorEnv("LunarLander-v3")
    with pytest.raises(ValueError, match="either observations"):
        pbrl.rollout(env, Drawn(env), 3)
    with pytest.raises(ValueError, match="either observations"):
        pbrl.rollout(env, Drawn(env), 3, observations=observations, count=2, seed=0)
    with pytest.raises(ValueError, match="steps"):
        pbrl.rollout(env, Drawn(env), 0, observations=observations)
    with pytest.raises(ValueError, match="acts in"):
        pbrl.rollout(env, Drawn(pbrl.make_env("Reacher-v5")), 3, observations=observations)
    with pytest.raises(ValueError, match="actions must have shape"):
        pbrl.play(env, np.zeros((2, 4)), observations=observations)
    with pytest.raises(ValueError, match="episodes"):
        pbrl.episode_returns(env, Drawn(env), 0, 0)
    with pytest.raises(ValueError, match="seed holds 2 numbers"):
        pbrl.episode_returns(env, Drawn(env), 3, [0, 1])


def test_a_missing_part_says_how_to_install_it():
    code = """
import sys
sys.modules[{blocked!r}] = None
import pfm.pbrl
try:
    pfm.pbrl.make_env("Hopper-v5")
except ImportError as error:
    print(error)
"""
    for blocked in ("gymnasium", "mujoco"):
        found = subprocess.run([sys.executable, "-c", code.format(blocked=blocked)], capture_output=True, text=True)
        assert 'pip install "preference-flow[pbrl]"' in found.stdout, found.stderr


def test_importing_the_names_waits_for_no_simulator():
    code = "import pfm.pbrl, sys; print({'gymnasium', 'torch', 'mujoco', 'Box2D'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize("name", pbrl.__all__)
def test_every_public_name_is_there(name):
    assert getattr(pbrl, name).__doc__
    assert name in dir(pbrl)
