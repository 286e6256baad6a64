"""The choices of ``conf/``: each can be made, and none loses its finished runs without anybody noticing.

A run is found again by its key, a digest of its settings (:meth:`benchmarks.core.config.RunConfig.key`).
``choices.json`` holds a digest for every choice of a task and of a method. A change of a table or of a default that
changes one makes its finished runs run again; where that is meant, write the new digest into the file:
``PYTHONPATH=.:tests python tests/benchmarks/test_choices.py``.
"""

from __future__ import annotations

import hashlib
import json
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from support.bench_settings import configured

from benchmarks.core.config import RunConfig
from benchmarks.core.schemas import choices, method_settings
from benchmarks.methods import make_method

STORED = Path(__file__).with_name("choices.json")
PINNED: dict[str, dict[str, str]] = json.loads(STORED.read_text(encoding="utf-8"))


def digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def settings(task: str, method: str) -> RunConfig:
    return configured(f"task={task}", f"method={method}", "seed=3")


@pytest.mark.parametrize(("task", "method"), list(zip(cycle(PINNED["task"]), PINNED["method"], strict=False)))
def test_a_choice_can_be_made_and_keeps_its_finished_runs(task: str, method: str):
    made = settings(task, method)
    assert made.method.name == method.rpartition("/")[2]
    assert make_method(made.method)
    assert vars(made.method).get("flow", {"seed": 3})["seed"] == 3
    for group, name in (("task", task), ("method", method)):
        assert digest(made.settings()[group]) == PINNED[group][name], f"{group}={name}: its finished runs are lost"


def test_all_choices_can_be_found():
    assert len(PINNED["method"]) >= len(PINNED["task"])  # each task is composed above
    for group, pinned in PINNED.items():
        assert set(pinned) <= set(choices(group))


def test_a_method_is_found_by_its_name_and_family():
    flow = method_settings("flow", "control.flow")
    assert flow is not None
    assert flow["flow"]["hidden"] == 128
    assert method_settings("flow", "transport") is None


def test_a_changed_setting_changes_the_digest():
    one, other = settings("line", "best_of_4"), settings("line", "best_of_8")
    other.method.label, other.method.name = one.method.label, one.method.name
    assert digest(one.settings()["method"]) != digest(other.settings()["method"])


def store() -> None:
    """Write the digests of all choices."""
    tasks, methods = choices("task"), choices("method")
    found = {
        "task": {task: digest(settings(task, "random").settings()["task"]) for task in sorted(tasks)},
        "method": {method: digest(settings("line", method).settings()["method"]) for method in sorted(methods)},
    }
    STORED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    store()
