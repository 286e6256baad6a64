"""Rounds of labels: each goes on from the last, chance leads nowhere, and what was finished is kept."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pfm.pbrl.improvement
from pfm.pbrl import BatchedPointMass, FlowPolicy, Teacher, episode_returns, improve, load_improvement

FLOW = {"hidden": 32, "layers": 1, "epochs": 4}
SETTINGS: dict[str, Any] = {
    "length": 4, "continuation": 25, "noise": 0.3, "correlation": 0.9, "rounds": 3, "episodes": 32,
    "strengths": (1.0, 2.0, 4.0), "config": FLOW, "progress": False,
}  # fmt: skip
EPISODES = 200


class Steering:
    """Pushes a point mass towards the origin, too weakly."""

    action_space = BatchedPointMass.action_space

    def __init__(self, push: float = 0.3) -> None:
        self.push = push

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        seen = np.asarray(observation)
        return np.clip(-self.push * seen[..., :2] - 0.3 * seen[..., 2:], -1, 1).astype(np.float32), state


def returns(policy) -> np.ndarray:
    return episode_returns(BatchedPointMass(), policy, EPISODES, seed=5, batch=EPISODES)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("improvement") / "steering"
    improve(BatchedPointMass, Steering(), 600, folder=folder, **SETTINGS)
    return folder


def test_every_round_goes_on_from_the_last(kept: Path):
    found = load_improvement(kept, Steering())
    assert [each.labels for each in found.rounds] == [200, 200, 200]
    for before, after in zip(found.rounds, found.rounds[1:], strict=False):
        assert after.kept == before.reached
    # On starts that chose nothing: each round's policy is better than the one below it.
    policy, earned = found.policy, []
    while isinstance(policy, FlowPolicy):
        earned.append(returns(policy).mean())
        policy = policy.reference
    assert isinstance(policy, Steering)
    assert len(earned) >= 2
    assert earned[0] > earned[-1] > returns(Steering()).mean()
    lines = str(found).splitlines()
    assert len(lines) == 4
    assert lines[1].split()[:2] == ["1", "200"]


def test_answers_by_a_coin_lead_nowhere(kept: Path):
    learned = load_improvement(kept, Steering())
    chance = improve(BatchedPointMass, Steering(), 600, teacher=Teacher(mistake=0.5), **SETTINGS)
    before = returns(Steering())
    gain = (returns(learned.policy) - before).mean()
    assert gain > 1
    assert abs((returns(chance.policy) - before).mean()) < 0.25 * gain


def test_without_episodes_labels_alone_are_followed():
    settings = {**SETTINGS, "episodes": 0, "strengths": (1.0,), "rounds": 2}
    found = improve(BatchedPointMass, Steering(), 600, **settings)
    assert [(each.strength, each.kept, each.returns) for each in found.rounds] == [(1.0, None, {})] * 2
    assert str(found).splitlines()[2].split() == ["2", "300", "1", "–", "–"]
    chance = improve(BatchedPointMass, Steering(), 600, teacher=Teacher(mistake=0.5), **settings)
    before = returns(Steering())
    gain = (returns(found.policy) - before).mean()
    assert gain > 1
    assert abs((returns(chance.policy) - before).mean()) < 0.1 * gain


def test_a_policy_that_nothing_improves_is_kept():
    # The teacher errs always: what every flow learns is worse, and no strength of it is chosen.
    found = improve(BatchedPointMass, Steering(), 400, teacher=Teacher(mistake=1.0), **{**SETTINGS, "rounds": 2})
    reference = found.policy
    assert isinstance(reference, Steering)
    assert [each.strength for each in found.rounds] == [0, 0]
    assert "none" in str(found)


def test_finished_rounds_are_taken_and_an_unfinished_one_is_done_again(kept: Path, tmp_path: Path):
    folder = tmp_path / "again"
    shutil.copytree(kept, folder)
    (folder / "round-3" / "chosen.json").unlink()
    shutil.rmtree(folder / "round-3" / "flow", ignore_errors=True)
    before = (folder / "round-2" / "chosen.json").stat().st_mtime_ns
    whole = load_improvement(kept, Steering())
    assert len(load_improvement(folder, Steering()).rounds) == 2  # as far as it came
    again = improve(BatchedPointMass, Steering(), 600, folder=folder, **SETTINGS)
    assert again.rounds == whole.rounds
    assert (folder / "round-2" / "chosen.json").stat().st_mtime_ns == before
    seen = BatchedPointMass().reset(16, seed=3)
    for found in (again, load_improvement(folder, Steering())):
        np.testing.assert_allclose(found.policy.predict(seen)[0], whole.policy.predict(seen)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"seed": 3}, "seed=0"), ({"episodes": 8}, "episodes=32"), ({"noise": 0.2}, "collecting="),
     ({"config": {"epochs": 3}}, "flow=")],
)  # fmt: skip
def test_a_folder_of_other_settings_is_refused(kept: Path, changed: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=f"holds an improvement with {named}"):
        improve(BatchedPointMass, Steering(), 600, folder=kept, **{**SETTINGS, **changed})


def test_a_folder_of_another_policy_is_refused(kept: Path):
    with pytest.raises(ValueError, match="holds an improvement with policy="):
        improve(BatchedPointMass, Steering(push=0.5), 600, folder=kept, **SETTINGS)


def test_a_folder_without_a_round_says_what_writes_one(tmp_path: Path):
    (tmp_path / "improvement.json").write_text(json.dumps({}))
    with pytest.raises(FileNotFoundError, match=r"no finished round: give a folder of pfm\.pbrl\.improve"):
        load_improvement(tmp_path, Steering())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rounds": 0}, "rounds must be a whole number of at least 1: got 0"),
        ({"episodes": -1}, "episodes must be"),
        ({"episodes": 0}, r"episodes=0 chooses nothing: give one strength, such as \(1.0,\), got \[1.0, 2.0, 4.0\]"),
        ({"rounds": 700}, "pairs must be a whole number of at least 700: got 600; each round needs a pair"),
        ({"form": "actions"}, "form must be one of residual, directions: got 'actions'"),
        ({"strengths": ()}, "at least one"),
        ({"strengths": (1.0, -1.0)}, "numbers above 0"),
        ({"value": lambda seen: seen[:, 0]}, "value is of one policy"),
        ({"noise": None}, "noise=None draws the policy's own actions"),
        ({"length": 0}, "length must be a whole number"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        improve(BatchedPointMass, Steering(), 600, **{**SETTINGS, **changed})


def test_no_round_of_any_seed_asks_for_the_data_of_another(monkeypatch: pytest.MonkeyPatch):
    from pfm.pbrl import improvement

    seeds: list[int] = []
    collect = improvement.collect

    @functools.wraps(collect)
    def noted(*arguments, seed, **options):
        seeds.append(seed)
        return collect(*arguments, seed=seed, **options)

    monkeypatch.setattr(improvement, "collect", noted)
    few = SETTINGS | {"rounds": 2, "episodes": 0, "strengths": (1.0,), "config": FLOW | {"residual": False}}
    for seed in (0, 1, 0):
        improve(BatchedPointMass, Steering(), 12, seed=seed, **few)
    assert len(set(seeds)) == 4
    assert seeds[-2:] == seeds[:2]  # and the same seed for the same


def test_every_round_collects_anew_and_is_judged_on_starts_of_its_own(monkeypatch: pytest.MonkeyPatch):
    collected, judged = [], []
    collect, measured = pfm.pbrl.improvement.collect, pfm.pbrl.improvement.episode_returns

    def collects(*args, **kwargs):
        found = collect(*args, **kwargs)
        collected.append((kwargs["seed"], found.observation))
        return found

    def judges(environment, policy, episodes, seed, **kwargs):
        judged.append(seed)
        return measured(environment, policy, episodes, seed, **kwargs)

    monkeypatch.setattr(pfm.pbrl.improvement, "collect", collects)
    monkeypatch.setattr(pfm.pbrl.improvement, "episode_returns", judges)
    light = {"rounds": 2, "episodes": 4, "strengths": (1.0,), "continuation": 5, "config": FLOW | {"epochs": 1}}
    improve(BatchedPointMass, Steering(), 40, seed=3, **SETTINGS | light)
    assert len(collected) == 2
    (first, states), (second, others) = collected
    assert first != second  # the second round is of other states, whether or not the policy is another
    assert not np.array_equal(states, others)
    assert len(set(judged)) == 1  # every choice on the same starts
    assert judged[0] not in range(3, 3 + 1000)  # which are those of no collection
