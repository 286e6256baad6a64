"""Segments from the same exact state: their values are the simulator's, and collecting is repeatable."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pfm.pbrl.arrays import BatchedPendulum, BatchedPointMass
from pfm.pbrl.collection import collect
from pfm.pbrl.environments import UnsupportedEnvironmentError
from pfm.pbrl.finite import all_finite
from pfm.pbrl.rollouts import VectorEnv
from pfm.pbrl.running import clip_action, correlated_noise, run_on
from pfm.pbrl.segments import SegmentPairs
from pfm.pbrl.states import pick_states
from pfm.pbrl.teachers import Teacher


class Steering:
    """Pushes a point mass towards the origin, too weakly."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        seen = np.asarray(observation)
        return np.clip(-0.5 * seen[..., :2] - 0.3 * seen[..., 2:], -1, 1).astype(np.float32), state


class Swinging:
    """Pumps and holds a pendulum; counts its steps, as recurrent policies keep a state."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        seen = np.asarray(observation, dtype=np.float64)
        steps = np.zeros(len(seen)) if state is None else state[0]
        if episode_start is not None:
            steps = np.where(episode_start, 0.0, steps)
        action = np.where(seen[:, 0] > 0.9, -8 * seen[:, 1] - 2 * seen[:, 2], np.sign(seen[:, 2]))
        return np.clip(action * (1 + 0.001 * steps), -2, 2)[:, None].astype(np.float32), (steps + 1,)


@pytest.fixture(scope="module")
def segments() -> SegmentPairs:
    return collect(BatchedPointMass, Steering(), 250, length=4, continuation=10, noise=0.3, seed=5)


def same(one: SegmentPairs, other: SegmentPairs) -> bool:
    names = ("observation", "actions", "rewards", "after", "label", "trajectory", "plan_value", "steps")
    return all(np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True) for name in names)


# -- what is collected ------------------------------------------------------------------------------------------


def test_values_are_what_the_simulator_gives_when_the_actions_are_played_again(segments):
    env = BatchedPointMass()
    states = segments.saved_states()
    for member in range(2):
        env.restore_states(states)
        total = np.zeros(len(segments))
        for step in range(segments.length):
            observation, reward, _ = env.step(segments.actions[:, member, step])
            assert reward == pytest.approx(segments.rewards[:, member, step], abs=1e-6)
            total += reward
        for _ in range(10):
            observation, reward, _ = env.step(Steering().predict(observation)[0])
            total += reward
        assert total == pytest.approx(segments.values[:, member], abs=1e-5)


def test_the_plan_is_the_reference_without_noise(segments):
    env = BatchedPointMass()
    observation = env.restore_states(segments.saved_states())
    assert observation == pytest.approx(segments.observation)
    for step in range(segments.length):
        action = Steering().predict(observation)[0]
        going = ~env.done
        assert going.sum() > 200
        assert action[going] == pytest.approx(segments.plan[going, step], abs=1e-6)
        observation, _, _ = env.step(action)


def test_noise_is_what_was_asked_for_and_states_lie_all_over_the_episodes(segments):
    added = segments.outputs("residual")
    free = segments.steps == segments.length
    assert added[free].std() == pytest.approx(0.3, rel=0.05)
    assert abs(added[free].mean()) < 0.02
    elapsed = segments.saved_states()[:, -1]
    assert np.histogram(elapsed, bins=5, range=(0, 50))[0] == pytest.approx(np.full(5, 50), abs=25)


def test_correlated_noise_keeps_its_variance():
    noise = correlated_noise(np.random.default_rng(0), (20_000, 6, 1), 0.5, 0.8)
    assert noise.std(0).ravel() == pytest.approx(np.full(6, 0.5), rel=0.03)
    assert np.corrcoef(noise[:, 2, 0], noise[:, 3, 0])[0, 1] == pytest.approx(0.8, abs=0.02)
    constant = correlated_noise(np.random.default_rng(0), (5, 6, 1), 0.5, 1.0)
    assert np.array_equal(constant[:, 0], constant[:, 5])


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numbers_are_finite_even_where_their_squares_are_not(kind):
    large = np.full((3, 4), np.finfo(kind).max, kind)
    assert all_finite(large)
    assert all_finite(large[:, ::2])
    for bad in (np.nan, np.inf, -np.inf):
        one = np.zeros((3, 4), kind)
        one[2, 1] = bad
        assert not all_finite(one)
        one[0, 0] = np.finfo(kind).max
        assert not all_finite(one)


def test_actions_are_clipped_in_double_precision_and_left_alone():
    env = BatchedPointMass()
    action = np.array([[-3.0, 0.1], [0.2, 7.0]], np.float32)
    clipped = clip_action(action, env)
    assert clipped.dtype == np.float64
    assert np.array_equal(clipped, np.clip(action.astype(np.float64), -1, 1))
    assert action[0, 0] == -3


def test_an_episode_that_ends_inside_a_segment_stops_its_rewards(segments):
    ended = segments.steps < segments.length
    assert 0 < segments.summary().ended == ended.mean() < 0.2
    elapsed = segments.saved_states()[:, -1].astype(int)
    assert np.array_equal(segments.steps, np.minimum(50 - elapsed, 4)[:, None].repeat(2, 1))
    after_end = np.arange(4) >= segments.steps[..., None]
    assert (segments.rewards[after_end] == 0).all()
    assert (segments.after[ended] == 0).all()
    assert (segments.outputs()[after_end] == 0).all()
    assert np.isfinite(segments.actions).all()


def test_labels_that_look_further_differ_from_the_segments_returns(segments):
    found = segments.summary()
    assert found.label_accuracy == 1.0
    assert 0.6 < found.return_accuracy < 0.97
    assert found.best_gain > found.member_gain
    assert segments.label is not None
    myopic = replace(segments, after=np.zeros_like(segments.after)).relabel("oracle")
    assert (myopic.label == segments.label).mean() == pytest.approx(found.return_accuracy, abs=0.02)


def test_a_policy_with_a_state_of_its_own_goes_on_where_it_was():
    segments = collect(BatchedPendulum, Swinging(), 100, length=3, continuation=2, noise=0.2, seed=1)
    assert segments.memory is not None
    assert segments.plan is not None
    elapsed = segments.saved_states()[:, -1]
    assert np.array_equal(segments.memory[0], elapsed)
    action, _ = Swinging().predict(segments.observation, segments.memory, np.zeros(100, dtype=bool), True)
    assert action == pytest.approx(segments.plan[:, 0], abs=1e-6)
    moved, _ = Swinging().predict(segments.observation, None, None, True)
    assert np.abs(moved - segments.plan[:, 0]).max() > 1e-3


# -- repeatable, in parallel, interrupted ---------------------------------------------------------------------------


def test_the_result_does_not_depend_on_the_workers(segments, tmp_path):
    parallel = collect(
        BatchedPointMass, Steering(), 250, length=4, continuation=10, noise=0.3, seed=5, workers=2, folder=tmp_path
    )
    assert same(segments, parallel)
    again = collect(BatchedPointMass, Steering(), 250, length=4, continuation=10, noise=0.3, seed=5, folder=tmp_path)
    assert same(segments, again)


def test_fewer_pairs_are_the_first_of_more(segments):
    some = collect(BatchedPointMass, Steering(), 130, length=4, continuation=10, noise=0.3, seed=5)
    whole = segments.select(np.arange(130))
    assert np.array_equal(some.actions, whole.actions)
    assert some.label is not None
    assert whole.label is not None
    assert np.array_equal(some.label, whole.label)


class Interrupted(BatchedPointMass):
    """Breaks after some resets, as a job that is killed."""

    name = "BatchedPointMass"
    left = 2

    def reset(self, count: int, seed: int) -> Any:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().reset(count, seed)


def test_an_interrupted_collection_goes_on_from_what_is_on_disk(segments, tmp_path):
    settings: dict[str, Any] = {"length": 4, "continuation": 10, "noise": 0.3, "seed": 5, "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        collect(Interrupted(), Steering(), 250, **settings)
    first = tmp_path / "shard-00000.npz"
    assert [path.name for path in sorted(tmp_path.glob("shard-*"))] == [first.name]
    written = first.stat().st_mtime_ns
    assert same(collect(BatchedPointMass, Steering(), 250, **settings), segments)
    assert first.stat().st_mtime_ns == written
    (tmp_path / "shard-00001.npz").write_bytes(b"cut short")
    assert same(collect(BatchedPointMass, Steering(), 250, **settings), segments)
    settings["noise"] = 0.2
    with pytest.raises(ValueError, match=r"noise=0\.3"):
        collect(BatchedPointMass, Steering(), 250, **settings)


def test_gymnasium_environments_are_collected_from_by_name():
    policy = Swinging()
    segments = collect("Pendulum-v1", policy, 12, length=3, continuation=4, noise=0.2, seed=2, states_per_trajectory=50)
    env = VectorEnv("Pendulum-v1")
    states = segments.saved_states()
    rows = np.arange(12)
    ran = run_on(env, policy, pick_states(states, rows), np.zeros((12, 3, 1)), 4, memory=segments.memory)
    assert ran.rewards.sum(1) + ran.after == pytest.approx(segments.plan_value, abs=1e-9)
    played = run_on(
        env, policy, states, segments.actions[:, 1].astype(np.float64), 4, form="actions", memory=segments.memory
    )
    assert played.rewards.sum(1) + played.after == pytest.approx(segments.values[:, 1], abs=1e-4)


# -- bad input -----------------------------------------------------------------------------------------------------


class Lost(BatchedPointMass):
    """Loses its observations at some time."""

    def step(self, actions: Any) -> Any:
        observation, reward, done = super().step(actions)
        observation[self._states[:, -1] == 30] = np.nan
        return observation, reward, done


def test_observations_that_are_not_finite_are_named():
    with pytest.raises(ValueError, match=r"NaN or infinite observations in step 30 of a trajectory of shard 0"):
        collect(Lost, Steering(), 20, length=4, continuation=2)


class LostLater(BatchedPointMass):
    """Loses its observations on the way from a restored state."""

    restored = False

    def restore_states(self, states: Any) -> Any:
        self.restored = True
        return super().restore_states(states)

    def reset(self, count: int, seed: int) -> Any:
        self.restored = False
        return super().reset(count, seed)

    def step(self, actions: Any) -> Any:
        observation, reward, done = super().step(actions)
        observation[self.restored & (self._states[:, -1] == 30)] = np.inf
        return observation, reward, done


def test_shards_that_were_finished_are_kept_when_observations_are_lost(segments, tmp_path):
    class Second(LostLater):
        """Its first shard is whole."""

        name = "BatchedPointMass"
        shards = 0

        def reset(self, count: int, seed: int) -> Any:
            self.shards += count == 10
            return super().reset(count, seed)

        def restore_states(self, states: Any) -> Any:
            observation = super().restore_states(states)
            self.restored = self.shards > 1
            return observation

    settings: dict[str, Any] = {"length": 4, "continuation": 10, "noise": 0.3, "seed": 5, "folder": tmp_path}
    with pytest.raises(ValueError, match=r"NaN or infinite observations in step \d+ of a segment.*are kept"):
        collect(Second(), Steering(), 250, **settings)
    assert [path.name for path in tmp_path.glob("shard-*")] == ["shard-00000.npz"]
    assert same(collect(BatchedPointMass, Steering(), 250, **settings), segments)


def test_an_environment_without_exact_state_is_refused():
    with pytest.raises(UnsupportedEnvironmentError, match="CartPole"):
        collect("CartPole-v1", Steering(), 20, length=4, continuation=2)


class Indifferent(BatchedPointMass):
    """Pays the same whatever is done."""

    def _move(self, state: Any, action: Any) -> Any:
        reward, moved = super()._move(state, action)
        return np.ones_like(reward), moved


def test_nothing_is_learned_from_ties_alone():
    ties = collect(Indifferent, Steering(), 50, length=4, continuation=2)
    assert ties.label is not None
    assert (ties.label == 0.5).all()
    assert ties.summary().ties == 1.0
    for handling in ("keep", "drop"):
        with pytest.raises(ValueError, match=r"none of the 50 comparisons prefers a segment \(50 ties"):
            ties.encode(ties=handling)


def test_a_policy_for_another_action_space_is_refused():
    with pytest.raises(ValueError, match="another action space"):
        collect(BatchedPendulum, Steering(), 20, length=4, continuation=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs": 0}, "pairs"),
        ({"length": 0}, "length"),
        ({"noise": 0.0}, "noise"),
        ({"correlation": 1.5}, "correlation"),
        ({"discount": 0.0}, "discount"),
        ({"members": 1}, "members"),
        ({"design": "league"}, "design"),
        ({"teacher": "oracel"}, "oracle"),
    ],
)
def test_bad_settings_are_named(settings, message):
    given: dict[str, Any] = {"pairs": 10, "length": 2, "continuation": 0} | settings
    with pytest.raises(ValueError, match=message):
        collect(BatchedPointMass, Steering(), given.pop("pairs"), **given)
    with pytest.raises(TypeError, match="restore_states"):
        collect(17, Steering(), 10, length=2, continuation=0)


# -- storing, selecting, encoding ----------------------------------------------------------------------------------


def test_saved_segments_come_back_whole(segments, tmp_path):
    path = segments.save(tmp_path / "made" / "segments.npz")
    found = SegmentPairs.load(path)
    assert same(found, segments)
    assert found.meta == json.loads(json.dumps(segments.meta))
    assert np.array_equal(found.saved_states(), segments.saved_states())
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="damaged"):
        SegmentPairs.load(path)
    with pytest.raises(FileNotFoundError, match=r"SegmentPairs\.save"):
        SegmentPairs.load(tmp_path / "absent.npz")


def test_parts_keep_their_labels_and_splits_cut_no_trajectory(segments):
    train, held = segments.split(0.3, seed=1)
    assert not set(train.trajectory) & set(held.trajectory)
    assert len(train) + len(held) == len(segments)
    joined = SegmentPairs.concatenate([train, held])
    assert joined.summary().label_accuracy == 1.0
    assert joined.labels == 250
    assert len(np.unique(joined.trajectory)) == len(np.unique(segments.trajectory))
    shuffled = segments.select(np.random.default_rng(0).permutation(250))
    assert shuffled.summary().label_accuracy == 1.0


def test_encoded_pairs_prefer_the_better_segment_under_its_observation(segments):
    for form in ("residual", "actions"):
        pairs = segments.encode(form)
        assert pairs.chosen.shape == (250, 4, 2)
        best = segments.values.argmax(1)
        assert torch.equal(pairs.chosen, torch.from_numpy(segments.outputs(form)[np.arange(250), best]))
        assert torch.equal(pairs.context, torch.from_numpy(segments.observation))
        assert torch.equal(pairs.group, torch.from_numpy(segments.trajectory))
        assert pairs.encoder is not None
        assert pairs.encoder["form"] == form
        json.dumps(pairs.encoder, allow_nan=False)
    residual, actions = (segments.outputs(form) for form in ("residual", "actions"))
    alive = np.arange(4) < segments.steps[..., None]
    assert (actions - residual)[alive] == pytest.approx(segments.reference_actions[alive], abs=1e-6)


def test_ties_and_skipped_comparisons_are_handled_as_stated(segments):
    vague = segments.relabel(Teacher(equal=0.5, skip=0.2))
    ties, skipped = int((vague.label == 0.5).sum()), int(np.isnan(vague.label).sum())
    assert ties > 20
    assert skipped == 50
    assert vague.labels == 200
    kept = vague.encode()
    assert len(kept) == 200
    assert int((kept.probability == 0.5).sum()) == ties
    assert len(vague.encode(ties="drop")) == 200 - ties
    with pytest.raises(ValueError, match="250 ties"):
        segments.relabel(Teacher(equal=1e9)).encode()
    with pytest.raises(ValueError, match="relabel"):
        replace(segments, label=None).summary()


def test_groups_of_members_become_candidate_sets_at_an_honest_price():
    settings: dict[str, Any] = {"length": 2, "continuation": 10, "seed": 3, "members": 4}
    every = collect(BatchedPointMass, Steering(), 600, **settings)
    assert (len(every), every.labels) == (100, 600)
    knockout = collect(BatchedPointMass, Steering(), 300, design="knockout", **settings)
    assert (len(knockout), knockout.labels) == (100, 300)
    assert np.array_equal(every.actions, knockout.actions)
    for segments in (every, knockout):
        candidates = segments.encode().candidates
        assert candidates is not None
        assert len(candidates) == 100
        winners = [int(entry.scores.argmax()) for entry in candidates]
        assert winners == segments.values.argmax(1).tolist()
    assert np.unique(every.values.argsort(1), axis=0).shape[0] > 10


def test_disagreeing_arrays_are_refused(segments):
    with pytest.raises(ValueError, match="rewards must be"):
        replace(segments, rewards=segments.rewards[:, :, :2])
    broken = segments.observation.copy()
    broken[3, 0] = np.nan
    with pytest.raises(ValueError, match=r"observation must be finite.*the first is row 3"):
        replace(segments, observation=broken)
    with pytest.raises(ValueError, match="each state once"):
        segments.select([1, 1])
    with pytest.raises(ValueError, match="one trajectory"):
        replace(segments, trajectory=np.zeros(250, dtype=int)).split()


def test_rewards_are_discounted_from_the_segments_first_step(segments):
    discounted = replace(segments, discount=0.5)
    powers = np.array([1.0, 0.5, 0.25, 0.125])
    np.testing.assert_allclose(discounted.returns, (segments.rewards * powers).sum(-1), rtol=1e-6)
    np.testing.assert_allclose(discounted.values, discounted.returns + segments.after, rtol=1e-6)
    assert not np.allclose(discounted.returns, segments.returns)
