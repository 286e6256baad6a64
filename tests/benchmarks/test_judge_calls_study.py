"""Questions to a judge, replayed on recorded verdicts of GPT-4."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.core.data import MissingDataError
from benchmarks.studies.judge_calls import Rule, picks, tournaments


def test_recorded_verdicts_are_replayed_with_three_questions_of_ten_or_fewer():
    try:
        every: Any = tournaments()
    except MissingDataError as error:
        pytest.skip(str(error))
    lengths = {t.group: np.log([len(text) for text in t.answers]) for t in every}
    odds = {
        group: 2 * np.subtract.outer(values, values) for group, values in lengths.items()
    }  # the longer, nothing fitted
    pivots, _ = picks(every, odds, Rule(open=True), 0)
    alone, _ = picks(every, odds, Rule(alone=True), 0)
    asked, possible = pivots[:, 2].sum(), pivots[:, 3].sum()
    assert asked / possible < 0.3
    assert pivots[:, 0].mean() > 0.8 > alone[:, 0].mean()
    assert pivots[:, 1].mean() < 0.03 < alone[:, 1].mean()
