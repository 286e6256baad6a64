"""The study of people on doors: actions learned from labels of states, and its report."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.control import door as study
from benchmarks.control.door_report import estimate, write_report
from benchmarks.control.learning import ControlData
from benchmarks.core.bench import Bench
from pfm.pbrl.human import HumanSegments

BENCH = Bench("", "", 0, False)


@pytest.fixture(scope="module")
def moved() -> HumanSegments:
    """Episodes of states that actions move; a rater prefers a large first coordinate, and never sees an action."""
    random = np.random.default_rng(1)
    episodes, steps = 24, 60
    state = random.standard_normal((episodes, 3))
    observations, actions = np.zeros((episodes, steps, 3)), np.zeros((episodes, steps, 2))
    for step in range(steps):
        observations[:, step] = state
        actions[:, step] = np.clip(-0.4 * state[:, :2] + 0.3 * random.standard_normal((episodes, 2)), -1, 1)
        state = 0.9 * state + 0.05 * random.standard_normal((episodes, 3))
        state[:, :2] += 0.3 * actions[:, step]
    seen, acted = observations.reshape(-1, 3), actions.reshape(-1, 2)
    first, second = random.integers(0, len(seen) - 10, (2, 500))
    worth = np.convolve(seen[:, 0], np.ones(10) / 10, mode="valid")
    label = (worth[first] > worth[second]).astype(float)
    return HumanSegments(
        seen.astype(np.float32), acted.astype(np.float32), seen[:, 0], np.arange(len(seen)) // steps, first, second,
        label, 10,
    )  # fmt: skip


@pytest.fixture(scope="module")
def split(moved) -> study.Split:
    return study.Split.of(moved, 1, epochs=8)


@pytest.fixture(scope="module")
def studied(moved) -> dict:
    methods = {name: study.METHODS[name] for name in ("clone", "noise", "mean shift")}
    return study.measure(moved, 0, methods=methods, epochs=8, network=False)


@pytest.mark.slow
def test_actions_are_learned_offline_from_labels_that_only_judge_states(split):
    judge = study.Measured(split, {"ahead": study.read(split, "ahead", 1)})
    pairs = study.pairs_of(split, study.read(split, "ahead", 0))

    def gain(name: str, label: np.ndarray, **settings: object) -> float:
        method = study._flow(**settings)() if settings else study.METHODS[name]()
        method.learn(ControlData(replace(pairs, label=label), split.policy, lambda: None, 0, None, 0), BENCH)
        policy = next(each.policy for each in method.candidates() if each.settings["strength"] == 1.0)
        found = judge.of(policy)
        return sum(found["gain: ahead"]) / sum(found["steps"])

    assert pairs.label is not None
    shift, swapped = gain("mean shift", pairs.label), gain("mean shift", 1 - pairs.label)
    mixed = np.mean([gain("mean shift", np.random.default_rng(n).permutation(pairs.label)) for n in range(4)])
    assert shift > 0.3
    assert swapped == pytest.approx(-shift, rel=0.2)
    assert abs(mixed) < 0.2 * shift
    # the closed-form field alone, which is fitted at once; one pass goes half as far as from rejected to chosen
    assert gain("flow", pairs.label, flow={"residual": False}) > 0.3 * shift


def test_what_came_after_is_foretold_from_real_labels_only(studied):
    told = studied["foretold"]
    came = {kind: sum(each) / sum(told["steps"]) for kind, each in told["came"].items()}
    shuffled = [sum(each) / sum(told["steps"]) for each in told["shuffled"]]
    assert came["ahead"] > 0.15
    assert came["ahead"] > np.mean(shuffled) + 0.1
    assert told["agreement"]["ahead"] > 0.7
    found = studied["methods"]["ahead"]
    assert sum(found["clone"]["found"][0]["moved"]) == 0
    assert abs(sum(found["noise"]["found"][0]["gain: ahead"])) < 0.1 * sum(found["noise"]["found"][0]["steps"])


def test_a_reading_ahead_finds_the_action_that_moves_what_people_like(split):
    assert not set(split.episode[split.side == 0]) & set(split.episode[split.side == 1])
    reading = study.read(split, "ahead", 0)
    slope = reading.slope(split.leading[:50])
    assert (slope[:, 0] > 2 * np.abs(slope[:, 1])).mean() > 0.9
    nudged = reading.score(split.leading[:50], np.tile([1.0, 0.0], (50, 1)))
    assert nudged == pytest.approx(slope[:, 0])  # linear in what is added
    pairs = study.pairs_of(split, reading)
    assert pairs.summary().ties == 0
    assert set(pairs.trajectory) <= set(split.episode[split.side == 0])
    with pytest.raises(ValueError, match="ahead"):
        study.read(split, "aheed", 0)


@pytest.mark.slow
def test_the_study_is_reported_with_intervals(studied, tmp_path):
    text = write_report([studied, studied], tmp_path)
    assert "| mean shift | +" in text
    assert "| ahead, people's labels shuffled |" in text
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "door.md", "door.png"}
    sums = [([2.0, 4.0], [1.0, 1.0]), ([5.0, 7.0], [1.0, 1.0])]
    found = estimate(sums)
    assert found.value == pytest.approx(4.5)
    assert found.low < 3.5 < 5.5 < found.high
    assert estimate(sums, sums) == type(found)(0.0, 0.0, 0.0)


def test_the_study_says_which_data_are_absent(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PFM_DATA", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["door", "--out", str(tmp_path / "out")])
    assert study.main() == 1
    assert "PFM_DATA" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", ["door", "--out", str(tmp_path), "--report"])
    assert study.main() == 1
    assert "no splits" in capsys.readouterr().err
