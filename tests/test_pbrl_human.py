"""Human preferences between recorded segments: what is learned from them holds in episodes that were not seen."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pfm.pbrl.human import HumanSegments
from pfm.preferences import BradleyTerry
from pfm.win import WinHead


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
    folder = Path(os.environ.get("PFM_DATA") or Path(__file__).parents[2] / "shared" / "data")
    path = folder / "adroit_door_prefs" / "door_human_prefs.npz"
    if not path.is_file():
        pytest.skip(f"there is no {path}: set PFM_DATA to the folder of the data sets")
    return HumanSegments.load(path)


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


def test_bad_input_is_named(recorded, tmp_path):
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
    whole = HumanSegments.load(
        Path(os.environ.get("PFM_DATA") or Path(__file__).parents[2] / "shared" / "data")
        / "adroit_door_prefs" / "door_human_prefs.npz", straddling=False,
    )  # fmt: skip
    assert 0.6 < len(whole) / len(door) < 0.7
