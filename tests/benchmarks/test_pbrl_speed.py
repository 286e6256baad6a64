"""The race of collection against the bare simulator: what it counts, and that it changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.control import speed
from pfm.pbrl import make_env


def test_steps_are_counted_at_the_simulator_and_replays_among_them():
    env, other = make_env("LunarLanderContinuous-v3"), make_env("LunarLanderContinuous-v3")
    kind = type(env.unwrapped)
    plain = kind.step
    with speed.counted(kind) as calls:
        env.reset(seed=0)
        before = calls[0]  # the reset steps once itself
        for _ in range(5):
            env.step(np.zeros(2, np.float32))
        assert calls[0] == before + 5
        other.restore_state(env.save_state())
    assert calls[0] >= before + 10
    assert kind.step is plain
    env.step(np.zeros(2, np.float32))
    assert calls[0] < before + 5 + 2 * 6


def test_contestants_make_as_many_steps_as_they_are_asked_for():
    policy = speed.untrained("Pendulum-v1")
    episodes = speed._episodes("Pendulum-v1", speed.Case(), policy, 450, seed=0)
    assert [len(actions) for _, actions in episodes] == [200, 200, 50]
    kind = type(make_env("Pendulum-v1").unwrapped)
    with speed.counted(kind) as calls:
        bare, least = speed._bare("Pendulum-v1", episodes), speed._least("Pendulum-v1", policy, seed=0)
        for steps in (3, 400, 100):
            bare(steps)
        assert calls[0] == 503
        for steps in (3, 400, 100):
            least(steps)
    assert abs(calls[0] - 2 * 503) < speed.BATCH


def test_the_race_counts_what_collecting_says_it_took(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(speed, "BATCH", 32)
    monkeypatch.setitem(speed.ENVIRONMENTS, "Pendulum-v1", speed.Case(length=2, continuation=2))
    speed.main(["--envs", "Pendulum-v1", "--untrained", "--readings", "1", "--seconds", "0.01"])
    header, _, row = (line.split(" | ") for line in capsys.readouterr().out.splitlines()[-3:])
    found = dict(zip(header, row, strict=True))
    assert found["steps"] == f"{10 * 200 + 100 * 3 * 4:,}"
    assert found["replayed |"] == "0% |"
    for name in ("collection / bare", "least / bare", "bare against itself"):
        assert 0 < float(found[name].split()[0]) < 10


def test_an_unknown_environment_is_named(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        speed.main(["--envs", "CartPole-v1"])
    assert "CartPole-v1" in capsys.readouterr().err
