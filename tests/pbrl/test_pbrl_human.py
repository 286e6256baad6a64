"""Human preferences between recorded segments: what is learned from them holds in episodes that were not seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.places import data_path

from pfm.flow.win import WinHead
from pfm.pbrl.human import HumanSegments, PeopleReward
from pfm.preferences import BradleyTerry


@pytest.fixture(scope="module")
def recorded() -> HumanSegments:
    """Episodes of a walk; a rater prefers the segment with the larger mean of the first action."""
    random = np.random.default_rng(0)
    observations, actions = random.standard_normal((1200, 3)), random.standard_normal((1200, 2))
    first, second = random.integers(0, 1190, (2, 600))
    gap = np.array(
        [actions[i : i + 10, 0].mean() - actions[j : j + 10, 0].mean() for i, j in zip(first, second, strict=True)]
    )
    label = np.where(np.abs(gap) < 0.05, 0.5, gap > 0)
    return HumanSegments(observations, actions, actions[:, 0], np.arange(1200) // 60, first, second, label, 10)


@pytest.fixture(scope="module")
def door() -> HumanSegments:
    return HumanSegments.load(data_path("adroit_door_prefs", "door_human_prefs.npz"))


def test_no_transition_stands_on_both_sides_of_a_split(recorded):
    train, held = recorded.split(0.4, seed=1)
    assert not set(train.episodes().ravel()) & set(held.episodes().ravel())
    assert len(train) > len(held) > 30


def test_what_the_rater_wants_is_found_and_shuffled_labels_teach_nothing(recorded):
    train, held = recorded.split(0.4, seed=1)
    pairs = train.encode()
    assert pairs.context_dimension == 0
    assert pairs.dimension == 5
    assert int((pairs.probability == 0.5).sum()) == int((train.label == 0.5).sum()) > 10
    model = BradleyTerry(1e-3).fit(pairs)
    assert held.accuracy(model.reward) > 0.9
    assert held.accuracy(lambda y: -model.reward(y)) < 0.1
    assert abs(held.accuracy(BradleyTerry(1e-3).fit(pairs.shuffle_labels(0)).reward) - 0.5) < 0.35
    assert held.accuracy(lambda y: torch.zeros(len(y))) == 0.5
    blind = BradleyTerry(1e-3).fit(train.encode("observations"))
    assert held.accuracy(blind.reward, "observations") < 0.75


def test_vectors_are_means_over_the_segments_steps(recorded):
    one, other = recorded.outputs()
    begin = int(recorded.second[7])
    steps = np.concatenate([recorded.observations, recorded.actions], axis=1)[begin : begin + 10]
    assert other[7].numpy() == pytest.approx(steps.mean(0), abs=1e-6)
    spread, _ = recorded.outputs("actions", "mean+std")
    assert spread.shape == (600, 4)
    assert one.shape == (600, 5)
    assert recorded.returns()[7, 1] == pytest.approx(recorded.rewards[begin : begin + 10].sum())


def test_a_reward_of_steps_orders_segments_by_the_mean_of_its_steps(recorded):
    train, held = recorded.split(0.4, seed=1)
    steps = np.concatenate([recorded.observations, recorded.actions], axis=1)
    one, other = held.outputs()
    assert held.differences(steps) == pytest.approx((one - other).numpy(), abs=1e-5)
    assert held.differences(steps, steps=1) == pytest.approx(steps[held.first] - steps[held.second])
    reward = PeopleReward.fit(train, train.differences(steps))
    assert reward(steps).shape == (1200,)
    assert np.abs(reward.weights).argmax() == 3  # the first action
    decided = held.label != 0.5

    def right(found: PeopleReward) -> float:
        return float(((found(held.differences(steps)) > 0) == (held.label == 1))[decided].mean())

    assert right(reward) > 0.9
    turned = replace(train, label=1 - train.label)
    assert PeopleReward.fit(turned, train.differences(steps)).weights == pytest.approx(-reward.weights, abs=1e-2)
    random = np.random.default_rng(0)
    chance = [
        right(PeopleReward.fit(replace(train, label=random.permutation(train.label)), train.differences(steps)))
        for _ in range(5)
    ]
    assert abs(np.mean(chance) - 0.5) < 0.2
    never = np.concatenate([steps, np.ones((1200, 1))], axis=1)
    assert PeopleReward.fit(train, train.differences(never)).weights[5] == 0


def test_bad_input_is_named(recorded, tmp_path):
    with pytest.raises(ValueError, match=r"\(1200, F\)"):
        recorded.differences(np.zeros((7, 2)))
    with pytest.raises(ValueError, match=r"1\.\.10"):
        recorded.differences(recorded.actions, steps=11)
    with pytest.raises(ValueError, match=r"\(600, F\)"):
        PeopleReward.fit(recorded, np.zeros((5, 2)))
    with pytest.raises(ValueError, match="finite"):
        PeopleReward.fit(recorded, np.full((600, 2), np.nan))
    undecided = recorded.select(recorded.label == 0.5)
    with pytest.raises(ValueError, match="ties"):
        PeopleReward.fit(undecided, undecided.differences(recorded.actions))
    with pytest.raises(FileNotFoundError, match="human labels"):
        HumanSegments.load(tmp_path / "absent.npz")
    np.savez(tmp_path / "other.npz", observations=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="human_label"):
        HumanSegments.load(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"0\.\.1190"):
        replace(recorded, first=recorded.first + 20)
    ties = recorded.select(recorded.label == 0.5)
    with pytest.raises(ValueError, match="ties"):
        ties.encode()
    with pytest.raises(ValueError, match="ties"):
        ties.accuracy(lambda y: y[:, 0])
    with pytest.raises(ValueError, match="part"):
        recorded.encode("rewards")


def test_peoples_preferences_on_doors_are_predicted_in_unseen_episodes(door):
    assert len(door) == 2000
    assert (door.label == 0.5).sum() == 152
    returns = door.returns()
    assert door.accuracy(lambda y: y[:, 0]) != 0.5
    decided = door.label != 0.5
    agree = ((returns[:, 0] > returns[:, 1]) == (door.label == 1))[decided].mean()
    assert agree == pytest.approx(0.83, abs=0.01)
    train, held = door.split(0.4, seed=0)
    head = WinHead(67, 0)
    found = head.fit(train.encode(), network=False)
    assert held.accuracy(lambda y: head(y, None)) > 0.8
    assert found.accuracy > 0.8
    whole = HumanSegments.load(data_path("adroit_door_prefs", "door_human_prefs.npz"), straddling=False)
    assert 0.6 < len(whole) / len(door) < 0.7


def test_people_on_doors_judge_states_and_their_labels_say_little_more_of_actions(door):
    right: dict[str, list[np.ndarray]] = {"states": [], "both": [], "actions that came elsewhere": []}
    elsewhere = np.roll(door.actions, len(door.actions) // 2, axis=0)
    for seed in range(3):
        train, held = door.split(0.5, seed)
        decided = held.label != 0.5
        for name, more in zip(right, (door.actions[:, :0], door.actions, elsewhere), strict=True):
            values = np.concatenate([door.observations, more], axis=1)
            margin = PeopleReward.fit(train, train.differences(values))(held.differences(values))
            right[name].append(((margin > 0) == (held.label == 1))[decided])
    accuracy = {name: np.concatenate(each).mean() for name, each in right.items()}
    assert accuracy["states"] > 0.8
    assert abs(accuracy["both"] - accuracy["states"]) < 0.03
    assert accuracy["actions that came elsewhere"] < accuracy["states"] + 0.02


def test_the_penalty_is_on_the_mean_loss_whatever_the_number_of_pairs(recorded):
    """At the optimum of mean log loss + penalty |w|^2 (columns of unit mean square) the gradient is zero."""
    few = recorded.select(np.flatnonzero(recorded.label != 0.5)[:12])
    x = few.differences(few.actions)
    twice = few.select(np.tile(np.arange(12), 3))
    ours = PeopleReward.fit(few, x, penalties=(0.1,))
    theirs = PeopleReward.fit(twice, np.tile(x, (3, 1)), penalties=(0.1,))
    np.testing.assert_allclose(theirs.weights, ours.weights, rtol=1e-5)
    scale = np.sqrt(np.square(x).mean(0))
    gradient = ((1 / (1 + np.exp(-x @ ours.weights)) - few.label) @ (x / scale)) / 12 + 0.2 * ours.weights * scale
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
