"""Scripted teachers: their answers against closed forms, and what each setting changes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pfm.pbrl.teachers import TEACHERS, Teacher, all_comparisons, difference_unit

COUNT = 40_000


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((COUNT, 2)) - 5.0  # rewards may well be negative


def right(label: np.ndarray, values: np.ndarray) -> np.ndarray:
    return (label > 0.5) == (values[:, 0] > values[:, 1])


def test_comparisons_are_all_pairs_of_members():
    assert all_comparisons(2, 3).tolist() == [[0, 0, 1], [0, 0, 2], [0, 1, 2], [1, 0, 1], [1, 0, 2], [1, 1, 2]]


def test_the_unit_of_gaussian_values_is_their_mean_absolute_difference(values):
    assert difference_unit(values) == pytest.approx(2 / math.sqrt(math.pi), rel=0.02)
    assert difference_unit(np.zeros((3, 2))) == 1.0


def test_the_oracle_prefers_the_larger_value_and_ties_are_ties(values):
    assert right(Teacher().label(values), values).all()
    assert Teacher().label([[1.0, 1.0], [2.0, 1.0]]).tolist() == [0.5, 1.0]


def test_mistakes_come_as_often_as_asked(values):
    label = Teacher.named("mistake").label(values)
    assert right(label, values).mean() == pytest.approx(0.9, abs=4 * 0.3 / math.sqrt(COUNT))


def test_the_noisy_teacher_follows_bradley_terry(values):
    label = Teacher.named("noisy", beta=3.0).label(values)
    gap = 3.0 * (values[:, 0] - values[:, 1]) / difference_unit(values)
    for low, high in ((-4, -2), (-2, -1), (-1, 0), (0, 1), (1, 2), (2, 4)):
        part = (gap > low) & (gap <= high)
        expected = 1 / (1 + np.exp(-gap[part]))
        assert label[part].mean() == pytest.approx(expected.mean(), abs=4 * 0.5 / math.sqrt(part.sum()))


def test_skipped_are_the_comparisons_whose_better_segment_is_worst(values):
    label = Teacher.named("skip", skip=0.25).label(values)
    best = values.max(1)
    assert np.isnan(label).mean() == 0.25
    assert best[np.isnan(label)].max() <= best[~np.isnan(label)].min()


def test_equal_are_the_near_ones_and_only_those(values):
    label = Teacher.named("equal", equal=0.5).label(values)
    near = np.abs(values[:, 0] - values[:, 1]) <= 0.5 * difference_unit(values)
    assert (near == (label == 0.5)).all()
    assert right(label[~near], values[~near]).all()


def test_the_myopic_teacher_discounts_backwards_from_the_segments_end():
    rewards = np.array([[[4.0, 0.0, 1.0], [0.0, 0.0, 2.0]]])
    after = np.array([[0.0, 0.5]])
    assert Teacher(gamma=0.5).perceive(rewards, after)[0] == pytest.approx([4 * 0.25 + 1, 2.5])
    assert Teacher().perceive(rewards, after)[0] == pytest.approx([5, 2.5])
    assert Teacher().label(Teacher().perceive(rewards, after)).tolist() == [1.0]
    assert Teacher.named("myopic", gamma=0.5).label(Teacher(gamma=0.5).perceive(rewards, after)).tolist() == [0.0]


def test_answers_mean_the_same_in_any_unit_of_reward_and_are_repeatable(values):
    teacher = Teacher(beta=2.0, mistake=0.1, skip=0.1, equal=0.1)
    one = teacher.label(values, seed=3)
    assert np.array_equal(one, teacher.label(1000 * values + 7, seed=3), equal_nan=True)
    assert not np.array_equal(one, teacher.label(values, seed=4), equal_nan=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta"),
        ({"mistake": 1.5}, "mistake"),
        ({"skip": 1.0}, "skip"),
        ({"equal": -1.0}, "equal"),
        ({"gamma": 0.0}, "gamma"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Teacher(**settings)


def test_bad_names_and_values_are_refused():
    assert all(isinstance(Teacher.named(name), Teacher) for name in TEACHERS)
    with pytest.raises(ValueError, match="did you mean 'oracle'"):
        Teacher.named("orakle")
    with pytest.raises(ValueError, match=r"\(N, M\)"):
        Teacher().label([1.0, 2.0])
    with pytest.raises(ValueError, match="row 1"):
        Teacher().label([[1.0, 2.0], [np.nan, 0.0]])
