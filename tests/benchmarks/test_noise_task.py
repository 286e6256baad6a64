"""Wrong labels in the benchmark: tasks that turn labels round, and the report of what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.core.bench import Bench
from benchmarks.core.config import MethodConfig, RunConfig, TaskConfig
from benchmarks.core.measures import ChoiceTable
from benchmarks.preference import noise_report
from benchmarks.selection.report import ChoiceRun
from benchmarks.selection.selection import Item, Selection, one_hot
from pfm import EncodedPairs, PreferencePairs


class Reader:
    """Keeps the pairs that a task gives it, and chooses the first candidate."""

    reads_vectors = True

    def fit(self, train: EncodedPairs, bench: Bench) -> dict[str, Any]:
        self.train = train
        return {}

    def choose(self, items: Sequence[Item], encoder: Any) -> np.ndarray:
        return one_hot([0] * len(items), len(items[0].candidates))


def test_a_task_turns_labels_round_before_any_method_sees_them():
    words = ["one", "two words", "three words here", "four words are here"]
    rows = [
        {"prompt": f"p{i}", "chosen": f"{i} {words[i % 4]}", "rejected": f"{i} {words[(i + 1) % 4]}"} for i in range(50)
    ]
    items = [Item("q", 0, "q", words[:2], np.array([0.0, 1.0]), 0.5)]
    task = Selection(PreferencePairs.from_rows(rows), items, "nobody", "nothing", False)
    seen = []
    for flips in (0.0, 0.3):
        reader = Reader()
        task.run(reader, Bench("surface", "truncate", 0, False, flips))
        seen.append(reader.train)
    assert torch.equal(seen[1].chosen, seen[0].flip_labels(0.3, 0).chosen)
    assert 5 < int((seen[0].chosen != seen[1].chosen).any(1).sum()) < 25


def test_only_wrong_labels_change_the_key_of_a_run():
    run = RunConfig(TaskConfig("arguments"), MethodConfig("bradley_terry"), out="anywhere")
    assert "flips" not in run.settings()
    assert replace(run, flips=0.2).settings() == run.settings() | {"flips": 0.2}


def finished(method: str, flips: float, seed: int, picks: list[int]) -> ChoiceRun:
    count = len(picks)
    table = ChoiceTable(
        group=np.array([f"g{i}" for i in range(count)]), draw=np.zeros(count, dtype=np.int64),
        scores=np.tile([0.2, 0.6, 1.0], (count, 1)), independent=np.zeros(count), lengths=np.ones((count, 3)),
        changed=np.tile([False, True, True], (count, 1)), weights=one_hot(picks, 3),
    )  # fmt: skip
    settings: dict[str, Any] = {"task": {"name": "t"}, "method": {"name": method, "label": method}, "seed": seed}
    settings |= {"flips": flips} if flips else {}
    return ChoiceRun(Path(f"{method}-{flips}-{seed}"), {"settings": settings, "about": {"percent": True}}, table)


def test_the_cost_of_wrong_labels_is_told_relative_to_the_plain_fits():
    runs = []
    for seed in (0, 1):
        runs += [
            finished("bradley_terry", 0.0, seed, [2, 2, 2, 2]),
            finished("bradley_terry", 0.2, seed, [1, 1, 0, 2]),
            finished("bradley_terry_robust", 0.0, seed, [2, 2, 2, 2]),
            finished("bradley_terry_robust", 0.2, seed, [2, 2, 1, 2]),
            finished("pfm_robust", 0.2, seed, [0, 0, 0, 0]),  # without its plain one: nothing to compare it with
        ]
    control, plain, robust = noise_report.costs(runs)
    assert (control.method, control.flips, control.loss.value, control.share) == ("bradley_terry_robust", 0, 0, None)
    assert plain.loss.value == pytest.approx((0.4 + 0.4 + 0.8 + 0) / 4)
    assert robust.loss.value == pytest.approx(0.1)
    assert robust.share is not None
    assert robust.share.value == pytest.approx(0.25)
    assert plain.loss_wins.value == pytest.approx(0.125)
    assert robust.seeds == 2
    assert "25%" in noise_report.markdown([control, plain, robust])
    assert noise_report.costs(runs[::5]) == []  # clean labels only
