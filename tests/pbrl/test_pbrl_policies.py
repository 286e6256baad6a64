"""Frozen policies: pretrained actors against their measured returns, checkpoints, noise, cloning."""

import copy
import csv
import json
import math
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from support.places import data_path

from pfm import pbrl

UNIT = Box(-1.0, 1.0, (2,), np.float32)


@pytest.fixture(scope="module")
def measured():
    path = data_path("rl_policies", "measured_returns.csv")
    with path.open() as file:
        return {(row["algo"], row["trained_env"]): row for row in csv.DictReader(file)}


# Those whose dynamics forgive rounding: a chaotic one differs with the order in which a matrix product is summed.
@pytest.mark.parametrize(
    ("algorithm", "task"),
    [
        *((algorithm, "Pendulum-v1") for algorithm in ("a2c", "ars", "ddpg", "ppo", "sac", "tqc", "trpo")),
        *((algorithm, "MountainCarContinuous-v0") for algorithm in ("a2c", "ars", "ddpg", "sac", "trpo")),
        *((algorithm, "LunarLanderContinuous-v2") for algorithm in ("ppo", "trpo")),
        ("sac", "Hopper-v3"),
    ],
)
def test_actors_earn_their_measured_returns(measured, algorithm, task):
    row = measured[algorithm, task]
    policy = load(data_path("rl_policies", f"{algorithm}_{task}.npz"))
    assert policy.env_name == row["eval_env"]
    returns = pbrl.episode_returns(policy.env_name, policy, 5, range(1000, 1005))
    assert returns.mean() == pytest.approx(float(row["mean_return"]), abs=0.15)
    assert returns.std() == pytest.approx(float(row["std_return"]), abs=0.15)


def load(path, **settings) -> Any:
    return pbrl.load_policy(path, **settings)


def actor(path, output="clip", **more):
    """Write an actor of two inputs and two outputs: one hidden layer of three, or what ``more`` says."""
    generator = np.random.default_rng(0)
    arrays = {
        "W0": generator.normal(size=(3, 2)),
        "b0": generator.normal(size=3),
        "W1": generator.normal(size=(2, 3)),
        "b1": generator.normal(size=2),
        **{name: value for name, value in more.items() if not isinstance(value, str | bool)},
    }
    meta = {"algo": "made", "env": "Pendulum-v1", "hidden_activation": "relu", "output": output}
    meta |= {name: value for name, value in more.items() if isinstance(value, str | bool)}
    np.savez(path, meta=json.dumps(meta), **arrays)
    return arrays


def by_hand(arrays, seen):
    hidden = np.maximum(arrays["W0"] @ seen + arrays["b0"], 0)
    return hidden, arrays["W1"] @ hidden + arrays["b1"]


def test_an_actor_is_the_network_of_its_file(tmp_path):
    path = tmp_path / "actor.npz"
    space = Box(np.array([-1, 0], np.float32), np.array([1, 4], np.float32), dtype=np.float32)
    seen = np.array([[0.3, -0.7], [1.2, 0.4], [-2.0, 0.1]])
    for output in ("clip", "tanh", "hardtanh2_tanh"):
        arrays = actor(path, output)
        policy = load(path, action_space=space)
        actions, state = policy.predict(seen)
        assert state is None
        for row, action in zip(seen, actions, strict=True):
            _, out = by_hand(arrays, row)
            squashed = np.tanh(np.clip(out, -2, 2) if output == "hardtanh2_tanh" else out)
            expected = np.clip(out, space.low, space.high) if output == "clip" else [0, 2] + squashed * [1, 2]
            np.testing.assert_allclose(action, expected, atol=1e-6)
            np.testing.assert_allclose(policy.predict(row)[0], action, atol=1e-6)
            assert policy.predict(row)[0].shape == (2,)


def test_an_actor_normalises_and_clips_its_observations(tmp_path):
    path = tmp_path / "actor.npz"
    mean, variance = np.array([1.0, -2.0]), np.array([4.0, 0.25])
    arrays = actor(path, "tanh", obs_mean=mean, obs_var=variance, clip_obs=np.array(1.5), norm_eps=np.array(1e-8))
    policy = load(path, action_space=UNIT)
    _, out = by_hand(arrays, np.array([0.5, 1.5]))
    np.testing.assert_allclose(policy.predict(np.array([2.0, 100.0]))[0], np.tanh(out), atol=1e-6)


def test_a_time_feature_counts_the_steps_of_each_episode(tmp_path):
    path = tmp_path / "actor.npz"
    arrays = actor(path, "tanh", time_feature=True)
    policy = load(path, action_space=UNIT)
    seen, state = np.array([[0.4], [0.4]]), None
    for clock in ([1.0, 1.0], [0.999, 0.999], [0.998, 1.0]):
        start = np.array([step == 1.0 for step in clock])
        actions, state = policy.predict(seen, state, start)
        for action, left in zip(actions, clock, strict=True):
            _, out = by_hand(arrays, np.array([0.4, left]))
            np.testing.assert_allclose(action, np.tanh(out), atol=1e-6)


def test_stochastic_actors_draw_from_their_law(tmp_path):
    path, seen = tmp_path / "actor.npz", np.array([0.3, -0.7])
    wide = Box(-50.0, 50.0, (2,), np.float32)
    generator = np.random.default_rng(1)
    log_std, matrix = np.array([-1.0, 0.5]), generator.normal(size=(3, 2)) / 2
    weight, bias = generator.normal(size=(2, 3)) / 2, generator.normal(size=2) / 2
    for output, more in (
        ("clip", {"log_std": log_std}),
        ("clip", {"log_std": matrix}),
        ("tanh", {"logstd_W": weight, "logstd_b": bias}),
    ):
        arrays = actor(path, output, **more)
        policy = load(path, action_space=wide if output == "clip" else UNIT, seed=2)
        assert policy.stochastic
        hidden, out = by_hand(arrays, seen)
        drawn, _ = policy.predict(np.tile(seen, (40_000, 1)))
        if output == "tanh":
            std, drawn = np.exp(weight @ hidden + bias), np.arctanh(np.clip(drawn, -1 + 1e-7, 1 - 1e-7))
        else:
            std = np.exp(log_std) if "log_std" in more and log_std is more["log_std"] else None
            std = np.sqrt(hidden**2 @ np.exp(matrix) ** 2) if std is None else std
        middle = np.quantile(drawn, [0.25, 0.5, 0.75], axis=0)
        np.testing.assert_allclose(middle[1], out, atol=0.03 * std.max())
        np.testing.assert_allclose(middle[2] - middle[0], 1.349 * std, rtol=0.03)
        assert np.array_equal(policy.predict(seen, deterministic=True)[0], policy.predict(seen, deterministic=True)[0])
        policy.seed(5)
        first = policy.predict(seen)[0]
        assert not np.array_equal(first, policy.predict(seen)[0])
        policy.seed(5)
        assert np.array_equal(first, policy.predict(seen)[0])
    actor(path)
    fixed = load(path, action_space=UNIT)
    assert not fixed.stochastic
    assert np.array_equal(fixed.predict(seen)[0], fixed.predict(seen)[0])


def test_files_that_are_no_policy_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no policy at"):
        load(tmp_path / "absent.npz")
    for name, content in (("torn.npz", b"PK"), ("text.zip", b"text"), ("torn.safetensors", b"1")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load(tmp_path / name)
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        load(tmp_path / "weights.pt")
    path = tmp_path / "actor.npz"
    actor(path, "softmax")
    with pytest.raises(ValueError, match="output of the actor must be one of clip, tanh"):
        load(path, action_space=UNIT)
    actor(path)
    with pytest.raises(ValueError, match="action space is"):
        load(path)  # the pendulum has one action
    policy = load(path, action_space=UNIT)
    with pytest.raises(ValueError, match="must have 2 numbers: got 3"):
        policy.predict(np.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        policy.predict(np.array([0.0, np.nan]))


def test_noise_is_added_in_half_ranges_and_clipped(tmp_path):
    path = tmp_path / "actor.npz"
    actor(path, "tanh", W1=np.zeros((2, 3)), b1=np.zeros(2))
    space = Box(np.array([-1, 0], np.float32), np.array([1, 8], np.float32), dtype=np.float32)
    inner = load(path, action_space=space)
    policy = pbrl.NoisyPolicy(inner, 0.1, seed=3)
    seen = np.zeros((20_000, 2))
    actions, _ = policy.predict(seen)
    np.testing.assert_allclose(actions.mean(0), [0, 4], atol=0.02)
    np.testing.assert_allclose(actions.std(0), [0.1, 0.4], rtol=0.03)
    assert np.array_equal(policy.predict(seen, deterministic=True)[0], inner.predict(seen)[0])
    policy.seed(3)
    assert np.array_equal(policy.predict(seen)[0], actions)
    rough, _ = pbrl.NoisyPolicy(inner, 5.0).predict(seen)
    assert space.contains(rough.min(0))
    assert space.contains(rough.max(0))
    assert rough[0].dtype == np.float32
    with pytest.raises(ValueError, match="sigma"):
        pbrl.NoisyPolicy(inner, -1.0)
    with pytest.raises(ValueError, match="finite bounds"):
        pbrl.NoisyPolicy(inner, 0.1, action_space=Box(-np.inf, np.inf, (2,)))


@pytest.mark.parametrize("algorithm", ["PPO", "A2C", "SAC", "TD3", "DDPG"])
def test_checkpoints_load_and_are_evaluated(algorithm, tmp_path):
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.evaluation import evaluate_policy

    env = pbrl.make_env("Pendulum-v1", max_episode_steps=20)
    more = {"buffer_size": 10} if algorithm in ("SAC", "TD3", "DDPG") else {"use_sde": True}
    model = getattr(sb3, algorithm)("MlpPolicy", env, policy_kwargs={"net_arch": [8]}, device="cpu", seed=0, **more)
    model.save(tmp_path / "model.zip")
    policy = load(tmp_path / "model.zip")
    assert type(policy).__name__ == {"DDPG": "TD3"}.get(algorithm, algorithm)
    assert isinstance(policy, pbrl.Policy)
    pbrl.check_policy(policy, env)
    seen = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    assert np.array_equal(policy.predict(seen, deterministic=True)[0], model.predict(seen, deterministic=True)[0])
    pbrl.seed_policy(policy, 1)
    first = policy.predict(seen)[0]
    pbrl.seed_policy(policy, 1)
    assert np.array_equal(first, policy.predict(seen)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no Monitor
        env.reset(seed=7)
        returns, lengths = evaluate_policy(policy, env, 2, return_episode_rewards=True)
    assert lengths == [20, 20]
    assert np.isfinite(returns).all()


@pytest.mark.parametrize("name", ["Pendulum-v1", "LunarLanderContinuous-v3"])
def test_evaluate_policy_measures_what_episode_returns_measures(measured, name):
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import DummyVecEnv

    file = {"Pendulum-v1": "ddpg_Pendulum-v1", "LunarLanderContinuous-v3": "ppo_LunarLanderContinuous-v2"}[name]
    policy = load(data_path("rl_policies", f"{file}.npz"))
    vector = DummyVecEnv([lambda: pbrl.make_env(name)] * 3)
    vector._seeds = [1, 2, 3]  # one for each copy, at the first reset
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        returns: Any = evaluate_policy(policy, vector, 3, return_episode_rewards=True)[0]
    ours = pbrl.episode_returns(name, policy, 3, [1, 2, 3])
    np.testing.assert_allclose(sorted(returns), sorted(ours), rtol=1e-4)  # its sums are float32


def test_a_policy_of_another_environment_is_refused(tmp_path):
    env = pbrl.make_env("Pendulum-v1")
    actor(tmp_path / "actor.npz")
    policy = load(tmp_path / "actor.npz", action_space=UNIT)
    with pytest.raises(ValueError, match="the policy acts in"):
        pbrl.check_policy(policy, env)
    with pytest.raises(TypeError, match="needs predict"):
        pbrl.check_policy(object(), env)
    policy.action_space = env.action_space
    policy.observation_space = Box(-1.0, 1.0, (7,))
    with pytest.raises(ValueError, match="reads"):
        pbrl.check_policy(policy, env)


# -- cloning ------------------------------------------------------------------------------------------------

STD = np.array([[0.05, 0.2], [0.1, 0.05], [0.02, 0.3]])
SPACE = Box(np.array([-2, -1], np.float32), np.array([2, 2.2], np.float32), dtype=np.float32)


def law(observations):
    """The segments' mean: a smooth function of four numbers, (N, 3, 2)."""
    a, b = np.sin(observations[:, 0] + observations[:, 1]), np.tanh(observations[:, 2])
    return np.stack([np.stack([a * k / 2, 1 + b * k / 3], -1) for k in (1, 2, 3)], 1)


@pytest.fixture(scope="module")
def acted():
    generator = np.random.default_rng(0)
    observations = generator.normal(size=(2500, 4)) * [1, 1, 1, 100]  # the last carries nothing, at another scale
    return observations, law(observations) + STD * generator.standard_normal((2500, 3, 2))


@pytest.fixture(scope="module")
def cloned(acted):
    return pbrl.ClonedPolicy.fit(*acted, action_space=SPACE, hidden=64, epochs=30, seed=0)


def test_cloning_recovers_the_law_that_acted(acted, cloned):
    fresh = np.random.default_rng(1).normal(size=(1000, 4)) * [1, 1, 1, 100]
    error = cloned.propose(fresh, deterministic=True) - law(fresh)
    spread = law(fresh).std(0)
    assert np.sqrt((error**2).mean()) < 0.15 * np.sqrt((spread**2).mean())
    half = (SPACE.high - SPACE.low) / 2
    ratio = np.exp(cloned.log_std.detach().numpy()) * half / STD
    assert (ratio[STD >= 0.1] > 0.9).all()
    assert (ratio[STD >= 0.1] < 1.3).all()

    observations, segments = acted
    order = np.random.default_rng(2).permutation(len(segments))
    blind = pbrl.ClonedPolicy.fit(observations, segments[order], action_space=SPACE, hidden=64, epochs=10)
    error = blind.propose(fresh, deterministic=True) - law(fresh)
    assert np.sqrt((error**2).mean()) > 0.9 * np.sqrt((spread**2).mean())


def test_the_density_is_that_of_the_gaussian(cloned, acted):
    observations, segments = (torch.as_tensor(array[:50], dtype=torch.float32) for array in acted)
    std = cloned.log_std.exp() * torch.as_tensor((SPACE.high - SPACE.low) / 2)
    expected = torch.distributions.Normal(cloned(observations), std.expand(50, 3, 2)).log_prob(segments).sum((1, 2))
    density = cloned.log_prob(observations, segments)
    torch.testing.assert_close(density, expected)
    gradients = torch.autograd.grad(density.sum(), list(cloned.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    drawn = cloned.sample(observations[:1].expand(20_000, -1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.std(0), std, rtol=0.03, atol=0)
    torch.testing.assert_close(drawn.mean(0), cloned(observations[:1])[0], rtol=0, atol=0.01)
    with pytest.raises(ValueError, match=r"segments must have shape \(50, 3, 2\)"):
        cloned.log_prob(observations, segments[:, 0])


def test_weights_say_which_rows_are_cloned(acted):
    observations, _ = acted
    high = np.arange(2500) % 2
    segments = np.where(high[:, None], 0.5, -0.5) * np.ones(2)
    policy = pbrl.ClonedPolicy.fit(observations, segments, action_space=UNIT, weight=high, hidden=16, epochs=5)
    np.testing.assert_allclose(policy.propose(observations[:20], deterministic=True), 0.5, atol=0.02)
    assert policy.horizon == 1
    assert np.exp(policy.log_std.detach().numpy()).max() < 0.02


def test_a_cloned_policy_proposes_within_the_bounds_and_predicts(cloned, acted):
    seen = acted[0][:500]
    proposals = cloned.propose(seen)
    assert proposals.shape == (500, 3, 2)
    assert (proposals >= SPACE.low).all()
    assert (proposals <= SPACE.high).all()
    assert (proposals == SPACE.high).any()
    assert cloned.propose(seen[0]).shape == (3, 2)
    np.testing.assert_allclose(
        cloned.predict(seen, deterministic=True)[0], cloned.propose(seen, deterministic=True)[:, 0], atol=1e-6
    )
    assert cloned.predict(seen[0])[0].shape == (2,)
    cloned.seed(4)
    first = cloned.propose(seen)
    assert not np.array_equal(first, cloned.propose(seen))
    cloned.seed(4)
    assert np.array_equal(first, cloned.propose(seen))


def test_a_cloned_policy_is_saved_and_copied(cloned, acted, tmp_path):
    cloned.save(tmp_path / "clone.safetensors")
    loaded, twin = load(tmp_path / "clone.safetensors"), copy.deepcopy(cloned)
    seen = acted[0][:20]
    for other in (loaded, twin):
        assert np.array_equal(other.propose(seen, deterministic=True), cloned.propose(seen, deterministic=True))
        assert np.array_equal(other.log_std.detach(), cloned.log_std.detach())
        assert other.action_space == SPACE
    with torch.no_grad():
        twin.log_std.add_(1.0)
    assert not np.array_equal(twin.log_std.detach(), cloned.log_std.detach())


def test_a_clone_of_an_actor_earns_nearly_as_much(measured):
    actor = load(data_path("rl_policies", "ddpg_Pendulum-v1.npz"))
    env = pbrl.BatchedPendulum()
    seen = pbrl.rollout(env, pbrl.NoisyPolicy(actor, 0.3), 200, count=12, seed=0)
    rows = seen.observations.reshape(-1, 3)
    actions, _ = actor.predict(rows)
    clone = pbrl.ClonedPolicy.fit(rows, actions, action_space=env.action_space, epochs=30)
    order = np.random.default_rng(0).permutation(len(rows))
    blind = pbrl.ClonedPolicy.fit(rows, actions[order], action_space=env.action_space, epochs=10)
    own, cloned, shuffled = (pbrl.episode_returns(env, policy, 100, 5).mean() for policy in (actor, clone, blind))
    assert own > -170
    assert cloned > own - 40
    assert shuffled < own - 500


def test_what_cannot_be_cloned_is_refused(acted):
    observations, segments = acted
    fit = pbrl.ClonedPolicy.fit
    with pytest.raises(ValueError, match="at least 10 rows"):
        fit(observations[:5], segments[:5], action_space=SPACE)
    with pytest.raises(ValueError, match=r"segments \(N, H, 2\)"):
        fit(observations, segments[:100], action_space=SPACE)
    broken = observations.copy()
    broken[17, 2] = math.nan
    with pytest.raises(ValueError, match="observations hold NaN or infinity, first in row 17"):
        fit(broken, segments, action_space=SPACE)
    with pytest.raises(ValueError, match="weight"):
        fit(observations, segments, action_space=SPACE, weight=np.zeros(2500))
    with pytest.raises(ValueError, match="finite bounds"):
        fit(observations, segments, action_space=Box(-np.inf, np.inf, (2,)))


def test_a_clone_refuses_what_it_never_read(cloned, tmp_path):
    with pytest.raises(ValueError, match="must have 4 numbers"):
        cloned.predict(np.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        cloned.predict(np.full(4, np.nan))
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"expected pfm\.pbrl\.ClonedPolicy"):
        pbrl.ClonedPolicy.load(tmp_path / "other.safetensors")


def test_the_spaces_of_old_versions_are_those_of_new_ones(measured):
    for file in sorted(data_path("rl_policies").glob("*.npz")):
        policy = load(file)
        assert policy.env_name in gymnasium.registry
        assert policy.env_name == measured[policy.algorithm, policy.meta["env"]]["eval_env"]
