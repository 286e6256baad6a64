"""Policies and environments as people have them: VecNormalize, RescaleAction, and what is told before any label."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box
from gymnasium.wrappers import (
    ClipAction,
    FrameStackObservation,
    NormalizeObservation,
    RescaleAction,
    RescaleObservation,
)
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from pfm import pbrl
from pfm.pbrl.normalization import ObservationStatistics

LOW, HIGH = np.float32(-1), np.float32(1)
HALF = np.float32(0.5)


def rescaled(name: str = "Pendulum-v1") -> gymnasium.Env:
    return RescaleAction(gymnasium.make(name), LOW, HIGH)


def trained(kind: Any, env: Any, **settings: Any) -> Any:
    return kind("MlpPolicy", env, device="cpu", seed=0, policy_kwargs={"net_arch": [8]}, **settings)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Train four models for a few steps, each in a folder of its own, with the wrapper of those that have one."""
    root = tmp_path_factory.mktemp("checkpoints")
    on_policy = {"n_steps": 32, "batch_size": 32, "n_epochs": 1}
    wrappers = {}
    for name, kind, env, normal, settings in (
        ("plain", PPO, "Pendulum-v1", None, on_policy), ("normal", PPO, "Pendulum-v1", True, on_policy),
        ("off", SAC, "Reacher-v5", True, {"learning_starts": 100}),
        ("rewards", PPO, "Reacher-v5", False, on_policy),
    ):  # fmt: skip
        vector = make_vec_env(env, seed=0)
        if normal is not None:
            vector = VecNormalize(vector, norm_obs=normal)
        model = trained(kind, vector, **settings)
        model.learn(40)
        (root / name).mkdir()
        model.save(root / name / "model.zip")
        wrappers[name] = vector
    return root, wrappers


def loaded(path: Path, **settings: Any) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy = pbrl.load_policy(path, **settings)
    return policy, [str(warning.message) for warning in caught if "VecNormalize" in str(warning.message)]


# --- VecNormalize ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "warned"), [("plain", False), ("normal", True), ("off", True), ("rewards", False)])
def test_a_checkpoint_that_needs_statistics_says_so(name, warned, checkpoints):
    root, _ = checkpoints
    policy, told = loaded(root / name / "model.zip")
    assert bool(told) == warned
    assert not loaded(root / name / "model.zip", normalize=False)[1]
    if warned:
        assert "load_policy(..., normalize='vec_normalize.pkl')" in told[0]
        env = pbrl.VectorEnv("Pendulum-v1" if name == "normal" else "Reacher-v5")
        with pytest.warns(UserWarning, match="NormalizedPolicy"):
            pbrl.check_policy(policy, env)


@pytest.mark.parametrize("how", ["pickle", "wrapper", "mapping", "pair", "arrays"])
def test_with_its_statistics_it_acts_as_it_was_trained(how, checkpoints, tmp_path):
    root, wrappers = checkpoints
    wrapper = wrappers["normal"]
    wrapper.save(tmp_path / "vec_normalize.pkl")
    rms = wrapper.obs_rms
    np.savez(tmp_path / "s.npz", obs_mean=rms.mean, obs_var=rms.var)
    statistics = {
        "pickle": tmp_path / "vec_normalize.pkl", "wrapper": wrapper, "mapping": {"mean": rms.mean, "var": rms.var},
        "pair": (rms.mean, rms.var), "arrays": str(tmp_path / "s.npz"),
    }[how]  # fmt: skip
    policy, told = loaded(root / "normal" / "model.zip", normalize=statistics)
    assert not told
    seen = np.random.default_rng(0).uniform(-30, 30, (50, 3)).astype(np.float32)
    model = PPO.load(root / "normal" / "model.zip", device="cpu")
    expected, _ = model.predict(wrapper.normalize_obs(seen), deterministic=True)
    np.testing.assert_array_equal(policy.predict(seen, deterministic=True)[0], expected)
    np.testing.assert_array_equal(policy.predict(seen[0], deterministic=True)[0], expected[0])
    assert policy.action_space == model.action_space
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pbrl.episode_returns("Pendulum-v1", policy, 1, 0)


def test_a_model_that_was_just_trained_brings_its_statistics():
    vector = VecNormalize(make_vec_env("Pendulum-v1", seed=0))
    model = trained(PPO, vector, n_steps=32, batch_size=32, n_epochs=1)
    model.learn(32)
    with pytest.warns(UserWarning, match="NormalizedPolicy"):
        pbrl.check_policy(model, pbrl.VectorEnv("Pendulum-v1"))
    policy = pbrl.NormalizedPolicy(model, model)
    rms: Any = vector.obs_rms
    np.testing.assert_array_equal(policy.statistics.mean, rms.mean)


def test_statistics_of_rewards_alone_or_of_others_change_nothing(checkpoints, tmp_path):
    root, wrappers = checkpoints
    wrappers["rewards"].save(tmp_path / "rewards.pkl")
    policy, _ = loaded(root / "rewards" / "model.zip", normalize=tmp_path / "rewards.pkl")
    assert not isinstance(policy, pbrl.NormalizedPolicy)
    with pytest.raises(ValueError, match="rewards alone"):
        pbrl.NormalizedPolicy(policy, tmp_path / "rewards.pkl")
    with pytest.raises(ValueError, match=r"of \(10,\) observed numbers and the policy reads \(3,\)"):
        loaded(root / "normal" / "model.zip", normalize=wrappers["off"])
    for bad, error in (
        ({"mean": [0.0]}, "need mean and var"), (([0.0], [-1.0]), "var at least 0"), (([0.0], [1.0, 2.0]), "one shape"),
        (([float("nan")], [1.0]), "finite"), ({"mean": ["x"], "var": [1]}, "must hold numbers"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=error):
            ObservationStatistics.of(bad)
    with pytest.raises(TypeError, match="VecNormalize, a dict with mean and var"):
        ObservationStatistics.of(3)
    with pytest.raises(FileNotFoundError, match="no statistics of observations at"):
        ObservationStatistics.of(tmp_path / "absent.pkl")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


def test_a_pickle_of_statistics_runs_no_code(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, wrappers = checkpoints
    wrapper = wrappers["normal"]
    state = {**wrapper.__getstate__(), "extra": Harmful()}
    harmful: dict[str, Any] = {
        "direct": pickle.dumps(Harmful()),
        "within": pickle.dumps(state),
        "object array": pickle.dumps(np.array([Harmful()], object)),
        "getattr": b"cbuiltins\ngetattr\n(cnumpy\nload\nX\x01\x00\x00\x00xtR.",
        "attribute of numpy": b"cnumpy.core.multiarray\nfromfile\n(X\x01\x00\x00\x00xtR.",
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0cload.__doc__\x93.",
        "reconstructed": b"ccopy_reg\n_reconstructor\n(cnumpy\nndarray\nc__builtin__\nobject\nNtR.",
        "codec": b"c_codecs\nencode\n(X\x01\x00\x00\x00xX\x05\x00\x00\x00rot13tR.",
    }
    for name, data in harmful.items():
        (tmp_path / "v.pkl").write_bytes(data)
        with pytest.raises(ValueError, match=r"refers to .* do not need, and was not loaded"):
            ObservationStatistics.of(tmp_path / "v.pkl")
        assert not (tmp_path / "made-by-a-pickle").exists(), name
    for data in (b"", b"no pickle", pickle.dumps(state)[:100], pickle.dumps({"a": 1}), pickle.dumps(None)):
        (tmp_path / "v.pkl").write_bytes(data)
        with pytest.raises(ValueError, match=r"v\.pkl (is no file of VecNormalize|holds no statistics)"):
            ObservationStatistics.of(tmp_path / "v.pkl")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickles_is_read(protocol, checkpoints, tmp_path):
    _, wrappers = checkpoints
    wrapper = wrappers["normal"]
    wrapper.action_space.seed(0)  # a generator in a space is part of the pickle
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(wrapper, protocol=protocol))
    found = ObservationStatistics.of(tmp_path / "v.pkl")
    assert found is not None
    np.testing.assert_array_equal(found.mean, wrapper.obs_rms.mean)
    np.testing.assert_array_equal(found.var, wrapper.obs_rms.var)


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ("vec_normalize.pkl", "vec_normalize.pkl lies beside it"),
        ("model/vecnormalize.pkl", "vecnormalize.pkl lies beside it"),
        ("Pendulum-v1/vecnormalize.pkl", "vecnormalize.pkl lies beside it"),
        ("config.yml:normalize: true", "config.yml says normalize"),
        ("config.yml:- - - batch_size\n    - 64\n  - - normalize\n    - true\n", "config.yml says normalize"),
        ("config.yml:normalize: '{''norm_obs'': True, ''norm_reward'': False}'", "config.yml says normalize"),
        ("config.yml:normalize: \"{'norm_obs': False, 'norm_reward': True}\"", None),
        ("config.yml:normalize: false", None),
        ("config.yml:batch_size: 64", None),
    ],
)
def test_what_lies_beside_a_checkpoint_is_read(layout, told, checkpoints, tmp_path):
    root, wrappers = checkpoints
    (tmp_path / "model.zip").write_bytes((root / "plain" / "model.zip").read_bytes())
    name, _, text = layout.partition(":")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if text:
        (tmp_path / name).write_text(text)
    else:
        wrappers["normal"].save(tmp_path / name)
    _, found = loaded(tmp_path / "model.zip")
    assert [told in message for message in found] == ([True] if told else [])


# --- wrappers, and spaces before any label --------------------------------------------------------------------


class Steady:
    """Acts always alike, in a space of its own."""

    def __init__(self, space: Box) -> None:
        self.action_space = space

    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False):
        rows = np.shape(observation)[:-1]
        return np.full((*rows, *self.action_space.shape), 0.3, np.float32), None


UNIT = Steady(Box(-1.0, 1.0, (1,), np.float32))


def test_another_action_space_is_told_before_any_label(tmp_path):
    for call in (
        lambda: pbrl.collect("Pendulum-v1", UNIT, 10, length=3, continuation=2, folder=tmp_path / "c"),
        lambda: pbrl.improve("Pendulum-v1", UNIT, 10, rounds=1, length=3, continuation=2, folder=tmp_path / "i"),
    ):
        with pytest.raises(ValueError, match=r"acts in Box\(-1.0, 1.0.* takes Box\(-2.0, 2.0.*RescaleAction"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_wrapped_environment_is_collected_and_refined_in():
    segments = pbrl.collect(rescaled, UNIT, 24, length=4, continuation=3, seed=0)
    assert segments.meta["environment"] == "Pendulum-v1 behind RescaleAction, actions [-1.0] to [1.0]"
    same = pbrl.collect(lambda: pbrl.StatefulEnv(rescaled()), UNIT, 24, length=4, continuation=3, seed=0)
    np.testing.assert_array_equal(segments.actions, same.actions)
    plain = pbrl.episode_returns("Pendulum-v1", Steady(Box(-2.0, 2.0, (1,), np.float32)), 2, 0)
    half = pbrl.episode_returns(rescaled, UNIT, 2, 0)
    assert plain.shape == half.shape == (2,)
    assert not np.allclose(plain, half)  # 0.3 of half the range, and 0.3


@pytest.mark.parametrize(
    "make",
    [
        rescaled,
        lambda: RescaleAction(pbrl.make_env("Pendulum-v1"), LOW, HIGH),
        lambda: ClipAction(rescaled("Reacher-v5")),
        lambda: RescaleAction(gymnasium.make("LunarLanderContinuous-v3"), -HALF, HALF),
        lambda: RescaleAction(pbrl.make_env("LunarLanderContinuous-v3"), -HALF, HALF),
        lambda: RescaleObservation(RescaleAction(gymnasium.make("LunarLanderContinuous-v3"), -HALF, HALF), LOW, HIGH),
    ],
)
def test_a_state_behind_wrappers_is_restored_exactly(make):
    env, other = pbrl.VectorEnv(make, 2), pbrl.VectorEnv(make, 2)
    source = np.random.default_rng(0)
    shape = (12, 2, *env.action_space.shape)
    low, high = np.maximum(env.action_space.low, -2.0), np.minimum(env.action_space.high, 2.0)  # ClipAction has none
    actions = source.uniform(low, high, shape).astype(env.action_space.dtype)
    env.reset(2, 3)
    for action in actions[:6]:
        env.step(action)
    states = env.save_states()
    expected = [env.step(action) for action in actions[6:]]
    for again in (env, other):
        again.restore_states(states)
        for action, step in zip(actions[6:], expected, strict=True):
            for found, wanted in zip(again.step(action), step, strict=True):
                np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: NormalizeObservation(gymnasium.make("Pendulum-v1")), "NormalizeObservation"),
        (lambda: FrameStackObservation(pbrl.make_env("Pendulum-v1"), 2), "FrameStackObservation"),
        (lambda: gymnasium.make("CartPole-v1"), "CartPoleEnv"),
    ],
)
def test_what_keeps_a_state_of_its_own_is_named(make, name):
    with pytest.raises(pbrl.UnsupportedEnvironmentError, match=name):
        pbrl.collect(make, UNIT, 4, length=2, continuation=0)


def test_an_environment_in_place_of_its_maker_is_told_so():
    with pytest.raises(TypeError, match=r"give the function that makes it, lambda: \.\.\."):
        pbrl.collect(gymnasium.make("Pendulum-v1"), UNIT, 4, length=2, continuation=0)
    with pytest.raises(TypeError, match="must give a gymnasium"):
        pbrl.VectorEnv(lambda: 3)  # pyright: ignore[reportArgumentType]
