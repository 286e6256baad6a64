"""The study of how often tune follows a flow where nothing helps: its interval, its record, and one data set."""

import json

import pytest

from benchmarks.studies.tuning import ROWS, Row, exact_interval, followed, rate


@pytest.mark.parametrize("of", [1, 20, 200])
def test_the_interval_of_no_events_and_of_all_is_in_closed_form(of):
    bound = 0.025 ** (1 / of)
    assert exact_interval(0, of) == pytest.approx((0, 1 - bound))
    assert exact_interval(of, of) == pytest.approx((bound, 1))


def test_what_was_run_is_read_and_counted_and_not_run_again(tmp_path):
    settings = [None, {"strength": 2.0}, None, None]
    lines = [json.dumps({"seed": seed, "setting": setting}) for seed, setting in enumerate(settings)]
    (tmp_path / "64.jsonl").write_text("\n".join(lines) + "\n")
    before = (tmp_path / "64.jsonl").read_bytes()
    low, high = exact_interval(1, 3)
    assert rate("64", 3, tmp_path) == f"64 | random | random | 1 of 3 | 0.333 [{low:.3f}, {high:.3f}]"
    assert (tmp_path / "64.jsonl").read_bytes() == before


def test_a_data_set_is_the_same_for_its_seed():
    found = [followed(Row(16, noise=True), 3, dimension=1) for _ in range(2)]
    assert found[0] == found[1]
    assert {str(row) for row in ROWS.values()} >= {"200 | random | random", "200 | with a signal | random"}
