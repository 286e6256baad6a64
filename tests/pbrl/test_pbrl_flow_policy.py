"""A refined policy: better than its reference where labels mean something, and a policy like any other."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from pfm import EncodedPairs, FlowConfig, PreferenceFlow
from pfm.flow.fields import ResidualField
from pfm.pbrl.arrays import BatchedPendulum, BatchedPointMass
from pfm.pbrl.cloning import ClonedPolicy
from pfm.pbrl.collection import collect
from pfm.pbrl.environments import make_env
from pfm.pbrl.fast import FastTransport
from pfm.pbrl.flow_policy import FlowPolicy, choose_rounds
from pfm.pbrl.rollouts import VectorEnv, episode_returns
from pfm.pbrl.segments import SegmentPairs

CONFIG = FlowConfig(hidden=32, layers=1, epochs=5)
SETTINGS = {"length": 4, "continuation": 25, "noise": 0.3, "correlation": 0.9}
EPISODES = 200


class Steering:
    """Pushes a point mass towards the origin, too weakly."""

    action_space = BatchedPointMass.action_space

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        seen = np.asarray(observation)
        return np.clip(-0.5 * seen[..., :2] - 0.3 * seen[..., 2:], -1, 1).astype(np.float32), state


class Swinging:
    """Pumps a pendulum up and holds it."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        seen = np.asarray(observation, dtype=np.float64)
        action = np.where(seen[..., 0] > 0.9, -8 * seen[..., 1] - 2 * seen[..., 2], np.sign(seen[..., 2]))
        return np.clip(action, -2, 2)[..., None].astype(np.float32), state


@pytest.fixture(scope="module")
def segments() -> SegmentPairs:
    return collect(BatchedPointMass, Steering(), 1000, seed=1, **SETTINGS)


@pytest.fixture(scope="module")
def held_out() -> SegmentPairs:
    return collect(BatchedPointMass, Steering(), 300, seed=99, **SETTINGS)


@pytest.fixture(scope="module")
def pairs(segments) -> EncodedPairs:
    return segments.encode()


@pytest.fixture(scope="module")
def flow(pairs) -> PreferenceFlow:
    return PreferenceFlow.fit(pairs, CONFIG, progress=False)


@pytest.fixture(scope="module")
def shuffled(pairs) -> PreferenceFlow:
    return PreferenceFlow.fit(pairs.shuffle_labels(0), CONFIG, progress=False)


@pytest.fixture(scope="module")
def swapped(pairs) -> PreferenceFlow:
    return PreferenceFlow.fit(pairs.swap(), CONFIG, progress=False)


@pytest.fixture(scope="module")
def swinging() -> tuple[PreferenceFlow, SegmentPairs]:
    segments = collect(BatchedPendulum, Swinging(), 300, length=3, continuation=20, noise=0.3, seed=1)
    return PreferenceFlow.fit(segments.encode("actions"), CONFIG, progress=False), segments


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    return returns(Steering())


def returns(policy) -> np.ndarray:
    return episode_returns(BatchedPointMass(), policy, EPISODES, 7, batch=EPISODES)


def in_errors(gain: np.ndarray) -> float:
    return float(gain.mean() / (gain.std() / np.sqrt(len(gain))))


# -- what it is for -----------------------------------------------------------------------------------------------


def test_refined_episodes_are_better_and_shuffled_and_swapped_labels_gain_nothing(flow, shuffled, swapped, plain):
    gain = returns(FlowPolicy(flow, Steering())) - plain
    further = returns(FlowPolicy(flow, Steering(), mode="reapply", rounds=4)) - plain
    assert in_errors(gain) > 5
    assert gain.mean() > 0.1 * -plain.mean()
    assert in_errors(further - gain) > 5
    assert in_errors(returns(FlowPolicy(shuffled, Steering())) - plain) < 2
    assert in_errors(returns(FlowPolicy(swapped, Steering())) - plain) < -5


def test_in_directions_the_same_is_learned_and_what_was_not_tried_stays(segments, flow, plain):
    encoded = segments.encode("directions")
    assert encoded.event_shape[0] < 4 * 2  # the offsets of a segment's steps hang together
    within = PreferenceFlow.fit(encoded, CONFIG, progress=False)
    policy = FlowPolicy(within, Steering())
    assert in_errors(returns(policy) - plain) > 5
    # What a flow of directions adds is made of them, and what it was given beside them is kept.
    basis = segments.directions().reshape(8, -1)
    beside = np.linalg.svd(basis)[0][:, basis.shape[1] :]
    proposed = 0.1 * np.random.default_rng(0).standard_normal((5, 4, 2)).astype(np.float32)
    moved = (policy.refine(proposed, segments.observation[:5]) - proposed).reshape(5, 8)
    assert np.abs(moved).max() > 1e-3
    np.testing.assert_allclose(moved @ beside, 0, atol=1e-6)
    assert isinstance(policy.bind(BatchedPointMass()), FlowPolicy)


def test_choosing_among_candidates_gains_on_top_and_of_unconfirmed_b_nothing_is_chosen(segments, flow, shuffled, plain):
    one, most = (FlowPolicy(flow, Steering(), strength=0.5, candidates=count, seed=3) for count in (1, 8))
    single, chosen = returns(one), returns(most)
    assert in_errors(chosen - single) > 3
    again = FlowPolicy(flow, Steering(), strength=0.5, candidates=8, seed=3)
    np.testing.assert_array_equal(chosen, returns(again))
    best_of = returns(FlowPolicy(flow, Steering(), strength=0, candidates=8))
    assert in_errors(best_of - plain) > 5
    assert not np.isfinite(shuffled.guard_margin)
    np.testing.assert_array_equal(
        returns(FlowPolicy(shuffled, Steering(), candidates=8)), returns(FlowPolicy(shuffled, Steering()))
    )


def test_the_chosen_candidate_has_the_largest_win_probability(flow, segments):
    seen = segments.observation[:6]
    policy = FlowPolicy(flow, Steering(), strength=0, candidates=5, execute=4, seed=1)
    action, (planned, *_) = policy.predict(seen)
    twin = FlowPolicy(flow, Steering(), seed=1)
    drawn = [twin._unchanged(6), *(twin._noise(6) for _ in range(4))]
    wins = np.stack([flow.win_probability(each, seen.astype(np.float32)).numpy() for each in drawn])
    np.testing.assert_array_equal(planned, np.stack(drawn)[wins.argmax(0), np.arange(6)])
    np.testing.assert_allclose(action, np.clip(Steering().predict(seen)[0] + planned[:, 0], -1, 1), atol=1e-6)


def test_held_out_states_choose_how_often_and_reject_what_learned_nothing(flow, shuffled, held_out, plain):
    choice = choose_rounds(FlowPolicy(flow, Steering()), held_out, env=BatchedPointMass, rounds=(1, 2, 4))
    assert choice.rounds == 4
    assert choice.z > 5
    gains = [row["gain"] for row in choice.table]
    assert gains == sorted(gains)
    assert choice.steps > 0
    chosen = returns(FlowPolicy(flow, Steering(), **choice.settings)) - plain
    assert in_errors(chosen) > 5
    nothing = choose_rounds(FlowPolicy(shuffled, Steering()), held_out, env=BatchedPointMass, rounds=(1, 2, 4))
    assert nothing.rounds == 0
    assert returns(FlowPolicy(shuffled, Steering(), **nothing.settings)) == pytest.approx(plain)


def test_without_a_simulator_the_win_probability_chooses(flow, held_out):
    choice = choose_rounds(FlowPolicy(flow, Steering()), held_out, by="win", rounds=(1, 4))
    assert (choice.rounds, choice.steps) == (4, 0)
    with pytest.raises(ValueError, match="needs env"):
        choose_rounds(FlowPolicy(flow, Steering()), held_out)


# -- a policy like any other ----------------------------------------------------------------------------------------


def test_one_observation_and_a_batch_get_the_same_actions_within_the_bounds(flow, segments):
    policy = FlowPolicy(flow, Steering(), strength=3.0)
    batch, state = policy.predict(segments.observation)
    assert state is None
    assert batch.shape == (1000, 2)
    assert batch.dtype == np.float32
    assert (np.abs(batch) <= 1).all()
    for row in range(0, 1000, 250):
        alone, _ = policy.predict(segments.observation[row])
        assert alone.shape == (2,)
        assert alone == pytest.approx(batch[row], abs=1e-5)
    assert policy.counts.plans == policy.counts.actions == 1004


@pytest.mark.parametrize("execute", [1, 2])
def test_evaluate_policy_plays_it_unchanged(swinging, execute):
    flow, _ = swinging
    reference = Swinging()
    single = make_env("Pendulum-v1")
    single.reset(seed=0)
    policy = FlowPolicy(flow, reference, env=single, execute=execute)
    mean, _ = evaluate_policy(policy, Monitor(single), n_eval_episodes=1)
    assert policy.counts.actions == 200
    assert policy.counts.plans == 200 // execute
    assert -2000 < float(np.asarray(mean)) < 0
    several = DummyVecEnv([lambda: Monitor(make_env("Pendulum-v1")) for _ in range(2)])
    policy = FlowPolicy(flow, reference, env=several, execute=execute)
    evaluate_policy(policy, several, n_eval_episodes=2)
    assert policy.counts.actions == 400


def test_the_simulator_that_is_played_is_left_as_it_stands(swinging):
    flow, _ = swinging
    for made in (BatchedPendulum(), VectorEnv("Pendulum-v1", 3)):
        same = FlowPolicy(flow, Swinging(), env=made, rounds=0)
        through_plans = episode_returns(made, same, 3, 5, batch=3)
        assert through_plans == pytest.approx(episode_returns(made, Swinging(), 3, 5, batch=3), rel=1e-3)
        assert same.counts.actions == 600


def test_an_environment_that_is_not_the_one_played_is_noticed(swinging):
    flow, _ = swinging
    env = BatchedPendulum()
    observation = env.reset(2, 0)
    policy = FlowPolicy(flow, Swinging(), env=env)
    policy.predict(observation)
    with pytest.raises(ValueError, match="stands at another observation"):
        policy.predict(observation[::-1])
    with pytest.raises(ValueError, match="2 episodes and there are 1"):
        policy.predict(observation[0])


def test_segments_in_execution_follow_their_episodes(flow, segments):
    policy = FlowPolicy(flow, Steering(), execute=3)
    observation = segments.observation[:4]
    plan = policy.refine(np.zeros((4, 4, 2), dtype=np.float32), observation)
    base = Steering().predict(observation)[0]
    policy.counts.reset()
    state = None
    for step in range(4):
        action, state = policy.predict(observation, state, np.zeros(4, dtype=bool))
        assert action == pytest.approx(np.clip(base + plan[:, step % 3], -1, 1), abs=1e-6)
    assert policy.counts.plans == 8
    start = np.array([True, False, True, False])
    action, state = policy.predict(observation, state, start)
    assert policy.counts.plans == 10
    place = np.where(start, 0, 1)
    assert action == pytest.approx(np.clip(base + plan[np.arange(4), place], -1, 1), abs=1e-6)
    with pytest.raises(ValueError, match="4 episodes"):
        policy.predict(segments.observation[:2], state)


def test_offline_a_cloned_policy_proposes(flow, segments):
    cloned = ClonedPolicy.fit(
        segments.observation, segments.plan, action_space=BatchedPointMass.action_space, hidden=32, seed=0
    )
    on_actions = PreferenceFlow.fit(segments.encode("actions"), CONFIG, progress=False)
    policy = FlowPolicy(on_actions, None, proposal=cloned)
    observation = segments.observation[:50]
    action, _ = policy.predict(observation)
    proposed = cloned.propose(observation, True)
    assert action == pytest.approx(policy.refine(proposed, observation)[:, 0], abs=1e-6)
    assert np.abs(action - proposed[:, 0]).max() > 1e-3
    assert in_errors(returns(FlowPolicy(flow, cloned)) - returns(cloned)) > 5


def test_stochastic_proposals_follow_the_datas_noise(flow, segments):
    policy = FlowPolicy(flow, Steering(), proposal="stochastic", rounds=0, mode="reapply", seed=3)
    observation = np.zeros((4000, 4), dtype=np.float32)
    action, _ = policy.predict(observation)
    added = segments.outputs()
    assert action.std(0) == pytest.approx(added[:, :, 0].std((0, 1)), rel=0.1)
    policy.seed(3)
    assert np.array_equal(policy.predict(observation)[0], action)


def test_results_off_the_data_are_kept_back_or_brought_back(flow, segments):
    observation = segments.observation
    start = np.zeros((1000, 4, 2), dtype=np.float32)
    described = flow.metadata["encoder"]
    radius, unit = described["radius"], np.array(described["unit"])
    loose, kept, shrunk = (
        FlowPolicy(flow, Steering(), strength=8.0, guard=guard) for guard in ("off", "keep", "shrink")
    )
    free = loose.refine(start, observation)
    distance = np.sqrt(np.square(free / unit).mean((1, 2)))
    far = distance > radius
    assert 0.05 < far.mean() < 1
    assert loose.counts.off_support == kept.counts.off_support + int(far.sum())
    held = kept.refine(start, observation)
    assert (held[far] == 0).all()
    assert np.array_equal(held[~far], free[~far])
    assert kept.counts.kept == kept.counts.off_support == int(far.sum())
    near = shrunk.refine(start, observation)
    assert np.sqrt(np.square(near / unit).mean((1, 2)))[far] == pytest.approx(np.full(far.sum(), radius), rel=1e-3)
    added = segments.outputs()
    assert (np.sqrt(np.square(added / unit).mean((2, 3))) <= radius).mean() == pytest.approx(0.99, abs=0.005)


def test_the_win_guard_keeps_proposals_that_would_lose(flow, swapped, segments):
    divided = copy.copy(swapped)
    divided._modules = swapped._modules | {"win": flow.win}  # b knows better than the field
    policy = FlowPolicy(divided, Steering(), win_guard=True)
    result = policy.refine(np.zeros((1000, 4, 2), dtype=np.float32), segments.observation)
    assert policy.counts.kept == policy.counts.not_better > 800
    assert ((result == 0).all((1, 2)).sum()) == policy.counts.kept


def test_groups_carry_further_in_one_pass_for_the_same_number_of_labels(flow, plain):
    settings = SETTINGS | {"members": 4, "design": "knockout"}
    groups = collect(BatchedPointMass, Steering(), 1000, seed=1, **settings)
    assert 1000 <= groups.labels <= 1002
    best_of_four = PreferenceFlow.fit(groups.encode(), CONFIG.replace(best_of=4), progress=False)
    two, four = (returns(FlowPolicy(each, Steering())) - plain for each in (flow, best_of_four))
    assert in_errors(four - two) > 3


# -- bad input -----------------------------------------------------------------------------------------------------


def test_bad_observations_and_flows_are_refused(flow, swinging):
    policy = FlowPolicy(flow, Steering())
    with pytest.raises(ValueError, match=r"\(E, 4\)"):
        policy.predict(np.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        policy.predict(np.full(4, np.nan))
    with pytest.raises(ValueError, match=r"SegmentPairs\.encode"):
        FlowPolicy(PreferenceFlow((4, 2), 4), Steering())
    with pytest.raises(ValueError, match="needs whole segments proposed"):
        FlowPolicy(swinging[0], Swinging())
    narrow = Steering()
    narrow.action_space = BatchedPendulum.action_space
    with pytest.raises(ValueError, match="collected with"):
        FlowPolicy(flow, narrow)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"execute": 5}, "execute"),
        ({"candidates": 0}, "candidates"),
        ({"guidance": -1.0}, "guidance must be a number of at least 0: got -1.0"),
        ({"guidance": 0.0}, "context_free"),
        ({"win_gradient": float("nan")}, "win_gradient must be a finite number"),
        ({"mode": "twice"}, "mode"),
        ({"rounds": 3}, "reapply"),
        ({"guard": "on"}, "guard"),
        ({"proposal": "random"}, "proposal"),
    ],
)
def test_bad_settings_are_named(flow, settings, message):
    with pytest.raises(ValueError, match=message):
        FlowPolicy(flow, Steering(), **settings)
    with pytest.raises(TypeError, match="predict"):
        FlowPolicy(flow, object())


def test_the_slope_of_b_goes_where_b_is_larger(segments, held_out):
    flow = PreferenceFlow.fit(segments.encode("directions"), CONFIG, progress=False)
    start = np.zeros((len(held_out), *segments.actions.shape[2:]), dtype=np.float32)
    seen = held_out.observation
    wins = []
    for slope in (-1.0, 0.0, 1.0):
        policy = FlowPolicy(flow, Steering(), win_gradient=slope)
        result = policy.refine(start, seen)
        wins.append(policy._win_probability(result, seen).mean())
    assert wins[0] < wins[1] < wins[2]
    plain, steeper = (
        episode_returns(
            BatchedPointMass(), FlowPolicy(flow, Steering(), win_gradient=slope), EPISODES, 5, batch=EPISODES
        )
        for slope in (0.0, 1.0)
    )
    assert (steeper - plain).mean() > 0  # here more of the same is better


@pytest.mark.parametrize("solver", ["rk4", "euler"])
@pytest.mark.parametrize("residual", [True, False])
def test_few_rows_are_carried_as_the_flow_carries_them(solver, residual):
    torch.manual_seed(0)
    flow = PreferenceFlow((3, 2), 5, FlowConfig(hidden=24, layers=2, solver=solver, steps=3))
    flow.normalizer.fit(torch.randn(50, 6) * 2 + 1, torch.randn(50, 6), torch.randn(50, 5) * 3 - 1)
    flow.field.linear.matrices.normal_(std=0.3)
    flow.field.linear.shifts.normal_()
    flow.field.gain.fill_(0.7)
    flow.field.unit.uniform_(0.5, 1.5)
    assert isinstance(flow.field.residual, ResidualField)
    torch.nn.init.normal_(flow.field.residual.last.weight)
    if not residual:
        flow.field.drop_residual()
    y, context = torch.randn(40, 3, 2), torch.randn(40, 5)
    fast = FastTransport.of(flow)
    assert fast is not None
    for rounds, strength, steps in ((1, 1.0, None), (3, 1.0, None), (1, 0.4, 7), (2, 1.7, 1)):
        wanted = flow.transport(y, context, mode="reapply", rounds=rounds, strength=strength, steps=steps)
        found = fast(y.flatten(1).numpy(), context.numpy(), rounds=rounds, strength=strength, steps=steps)
        assert float((wanted - y).abs().max()) > 0.1
        assert found == pytest.approx(wanted.flatten(1).numpy(), rel=1e-4, abs=1e-4)
    free = PreferenceFlow((3, 2), 5, flow.config.replace(context_free=True), flow.metadata)
    free.load_state_dict(flow.state_dict(), strict=False)
    assert free.context_free is not None
    free.context_free.linear.shifts.normal_()
    fast = FastTransport.of(free)
    assert fast is not None
    for guidance in (0.0, 0.3, 1.0, 2.0):
        wanted = free.transport(y, context, mode="reapply", guidance=guidance)
        found = fast(y.flatten(1).numpy(), context.numpy(), guidance=guidance)
        assert found == pytest.approx(wanted.flatten(1).numpy(), rel=1e-4, abs=1e-4)
    # What it cannot stand in for is left to the flow.
    assert FastTransport.of(PreferenceFlow((3, 2), 5, FlowConfig(solver="dopri5"))) is None


def test_a_saved_flow_makes_the_same_policy(flow, segments, tmp_path):
    flow.save_pretrained(tmp_path)
    again = FlowPolicy(PreferenceFlow.from_pretrained(tmp_path), Steering(), guard="shrink")
    one, other = (policy.predict(segments.observation)[0] for policy in (FlowPolicy(flow, Steering()), again))
    assert np.array_equal(one, other)
