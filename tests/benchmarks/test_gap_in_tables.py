"""The share of the gap from random to oracle closed, in the tables of the benchmarks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.gaps import BY_HAND, PICKS, SCORES

from benchmarks.core.measures import ChoiceTable, SeedBootstrap
from benchmarks.preference.measures import PredictionTable
from benchmarks.studies.encoders import BASE, Task, milliseconds, table
from pfm.statistics import Bootstrap


def choices(weights):
    scores = np.array(SCORES)
    return ChoiceTable(
        np.array(["a", "b", "c"]), np.zeros(3, np.int64), scores, np.zeros(3), np.ones((3, 3)), np.ones((3, 3), bool),
        weights,
    )  # fmt: skip


def test_a_task_of_choices():
    found = choices(np.eye(3)[PICKS]).measure(Bootstrap(3, 50))["gap_closed"]
    assert found is not None
    assert found.value == pytest.approx(BY_HAND)
    at_random = choices(np.full((3, 3), 1 / 3)).measure(Bootstrap(3, 50))["gap_closed"]
    assert at_random is not None
    assert at_random.value == pytest.approx(0)


def test_a_task_of_comparisons():
    predictions = PredictionTable(
        np.array(["a", "a", "b", "c"]), np.array([""] * 4), np.array([1.0, 0.5, 0.25, 1.0]),
        np.array([2.0, 1.0, 0.3, 0.0]), np.zeros(4, np.int64),
    )  # fmt: skip
    found = predictions.measure(Bootstrap(3, 50))["gap_closed"]
    assert found is not None
    assert found.value == pytest.approx((0.5 + 0 - 0.25 + 0) / (0.5 + 0 + 0.25 + 0.5))
    swapped = replace(predictions, logit=-predictions.logit).measure(Bootstrap(3, 50))["gap_closed"]
    assert swapped is not None
    assert swapped.value == pytest.approx(-found.value)


def test_the_study_of_encoders_pairs_its_differences():
    gap, base = np.array([1.0, 2.0, 1.0, 2.0]), np.array([0.5, 1.0, 0.0, 1.0])
    seeds, count = SeedBootstrap(np.array([0, 0, 1, 1])), np.ones(4)
    task = Task("t", {BASE: base, "surface": base + 0.1}, gap, seeds, True, count, {BASE: 2, "surface": 2})
    closed, points = task.closed("surface"), task.points("surface")
    assert closed is not None
    assert closed.value == pytest.approx(2.9 / 6)
    assert points is not None
    assert (points.value, points.low, points.high) == pytest.approx((0.1, 0.1, 0.1))
    lines = table([task], [BASE, "surface", "static"])
    assert "| surface | +10.0% [+10.0, +10.0] | +10.0% [+10.0, +10.0] |" in lines
    assert any(line.startswith("| static | – |") for line in lines)


def test_the_cost_of_an_answer_is_measured():
    found = milliseconds(["surface"], answers=2, repeats=2)["surface"]
    assert 0 < found.low <= found.value <= found.high
