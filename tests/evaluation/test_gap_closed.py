"""The share of the gap from random to oracle closed: by hand, in every report that shows it."""

import pytest
from support.gaps import BY_HAND, PICKS, SCORES

from pfm.evaluation import Report, Scored


def test_a_report_card():
    texts = ["a", "b", "c"]
    rows = [Scored("", texts, scores, {"pfm": pick}) for scores, pick in zip(SCORES, PICKS, strict=True)]
    report = Report.from_scored(rows, resamples=50)
    closed = {row.name: None if row.gap_closed is None else row.gap_closed.value for row in report.rows}
    assert closed["pfm"] == pytest.approx(BY_HAND)
    assert (closed["random"], closed["oracle"]) == (0, 1)
    flat = Report.from_scored([Scored("", texts, [0.1] * 3, {"pfm": 1})] * 2, resamples=50)
    assert flat.row("pfm").gap_closed is None
